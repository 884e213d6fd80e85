"""What decides the cost of a model: the configurations of its parts, without weights.

spec = model_spec("diorama")                    # or a pipeline folder
spec = WAN_SPECS["1.3B"]                        # published sizes
pipe = spec.pipeline("meta", torch.bfloat16)    # a pipeline of the real classes that takes no memory
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import AutoencoderKLWan
from torch import nn

from streamvid import checkpoint_vae22
from streamvid.errors import UserError
from streamvid.models import resolve_model
from streamvid.releases import RELEASES, Release
from streamvid.schedule import FewStepFlowScheduler
from streamvid.tiny_decoder import TinyDecoder
from streamvid.transformer import CausalWanTransformer3DModel

if TYPE_CHECKING:
    from streamvid.pipelines.pipeline_streamvid import StreamVidPipeline


@dataclass(frozen=True, eq=False)
class ModelSpec:
    """Configurations of a model's parts, and what it was made for.

    Attributes:
        name: for people.
        transformer, vae, text_encoder, scheduler, tiny_decoder: as in their `config.json`; there may be no tiny decoder.
        method: preset that the model is played with where nothing else is said.
        fps, height, width: of its videos.
    """

    name: str
    transformer: Mapping[str, Any]
    vae: Mapping[str, Any]
    text_encoder: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    method: str
    fps: float
    height: int
    width: int
    tiny_decoder: Mapping[str, Any] | None = None

    @property
    def unit(self) -> tuple[int, int]:
        """Pixel rows and columns of a token."""
        ratio = 2 ** len(self.vae["temperal_downsample"]) * (self.vae.get("patch_size") or 1)
        _, rows, columns = self.transformer["patch_size"]
        return ratio * rows, ratio * columns

    def part(self, name: str, **changes: Any) -> Any:
        """The transformer, vae, text_encoder or tiny_decoder on the meta device, in float32.

        Raises:
            UserError: there is no tiny decoder for this model.
        """
        config = getattr(self, name)
        if config is None:
            raise UserError(f"decoder = tiny does not exist for {self.name}: give exact")
        with torch.device("meta"):
            if name == "text_encoder":
                from transformers import UMT5Config, UMT5EncoderModel

                return UMT5EncoderModel(UMT5Config(**{**config, **changes})).eval()
            return _CLASSES[name].from_config({**config, **changes}).eval()

    def pipeline(
        self,
        device: torch.device | str,
        dtype: torch.dtype,
        decoder: str = "exact",
        prompts: Iterable[str] = (),
        blocks: int | None = None,
    ) -> StreamVidPipeline:
        """A pipeline with random weights, or on the meta device with none; `prompts` count as encoded.

        Args:
            decoder: exact or tiny.
            blocks: build so many blocks of the transformer; caches are as large as for all of them.
        """
        from streamvid.pipelines.pipeline_streamvid import StreamVidPipeline

        built = {} if blocks is None else {"num_layers": blocks}
        transformer = self.part("transformer", **built)
        if blocks is not None:
            transformer.register_to_config(num_layers=self.transformer["num_layers"])
        parts = [transformer, self.part("vae"), *([self.part("tiny_decoder")] if decoder == "tiny" else [])]
        network, vae, *tiny = (random_weights(part, device, dtype) for part in parts)
        pipe = StreamVidPipeline(
            None,
            None,
            network,
            vae,
            FewStepFlowScheduler.from_config(self.scheduler),
            self.method,
            self.fps,
            self.height,
            self.width,
            tiny_decoder=tiny[0] if tiny else None,
        )
        for prompt in prompts:
            config = network.config
            pipe.prompt_cache.put(prompt, torch.randn(config.text_len, config.text_dim, dtype=dtype))
        pipe.set_progress_bar_config(disable=True)
        return pipe


_CLASSES = {"transformer": CausalWanTransformer3DModel, "vae": AutoencoderKLWan, "tiny_decoder": TinyDecoder}


@torch.no_grad()
def random_weights(module: nn.Module, device: torch.device | str, dtype: torch.dtype) -> Any:
    """A module made on the meta device, on `device`: matrices random and as large as keeps activations their size."""
    module = nn.Module.to(module, dtype=dtype)
    if torch.device(device).type == "meta":
        return module.requires_grad_(False)
    module.to_empty(device=device)
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        scale = name.endswith(("gamma", "norm1.weight", "norm2.weight", "norm_q.weight", "norm_k.weight"))
        if scale or tensor.ndim < 2:
            tensor.fill_(float(scale))
        else:
            tensor.normal_(std=tensor[0].numel() ** -0.5)
    if isinstance(module, AutoencoderKLWan):
        from streamvid.decoding import channels_last

        channels_last(module)
    return module.requires_grad_(False)


# --- published sizes --------------------------------------------------------------------------------------------------

_UMT5_XXL = {
    "vocab_size": 256384,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
    "dropout_rate": 0.0,
}
_VAE_21 = {"z_dim": 16, "temperal_downsample": [False, True, True]}
_VAE_22 = {
    "base_dim": 160,
    "decoder_base_dim": 256,
    "z_dim": 48,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": checkpoint_vae22.RESIDUAL_BLOCKS,
    "temperal_downsample": [False, True, True],
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
    "scale_factor_temporal": 4,
    "latents_mean": [float(value) for value in checkpoint_vae22.MEAN.split()],
    "latents_std": [float(value) for value in checkpoint_vae22.DEVIATION.split()],
}


def _published(
    name: str, heads: int, ffn: int, layers: int, release: Release, vae: Mapping[str, Any] = _VAE_21
) -> ModelSpec:
    transformer = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": heads,
        "attention_head_dim": 128,
        "in_channels": vae["z_dim"],
        "out_channels": vae["z_dim"],
        "ffn_dim": ffn,
        "num_layers": layers,
    }
    scheduler = {"shift": release.shift, "denoising_steps": release.steps, "warp": release.warp}
    return ModelSpec(
        name,
        transformer,
        vae,
        _UMT5_XXL,
        scheduler,
        release.method,
        release.fps,
        release.height,
        release.width,
        {} if vae is _VAE_21 else None,  # taew2_1 is for the VAE of Wan 2.1
    )


WAN_SPECS = {
    "1.3B": _published("Wan2.1 1.3B", 12, 8960, 30, RELEASES["longlive"]),
    "14B": _published("Wan2.1 14B", 40, 13824, 40, RELEASES["krea"]),
    "5B": _published("Wan2.2 5B", 24, 14336, 30, RELEASES["longlive2"], _VAE_22),
}


# --- models on this machine -------------------------------------------------------------------------------------------


def model_spec(model: str) -> ModelSpec:
    """The configurations of an embedded model or of a model folder: no weights are read.

    Raises:
        UserError: no such model on this machine, or its configurations cannot be read.
    """
    folder = Path(resolve_model(model))
    if not folder.is_dir():
        raise UserError(
            f"model = {model!r} is not on this machine: give an embedded model or a folder, or --wan"
        )
    try:
        index = json.loads((folder / "model_index.json").read_text())
        transformer, vae, text_encoder, scheduler = (
            json.loads((folder / file).read_text())
            for file in (
                "transformer/config.json",
                "vae/config.json",
                "text_encoder/config.json",
                "scheduler/scheduler_config.json",
            )
        )
        tiny = folder / "tiny_decoder" / "config.json"
        tiny_decoder = json.loads(tiny.read_text()) if tiny.is_file() else None
        method, fps, height, width = (index[name] for name in ("method", "fps", "height", "width"))
        spec = ModelSpec(
            model, transformer, vae, text_encoder, scheduler, method, fps, height, width, tiny_decoder
        )
        assert spec.unit and transformer["num_layers"] and scheduler["denoising_steps"]
        return spec
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"model = {model!r} has configurations that cannot be read ({type(error).__name__}: {reason}): "
            "make it anew with `streamvid convert`"
        ) from error
