"""What the stages of a text-to-video transformer share: the model they start from, its frozen parts, LoRA, export."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from streamvid.checkpoints import load_transformer
from streamvid.errors import UserError
from streamvid.kernels.attention import attention_backend
from streamvid.methods import Method, load_method
from streamvid.models import load_pipeline, resolve_model
from streamvid.pipelines.pipeline_streamvid import StreamVidPipeline
from streamvid.schedule import FewStepFlowScheduler
from streamvid.training.lora import add_lora, merged, save_lora
from streamvid.training.stage import Stage
from streamvid.transformer import AttentionContext, CausalWanTransformer3DModel

T = TypeVar("T")
FROZEN_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def options(kind: type[T], values: Mapping[str, Any] | None, where: str) -> T:
    """A dataclass of options from a part of a configuration.

    Raises:
        UserError: an option does not exist or is missing.
    """
    known = [f.name for f in fields(kind)]  # type: ignore[arg-type]
    if not isinstance(values or {}, Mapping):
        raise UserError(f"{where} = {values!r} must be a mapping of options: choose from {', '.join(known)}")
    for name in values or {}:
        if name not in known:
            raise UserError(f"{where}.{name} is not an option: choose from {', '.join(known)}")
    try:
        return kind(**(values or {}))
    except TypeError as error:
        raise UserError(f"{where}: {str(error).split('__init__() ')[-1]}: add it") from None


def choose(value: str, choices: Sequence[str], where: str) -> None:
    """Whether an option is one of its values.

    Raises:
        UserError: it is not.
    """
    if value not in choices:
        raise UserError(f"{where} = {value!r} is not known: choose one of {', '.join(choices)}")


@dataclass
class ModelOptions:
    """The model to train.

    Args:
        folder: an embedded model, or a pipeline folder (`streamvid convert` makes one of a published checkpoint).
        weights: another transformer checkpoint or folder to start from, e.g. of the stage before.
        transformer: configuration of a new one instead, with random weights.
        scheduler: options of the schedule that change.
        method, overrides: how it is rolled out, and will be run; None: the folder's.
        height, width: pixels of a clip; None: the folder's.
        lora_rank, lora_alpha: train low-rank matrices on all linear layers of the blocks; 0: all weights. An alpha of 0
            takes the rank.
        attention: backend of all transformers of the stage; on a CPU `reference` is the fastest for small models.
        gradient_checkpointing: forget activations and compute them again in the backward.
        frozen_dtype: of the text encoder, the teacher and other frozen transformers: float32, or bfloat16 beside
            `mixed_precision: bf16`.
        export: `pipeline` writes a whole model folder, `transformer` the transformer and schedule only.
    """

    folder: str
    weights: str | None = None
    transformer: dict[str, Any] | None = None
    scheduler: dict[str, Any] = field(default_factory=dict)
    method: str | None = None
    overrides: dict[str, Any] = field(default_factory=dict)
    height: int | None = None
    width: int | None = None
    lora_rank: int = 0
    lora_alpha: float = 0.0
    attention: str = "auto"
    gradient_checkpointing: bool = False
    frozen_dtype: str = "float32"
    export: str = "pipeline"


class Denoiser(nn.Module):
    """A transformer with its schedule: x0 of noisy clips, whatever it predicts."""

    def __init__(self, model: CausalWanTransformer3DModel, scheduler: FewStepFlowScheduler):
        super().__init__()
        self.model, self.scheduler = model, scheduler

    def x0(
        self,
        x_t: torch.Tensor,
        timestep: torch.Tensor,
        text: torch.Tensor,
        context: AttentionContext | None = None,
    ) -> torch.Tensor:
        """Predicted clean clip `[B, C, F, H, W]` of `x_t` at timesteps `[B]` or `[B, F]`; float32.

        Text `[B, L, D]`, or `[B, N, L, D]` for N equal runs of frames. Without a `context` all frames attend each other.
        """
        prompt_kv = self.model.prompt_kv(text)
        output = self.model(x_t, timestep, prompt_kv=prompt_kv, context=context, return_dict=False)[0]
        return self.scheduler.x0_from_output(output.float(), x_t, self.sigma(timestep))

    def sigma(self, timestep: torch.Tensor) -> torch.Tensor:
        """Noise level, ready to broadcast with clips."""
        sigma = self.scheduler.sigma(timestep)
        return sigma.view(-1, 1, 1, 1, 1) if timestep.ndim == 1 else sigma[:, None, :, None, None]

    def noisy(self, x_0: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return self.scheduler.add_noise(x_0, noise, self.sigma(timestep))


def load_denoiser(folder: str, weights: str | None = None, attention: str = "auto") -> Denoiser:
    """The transformer and schedule of a model folder, in float32.

    Raises:
        UserError: the folder or the weights are not there or do not fit.
    """
    source = resolve_model(folder)
    config = Path(source) / "scheduler"
    if not config.is_dir():
        raise UserError(
            f"folder = {folder!r} has no scheduler: give a model folder made by `streamvid convert`"
        )
    model = load_transformer(weights or source, dtype=torch.float32)
    model.attention_name = attention
    return Denoiser(model, FewStepFlowScheduler.from_pretrained(str(config)))


class ModelStage(Stage):
    """A stage that starts from a model folder and trains its transformer.

    Args:
        model: values of `ModelOptions`.
    """

    cpu_only = False
    frozen_parts = ("text_encoder", "vae", "teacher")

    def __init__(self, model: Mapping[str, Any]):
        super().__init__()
        self.options = chosen = options(ModelOptions, model, "stage.model")
        choose(chosen.export, ("pipeline", "transformer"), "model.export")
        choose(chosen.frozen_dtype, tuple(FROZEN_DTYPES), "model.frozen_dtype")
        if chosen.weights and chosen.transformer:
            raise UserError("model.weights and model.transformer exclude each other: leave one of them out")
        pipe = load_pipeline(chosen.folder, "cpu", "float32")
        self.method: Method = load_method(chosen.method or pipe.config.method, chosen.overrides)
        self.scheduler = FewStepFlowScheduler.from_config({**pipe.scheduler.config, **chosen.scheduler})
        transformer = pipe.transformer
        if chosen.transformer:
            transformer = CausalWanTransformer3DModel(**chosen.transformer)
            initialise(transformer)
        elif chosen.weights:
            transformer = load_transformer(chosen.weights, dtype=torch.float32)
        attention_backend(chosen.attention)  # an unknown one is told now
        transformer.attention_name = chosen.attention
        prepare_for_training(transformer, chosen)
        self.transformer: CausalWanTransformer3DModel = transformer
        self.frozen_dtype = FROZEN_DTYPES[chosen.frozen_dtype]
        self.text_encoder = pipe.text_encoder.eval().requires_grad_(False).to(self.frozen_dtype)
        self.vae = pipe.vae.eval().requires_grad_(False)
        self.tokenizer = pipe.tokenizer
        self.size = {
            "height": chosen.height or pipe.config.height,
            "width": chosen.width or pipe.config.width,
        }
        self.facts = {"method": self.method.name, "fps": pipe.config.fps, **self.size}
        rows, columns = self.pipeline().latent_size(**self.size)
        self.latent_shape = (transformer.config.in_channels, rows, columns)
        self._texts: dict[str, torch.Tensor] = {}

    @property
    def denoiser(self) -> Denoiser:
        return Denoiser(self.transformer, self.scheduler)

    @property
    def device(self) -> torch.device:
        return self.transformer.device

    def trainable(self) -> CausalWanTransformer3DModel:
        return self.transformer

    def train(self, mode: bool = True):
        super().train(mode)
        self.text_encoder.eval()
        self.vae.eval()
        return self

    @property
    def tokens_per_frame(self) -> int:
        rows, columns = self.transformer.token_grid(*self.latent_shape[1:])
        return rows * columns

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> torch.Tensor:
        """Embeddings `[B, L, D]` of prompts; the latest thousand are remembered."""
        unknown = [p for p in dict.fromkeys(prompts) if p not in self._texts]
        if unknown:
            from streamvid.text import encode_prompts

            rows = encode_prompts(
                self.tokenizer, self.text_encoder, unknown, self.transformer.config.text_len
            )
            self._texts |= dict(zip(unknown, rows.float(), strict=True))
        found = torch.stack([self._texts[p] for p in prompts]).to(self.device)
        self._texts = dict(list(self._texts.items())[-1000:])
        return found

    def pipeline(self) -> StreamVidPipeline:
        return StreamVidPipeline(
            self.tokenizer, self.text_encoder, self.transformer, self.vae, self.scheduler, **self.facts
        )

    def export(self, output: Path) -> None:
        transformer = merged(self.transformer) if self.options.lora_rank else self.transformer
        if self.options.lora_rank:
            save_lora(self.transformer, output / "lora.safetensors")
        if self.options.export == "pipeline":
            pipe = self.pipeline()
            pipe.register_modules(transformer=transformer)
            pipe.save_pretrained(output)
        else:
            transformer.save_pretrained(output / "transformer")
            self.scheduler.save_pretrained(output / "scheduler")


def initialise(transformer: CausalWanTransformer3DModel) -> None:
    """Output projections start at zero: every block begins as the identity, the network as x0 = 0."""
    for name, parameter in transformer.named_parameters():
        if name.endswith(
            (
                "to_out.0.weight",
                "to_out.0.bias",
                "ffn.net.2.weight",
                "ffn.net.2.bias",
                "proj_out.weight",
                "proj_out.bias",
            )
        ):
            torch.nn.init.zeros_(parameter)
        elif name.endswith("scale_shift_table"):
            # gates (rows 2 and 5 of six) start at one, so that zero projections get a gradient
            torch.nn.init.zeros_(parameter)
            if parameter.shape[1] == 6:
                parameter.data[:, [2, 5]] = 1.0


def prepare_for_training(model: CausalWanTransformer3DModel, chosen: ModelOptions) -> None:
    """Which weights learn, and whether activations are kept."""
    model.requires_grad_(True)
    if chosen.lora_rank:
        add_lora(model, chosen.lora_rank, chosen.lora_alpha or chosen.lora_rank)
    if chosen.gradient_checkpointing:
        model.enable_gradient_checkpointing()


def frozen(denoiser: Denoiser, dtype: torch.dtype = torch.float32) -> Denoiser:
    return denoiser.eval().requires_grad_(False).to(dtype)


def trainable_copy(denoiser: Denoiser) -> Denoiser:
    return Denoiser(copy.deepcopy(denoiser.model), denoiser.scheduler)
