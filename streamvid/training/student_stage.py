"""Training of the embedded model's causal student: few-step x0 prediction, teacher forcing, then its own rollouts.

A step is one of three kinds, drawn at random:

- *first block*: block 0 from noise. At sigma = 1 the noise is coupled to the clip's unnamed scenery
  (`streamvid.training.noise_coupling`), so that every seed has one sharp answer and seeds differ.
- *teacher forcing*: blocks of real clips, each against its window of real clean latents.
- *rollout*: the student first generates the clip with its own sampler and cache (Self Forcing), then learns from its own
  contexts and its own noisy inputs to reach the real clip. Valid because the world is deterministic given its first block.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from PIL import Image
from torch import nn
from transformers import AutoTokenizer, UMT5EncoderModel

from streamvid.context import ContextCache
from streamvid.decoding import decode, decoder_state
from streamvid.errors import UserError
from streamvid.sampler import few_step_block
from streamvid.schedule import FewStepFlowScheduler
from streamvid.text import encode_prompts
from streamvid.training.dry_run import Work, mean_window
from streamvid.training.latents import BLOCKS, FIRST_BLOCKS, FRAMES_PER_BLOCK, Clips, load_clips
from streamvid.training.model_stage import initialise
from streamvid.training.noise_coupling import SceneryHead, couple_noise, coupled_scenery
from streamvid.training.trainer import Stage
from streamvid.training.windows import WindowedAttention, plan_blocks
from streamvid.transformer import CausalWanTransformer3DModel, PromptKV
from streamvid.window import WindowOptions
from streamvid.world.prompts import describe
from streamvid.world.scene import ATTRIBUTES, Scene

VALIDATION_CLIPS = 64
COUPLED_SIGMA = 0.95  # noise of this level and above is coupled to the scenery; below, the latents show it
FIRST_STEP_SHARE = 0.6  # of first blocks seen at pure noise


class StudentStage(Stage):
    """See the module's docstring.

    Args:
        transformer, scheduler: configurations.
        window: `WindowOptions`.
        latents: folder of encoded clips; text: folder with `text_encoder` and `tokenizer`; vae: for pictures.
        batch_size: clips per step; first_block_batch: clips of a first-block step.
        first_block_share, rollout_share: probability of each kind of step; the rest is teacher forcing.
        rollout_from: rollouts begin after this step.
        noisy_streams: noise levels per clip in one forward.
        context_noise: clean contexts get noise of up to this sigma in half of the clips, unknown to the student.
        scenery_weight: of a further loss, which asks the tokens of a first block's pure noise for the scenery that it is
            coupled to, half way through the layers (`SceneryHead`).
        start_from: a saved transformer to continue from.
    """

    def __init__(
        self,
        transformer: dict[str, Any],
        scheduler: dict[str, Any],
        window: dict[str, Any],
        latents: str,
        text: str,
        vae: str,
        batch_size: int = 8,
        first_block_batch: int = 24,
        first_block_share: float = 0.35,
        rollout_share: float = 0.4,
        rollout_from: int = 1500,
        noisy_streams: int = 2,
        context_noise: float = 0.15,
        scenery_weight: float = 0.1,
        start_from: str | None = None,
    ):
        super().__init__()
        if start_from is None:
            student = CausalWanTransformer3DModel(**transformer)
            initialise(student)
        else:
            student = CausalWanTransformer3DModel.from_pretrained(start_from)
        student.attention_name = "reference"  # faster than fused attention at this size, above all backward
        self.learnt = nn.ModuleDict({"transformer": student})
        self.scenery_weight = scenery_weight
        if scenery_weight:
            width = student.config.num_attention_heads * student.config.attention_head_dim
            self.learnt["scenery_head"] = SceneryHead(width)
        self.scheduler = FewStepFlowScheduler(**scheduler)
        self.window = WindowOptions(**window)
        self.plans = plan_blocks(self.window, BLOCKS)
        self.text_encoder = (
            UMT5EncoderModel.from_pretrained(f"{text}/text_encoder", dtype=torch.float32)
            .eval()
            .requires_grad_(False)
        )
        self.tokenizer = AutoTokenizer.from_pretrained(f"{text}/tokenizer")
        self.vae_path = vae
        clips = load_clips(latents)
        held = torch.arange(len(clips)) < VALIDATION_CLIPS
        needed = VALIDATION_CLIPS + batch_size
        if len(clips) < needed or int((~held & ~clips.late).sum()) < batch_size:
            raise UserError(
                f"latents = {latents!r} holds {len(clips)} clips and a step needs more: encode at least {needed}"
            )
        self.clips, self.validation_clips = _select(clips, ~held), _select(clips, held)
        self.first_blocks = load_clips(latents, FIRST_BLOCKS)
        if len(self.first_blocks) < first_block_batch:
            raise UserError(
                f"first_block_batch = {first_block_batch} is more than the {len(self.first_blocks)} first blocks in "
                f"latents = {latents!r}: lower it or encode more with first_block_shards"
            )
        self.mean_latents = mean_latents(self.clips)
        self.batch_size, self.first_block_batch = batch_size, first_block_batch
        self.first_block_share, self.rollout_share, self.rollout_from = (
            first_block_share,
            rollout_share,
            rollout_from,
        )
        self.noisy_streams, self.context_noise = noisy_streams, context_noise

    @property
    def transformer(self) -> CausalWanTransformer3DModel:
        """The student."""
        student: Any = self.learnt["transformer"]
        return student

    def trainable(self) -> nn.ModuleDict:
        return self.learnt

    def train(self, mode: bool = True) -> StudentStage:
        super().train(mode)
        self.text_encoder.eval()  # frozen: no dropout, the words are what they are in a stream
        return self

    # --- batches ----------------------------------------------------------------------------------------------------

    def batch(self, seed: int, step: int, process: int) -> dict[str, Any]:
        kind_rng = np.random.default_rng([seed, step])  # all processes do the same kind of step
        draw = kind_rng.random()
        rollouts = self.rollout_share if step >= self.rollout_from else 0.0
        if draw < self.first_block_share:
            kind, count = "first block", self.first_block_batch
        else:
            kind = "rollout" if draw < self.first_block_share + rollouts else "teacher forcing"
            count = self.batch_size
        rng = np.random.default_rng([seed, step, 1 + process])
        torch.manual_seed(int(rng.integers(2**62)))
        clips = self.first_blocks if kind == "first block" else self.clips
        pool = np.flatnonzero(~clips.late.numpy()) if kind == "rollout" else len(clips)
        return self._prepare(clips, torch.from_numpy(rng.choice(pool, count, replace=False)), kind, rng)

    def _prepare(
        self, clips: Clips, index: torch.Tensor, kind: str, rng: np.random.Generator
    ) -> dict[str, Any]:
        latents = clips.latents[index].float().transpose(1, 2)  # B C F H W
        labels, late = clips.labels[index], clips.late[index]
        blocks = 1 if kind == "first block" else BLOCKS
        labels = labels[:, :blocks]
        prompts = []
        for row in labels.tolist():
            said: dict[tuple[int, ...], str] = {}
            prompts += [
                said.setdefault(tuple(scene), describe(Scene.from_labels(scene), rng)) for scene in row
            ]
        weight = subject_weight(latents[:, :, : blocks * FRAMES_PER_BLOCK], labels, self.mean_latents)
        weight = weight * self._block_mask(labels, late)[:, :, None, None]
        return {
            "kind": kind,
            "latents": latents[:, :, : blocks * FRAMES_PER_BLOCK],
            "scenery": coupled_scenery(clips.scenery[index]),
            "text": self._encode(prompts).unflatten(0, (len(index), blocks)),
            "recached": self._recached_text(labels, rng) if kind == "teacher forcing" else None,
            "weight": weight,
        }

    def _block_mask(self, labels: torch.Tensor, late: torch.Tensor) -> torch.Tensor:
        """Frames with a true window: of late clips the blocks after the gap lack their history. `[B, F]`."""
        mask = torch.ones(labels.shape[:2])
        mask[late, 1:3] = 0
        return mask.repeat_interleave(FRAMES_PER_BLOCK, 1)

    def _recached_text(self, labels: torch.Tensor, rng: np.random.Generator):
        """For a third of the switching clips: from which block the context is told the prompt after the switch."""
        switch = (labels[:, 1:] != labels[:, :-1]).any(-1)
        first = torch.where(switch.any(1), switch.int().argmax(1) + 1, BLOCKS)
        chosen = torch.from_numpy(rng.random(len(labels)) < 1 / 3) & (first < BLOCKS)
        return torch.where(chosen, first, BLOCKS)

    @torch.no_grad()
    def _encode(self, prompts: list[str]) -> torch.Tensor:
        distinct = list(dict.fromkeys(prompts))
        rows = encode_prompts(self.tokenizer, self.text_encoder, distinct, self.transformer.config.text_len)
        return rows[[distinct.index(prompt) for prompt in prompts]]

    # --- losses -----------------------------------------------------------------------------------------------------

    def forward(self, batch: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        kind, target = batch["kind"], batch["latents"]
        if kind == "rollout":
            context, noisy, sigma = self._own_inputs(batch)
        elif kind == "first block":
            context, (noisy, sigma) = None, self._noisy(target, 2 * self.noisy_streams, batch["scenery"])
        else:
            context, (noisy, sigma) = (
                self._noised_context(target),
                self._noisy(target, self.noisy_streams, batch["scenery"]),
            )
        with self._tokens_half_way() as tokens:
            predicted = self._predict(context, noisy, sigma, batch["text"], batch["recached"])
        weight = batch["weight"]
        if batch["recached"] is not None:  # the old blocks saw a prompt from the future
            blocks = torch.arange(BLOCKS)[None] >= batch["recached"][:, None]
            told = blocks | (batch["recached"] == BLOCKS)[:, None]
            weight = weight * told.repeat_interleave(FRAMES_PER_BLOCK, 1)[:, :, None, None]
        error = (predicted.float() - target[:, None]).square().mean(2)  # B S F H W
        level = 1 / (sigma.square() + 0.05)
        loss = (error * level[..., None, None] * weight[:, None]).mean()
        counted = weight.sum((2, 3)) > 0
        told = {f"error_{kind.replace(' ', '_')}": (error.mean((3, 4)) * counted[:, None]).mean().detach()}
        if self.scenery_weight:
            told["scenery"] = self._scenery_loss(tokens[-1], sigma, batch["scenery"])
            loss = loss + self.scenery_weight * told["scenery"]
        return loss, {name: number.detach() for name, number in told.items()}

    @contextmanager
    def _tokens_half_way(self) -> Iterator[list[torch.Tensor]]:
        """The tokens `[B, L, D]` that leave the middle layer, forward by forward."""
        tokens: list[torch.Tensor] = []
        layer = self.transformer.blocks[(len(self.transformer.blocks) - 1) // 2]
        hook = layer.register_forward_hook(lambda _layer, _inputs, output: tokens.append(output))
        try:
            yield tokens
        finally:
            hook.remove()

    def _scenery_loss(
        self, tokens_BLD: torch.Tensor, sigma_BSF: torch.Tensor, scenery_BK: torch.Tensor
    ) -> torch.Tensor:
        """Of the first frames of all noisy streams whose noise names the scenery."""
        rows, columns = self.transformer.token_grid(*self.clips.latents.shape[-2:])
        noisy = tokens_BLD.unflatten(1, (-1, sigma_BSF.shape[2], rows * columns))[:, -sigma_BSF.shape[1] :]
        return self.learnt["scenery_head"](noisy[:, :, 0], scenery_BK, sigma_BSF[:, :, 0] >= COUPLED_SIGMA)

    def _predict(self, context, noisy_BSCFHW, sigma_BSF, text_BNLD, recached):
        """Predicted x0 `[B, S, C, F, H, W]` of all noisy streams in one forward."""
        batch, streams, _, frames, *_ = noisy_BSCFHW.shape
        sequences = noisy_BSCFHW.transpose(1, 2).flatten(2, 3)  # B C (S F) H W
        timestep = 1000 * sigma_BSF.flatten(1)
        said = self.transformer.prompt_kv(text_BNLD)  # once, for all streams
        told = (
            said if recached is None else self.transformer.prompt_kv(self._context_text(text_BNLD, recached))
        )
        parts = [said] * streams
        if context is not None:
            sequences = torch.cat([context, sequences], 2)
            timestep = torch.cat([torch.zeros(batch, frames), timestep], 1)
            parts = [told, *parts]
        blocks = frames // FRAMES_PER_BLOCK
        attention = WindowedAttention(
            self.plans[:blocks],
            streams + (context is not None),
            self.transformer.token_grid(*noisy_BSCFHW.shape[-2:]),
            self.transformer.config.attention_head_dim,
            has_clean=context is not None,
        )
        output = self.transformer(
            sequences, timestep, prompt_kv=_beside(parts, batch), context=attention, return_dict=False
        )[0]
        output = output[:, :, frames if context is not None else 0 :]
        return output.unflatten(2, (streams, frames)).transpose(1, 2)

    def _context_text(self, text_BNLD: torch.Tensor, recached: torch.Tensor) -> torch.Tensor:
        """Text of the clean stream: after a recache the window's blocks, not the sink, carry the new prompt."""
        text = text_BNLD.clone()
        for row, first in enumerate(recached.tolist()):
            if first < BLOCKS:
                text[row, 1:first] = text_BNLD[row, first]
        return text

    def _noised_context(self, latents: torch.Tensor) -> torch.Tensor:
        level = torch.rand(latents.shape[0], 1, 1, 1, 1) * self.context_noise
        level = level * (torch.rand_like(level) < 0.5)
        return (1 - level) * latents + level * torch.randn_like(latents)

    def _noisy(
        self, latents: torch.Tensor, streams: int, scenery: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Noisy copies `[B, S, C, F, H, W]` and their sigmas `[B, S, F]`, one level per block and stream."""
        batch, _, frames, *_ = latents.shape
        levels = torch.tensor(self.scheduler.step_sigmas)
        shape = (batch, streams, frames // FRAMES_PER_BLOCK)
        sigma = levels[torch.randint(len(levels), shape)]
        anywhere = torch.rand(shape)
        shift = self.scheduler.config.shift
        anywhere = shift * anywhere / (1 + (shift - 1) * anywhere)
        sigma = torch.where(torch.rand(shape) < 0.75, sigma, anywhere)
        if shape[2] == 1:  # a first block comes out of pure noise: the hardest of its steps
            sigma = torch.where(torch.rand(shape) < FIRST_STEP_SHARE, torch.ones(shape), sigma)
        sigma = sigma.repeat_interleave(FRAMES_PER_BLOCK, 2)
        noise = torch.randn(batch, streams, *latents.shape[1:])
        noise = couple_noise(noise, scenery, only=sigma[:, :, 0] >= COUPLED_SIGMA)
        mix = sigma[:, :, None, :, None, None]
        return (1 - mix) * latents[:, None] + mix * noise, sigma

    @torch.no_grad()
    def _own_inputs(self, batch: dict[str, Any]):
        """Run the few-step sampler over the clip: the student's own clean context, noisy inputs and their sigmas."""
        latents = batch["latents"]
        shape = latents.shape
        config = self.transformer.config
        cache = ContextCache(
            self.window,
            config.num_layers,
            config.num_attention_heads,
            config.attention_head_dim,
            self.transformer.token_grid(*shape[-2:]),
            (config.in_channels, *shape[-2:]),
            batch=shape[0],
            attention="reference",
        )
        steps = tuple(zip(self.scheduler.steps, self.scheduler.step_sigmas, strict=True))
        everywhere = torch.ones(shape[0], 1, dtype=torch.bool)

        def noise(block: int, step: int, frames: int) -> torch.Tensor:
            draw = torch.randn(shape[0], shape[1], frames, *shape[-2:])
            return (
                couple_noise(draw[:, None], batch["scenery"], everywhere)[:, 0]
                if block == step == 0
                else draw
            )

        def record(index: int, x_t: torch.Tensor, x_0: torch.Tensor) -> None:
            seen.append(x_t)

        own, inputs = [], []
        seen: list[torch.Tensor] = []
        for block in range(BLOCKS):
            seen.clear()
            kv = self.transformer.prompt_kv(batch["text"][:, block])
            plan = cache.planner.plan()
            cache.begin(plan)
            x_0 = few_step_block(
                self.transformer, self.scheduler, steps, plan, kv, cache, noise, on_step=record
            ).float()
            self.transformer(x_0, torch.zeros(shape[0], FRAMES_PER_BLOCK), prompt_kv=kv, context=cache)
            cache.commit(plan, x_0)
            own.append(x_0)
            inputs.append(torch.stack(seen, 1).float())
        noisy = torch.cat(inputs, 3)  # B steps C F H W
        chosen = torch.randperm(len(steps))[: self.noisy_streams]
        sigma = torch.tensor(self.scheduler.step_sigmas)[chosen]
        return torch.cat(own, 2), noisy[:, chosen], sigma[None, :, None].expand(shape[0], -1, shape[2])

    def work(self) -> list[Work]:
        """Of a mean step once rollouts have begun."""
        model, share = self.transformer, self.first_block_share
        rows, columns = model.token_grid(*self.clips.latents.shape[-2:])
        frame, streams = rows * columns, self.noisy_streams
        block, keys = FRAMES_PER_BLOCK * frame, round(mean_window(self.plans) * frame)
        whole = self.batch_size * (1 + streams) * BLOCKS * block
        forwards = BLOCKS * (len(self.scheduler.steps) + 1)
        first = self.first_block_batch * 2 * streams * block
        return [
            Work("first blocks", model, share, first, block, True),
            Work(
                "rollouts without gradient",
                model,
                self.rollout_share * forwards,
                self.batch_size * block,
                keys,
            ),
            Work("clips beside real and own contexts", model, 1 - share, whole, keys, True),
        ]

    # --- validation -------------------------------------------------------------------------------------------------

    def validate(self, output: Path, step: int) -> dict[str, float]:
        """Error of the student's own rollouts on clips not trained on, per block, and a picture of some."""
        clips = self.validation_clips
        index = torch.nonzero(~clips.late)[:24, 0]
        torch.manual_seed(0)
        batch = self._prepare(clips, index, "rollout", np.random.default_rng(0))
        own, _, _ = self._own_inputs(batch)
        error = (own - batch["latents"]).square().mean((0, 1, 3, 4)).unflatten(0, (BLOCKS, -1)).mean(1)
        vae = AutoencoderKLWan.from_pretrained(self.vae_path)
        rows = []
        for i in range(6):
            pair = torch.stack([batch["latents"][i], own[i]])
            pixels = decode(vae, pair, decoder_state(vae), None)[:, :, 8::12]
            rows.append(pixels.permute(1, 0, 3, 2, 4).flatten(3).flatten(1, 2))  # C (2 H) (T W)
        image = ((torch.cat(rows, 1).permute(1, 2, 0) + 1) * 127.5).clamp(0, 255).byte().numpy()
        Image.fromarray(image).save(output / f"step_{step}.png")
        return {f"rollout_error_{b}": round(float(e), 4) for b, e in enumerate(error)}

    def export(self, output: Path) -> None:
        self.transformer.save_pretrained(output / "transformer")
        self.scheduler.save_pretrained(output / "scheduler")


def _select(clips: Clips, mask: torch.Tensor) -> Clips:
    return Clips(clips.latents[mask], clips.labels[mask], clips.scenery[mask], clips.late[mask])


def _beside(parts: list[PromptKV], batch: int) -> PromptKV:
    """Keys and values of several streams of the same clips, one after the other along the frame axis."""

    def join(tensors: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return torch.cat([tensor.unflatten(0, (batch, -1)) for tensor in tensors], 1).flatten(0, 1)

    keys, values = ([join(layer) for layer in zip(*kind, strict=True)] for kind in zip(*parts, strict=True))
    return PromptKV(keys, values)


def _backdrop(labels: torch.Tensor) -> torch.Tensor:
    """One number for ground, sky and weather of scenes `[..., 7]`."""
    names = list(ATTRIBUTES)
    ground, sky, weather = (labels[..., names.index(name)] for name in ("ground", "sky", "weather"))
    return (ground * len(ATTRIBUTES["sky"]) + sky) * len(ATTRIBUTES["weather"]) + weather


def mean_latents(clips: Clips) -> torch.Tensor:
    """Mean latent frame of every backdrop, `[backdrops, C, H, W]`."""
    count = 1 + int(_backdrop(torch.tensor([len(v) - 1 for v in ATTRIBUTES.values()])))
    kind = _backdrop(clips.labels).flatten()
    frames = clips.latents.unflatten(1, (BLOCKS, -1)).float().mean(2).flatten(0, 1)
    total = torch.zeros(count, *frames.shape[1:]).index_add_(0, kind, frames)
    return total / torch.bincount(kind, minlength=count).clamp_min(1)[:, None, None, None]


def subject_weight(
    latents_BCFHW: torch.Tensor, labels_BN7: torch.Tensor, means: torch.Tensor
) -> torch.Tensor:
    """Loss weight `[B, F, H, W]`: what deviates from the mean picture of its backdrop (the subject) counts up to 4 times."""
    mean = means[_backdrop(labels_BN7)].repeat_interleave(FRAMES_PER_BLOCK, 1)  # B F C H W
    deviation = (latents_BCFHW.transpose(1, 2) - mean).abs().mean(2)
    return 0.4 + 0.6 * (deviation / deviation.mean((1, 2, 3), keepdim=True)).clamp_max(6)
