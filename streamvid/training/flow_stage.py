"""Flow matching on real clips: a bidirectional teacher, or a causal student before it is distilled.

    x_t = (1 - sigma) x0 + sigma noise,    loss = weight(t) |flow(x_t, t) - (noise - x0)|^2

`context` says what a block attends (streamvid.training.causal_forward): bidirectional with one timestep per clip; teacher
forcing or diffusion forcing with one per block; a moving buffer (StreamDiT) with noise rising along the window.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from streamvid.errors import UserError
from streamvid.schedule import training_weights
from streamvid.training.causal_forward import CONTEXTS, clip_x0, joint_levels, joint_windows, method_plans
from streamvid.training.datasets import ClipShards, check_frames
from streamvid.training.dry_run import Work, mean_window
from streamvid.training.error_recycling import ErrorBank, RecyclingOptions
from streamvid.training.model_stage import ModelStage, choose, options

WEIGHTINGS = ("gaussian", "x0", "none")


@dataclass
class FlowOptions:
    """How clips are noised and judged.

    Args:
        context: bidirectional, teacher_forcing, diffusion_forcing or moving_buffer.
        frames: latent frames of a clip.
        weighting: gaussian (the releases' weights of the flow's error), x0 (the error of x0, over sigma^2 + 0.05), none.
        weighted: errors count by the weights that lie beside the clips.
        context_noise: teacher forcing attends a clean clip noised at up to this timestep, and told so.
        unconditional_share: of clips, how many are told `negative_prompt` instead of theirs, for guidance.
        held_out: clips at the end of the set that are only validated on.
    """

    context: str = "bidirectional"
    frames: int = 21
    weighting: str = "gaussian"
    weighted: bool = False
    context_noise: float = 0.0
    unconditional_share: float = 0.1
    negative_prompt: str = ""
    held_out: int = 0


class FlowStage(ModelStage):
    """See the module's docstring.

    Args:
        model: `ModelOptions`; latents: a shard folder of clips, or a list of folders; batch_size: clips per micro-batch.
        flow: `FlowOptions`.
        recycling: `RecyclingOptions`: errors of earlier predictions are put into the clips (teacher forcing).
    """

    def __init__(
        self,
        model: dict[str, Any],
        latents: str | Sequence[str],
        batch_size: int = 1,
        flow: Mapping[str, Any] | None = None,
        recycling: Mapping[str, Any] | None = None,
    ):
        super().__init__(model)
        self.flow = options(FlowOptions, flow, "stage.flow")
        choose(self.flow.context, (*CONTEXTS, "moving_buffer"), "stage.flow.context")
        choose(self.flow.weighting, WEIGHTINGS, "stage.flow.weighting")
        if self.flow.context == "moving_buffer" and self.method.sampler != "rolling":
            raise UserError(
                "stage.flow.context = moving_buffer needs a method with sampler = rolling: "
                "take streamdit or rolling_forcing"
            )
        self.shards, self.batch_size = ClipShards(latents), batch_size
        if self.flow.weighted:
            self.shards.weights([0])
        size = self.method.frames_per_block
        check_frames(self.shards, self.flow.frames, self.latent_shape, size)
        if not 0 < batch_size <= len(self.shards) - self.flow.held_out:
            raise UserError(
                f"stage.batch_size = {batch_size} must be between 1 and the {len(self.shards) - self.flow.held_out} clips "
                f"of {latents} that are not held out"
            )
        self.blocks = self.flow.frames // size
        causal = self.flow.context != "bidirectional"
        self.plans = method_plans(self.method, self.blocks) if causal else None
        self.weights: torch.Tensor
        self.register_buffer("weights", training_weights(self.scheduler.timesteps), persistent=False)
        self.bank = None
        if recycling is not None:
            if self.flow.context != "teacher_forcing":
                raise UserError("stage.recycling needs stage.flow.context = teacher_forcing")
            self.bank = ErrorBank(
                options(RecyclingOptions, recycling, "stage.recycling"), self.latent_shape, size
            )

    def batch(self, seed: int, step: int, process: int) -> dict[str, Any]:
        rng = np.random.default_rng([seed, step, process])
        index = rng.choice(len(self.shards) - self.flow.held_out, self.batch_size, replace=False)
        return self._prepare(index.tolist(), rng)

    def _prepare(self, index: list[int], rng: np.random.Generator) -> dict[str, Any]:
        clips, prompts = self.shards.batch(index)
        x_0 = clips.transpose(1, 2)[:, :, : self.flow.frames]
        drop = rng.random(len(prompts)) < self.flow.unconditional_share
        said = [
            self.flow.negative_prompt if gone else prompt for gone, prompt in zip(drop, prompts, strict=True)
        ]
        timestep, joint = self._timesteps(len(index), rng)
        return {
            "x_0": x_0,
            "weight": self.shards.weights(index)[:, :, : self.flow.frames] if self.flow.weighted else None,
            "prompts": said,
            "timestep": timestep,
            "joint": joint,
            "noise": torch.from_numpy(rng.standard_normal(x_0.shape, np.float32)),
            "context_timestep": float(rng.uniform(0, self.flow.context_noise)),
            "context_noise": torch.from_numpy(rng.standard_normal(x_0.shape, np.float32)),
            "rng": rng,
        }

    def _timesteps(self, count: int, rng: np.random.Generator):
        """`[B, F]`, and the windows of a moving buffer."""
        table = self.scheduler.timesteps
        if self.flow.context == "moving_buffer":
            return self._buffer_timesteps(count, rng)
        groups = 1 if self.flow.context == "bidirectional" else self.blocks
        rows = torch.from_numpy(rng.integers(len(table), size=(count, groups)))
        return table[rows].repeat_interleave(self.flow.frames // groups, 1), None

    def _buffer_timesteps(self, count: int, rng: np.random.Generator):
        """Every block anywhere between two levels of the sampler, as far as its place in the window says."""
        method, size = self.method, self.method.frames_per_block
        levels = self.scheduler.warped(method.denoising_steps or self.scheduler.config.denoising_steps)
        window = method.window_options(len(levels))
        plans = joint_windows(window, self.blocks, int(rng.integers(window.joint_blocks)))
        places = joint_levels(plans, size, window.joint_blocks, self.blocks)
        micro = int(rng.integers(method.micro_steps))
        edges = torch.tensor([*levels, 0.0])
        index = places * method.micro_steps + micro
        share = torch.from_numpy(rng.random((count, 1), np.float32))
        return edges[index] + share * (edges[index + 1] - edges[index]), plans

    def forward(self, batch: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        x_0, noise, timestep = batch["x_0"], batch["noise"], batch["timestep"]
        denoiser, text = self.denoiser, self.encode(batch["prompts"])
        clean, told = None, 0.0
        if self.flow.context in ("teacher_forcing", "moving_buffer"):
            clean = x_0
            if self.flow.context_noise:
                told = batch["context_timestep"]
                level = torch.full_like(timestep, told)
                clean = denoiser.noisy(x_0, batch["context_noise"], level)
        target = x_0
        if self.bank is not None:
            clean, x_0, noise = self.bank.inject(batch["rng"], clean, x_0, noise, timestep)
        x_t = denoiser.noisy(x_0, noise, timestep)
        predicted = clip_x0(denoiser, x_t, timestep, text, self.plans, clean, told, batch["joint"])
        sigma = denoiser.sigma(timestep)
        if self.flow.weighting == "x0":
            error = (predicted.float() - target).square() / (sigma.square() + 0.05)
        else:
            # with errors put in, the flow that leads back to the clean clip
            flow = (x_t - predicted.float()) / sigma
            error = (flow - (x_t - target) / sigma).square()
        if self.flow.weighting == "gaussian":
            weight = self.weights[self.scheduler.nearest_index(timestep)]
            error = error * weight[:, None, :, None, None].to(error)
        if batch["weight"] is not None:
            error = error * batch["weight"]
        if self.bank is not None and self.training:
            self.bank.remember(batch["rng"], predicted.detach().float() - target, sigma, timestep)
        rms = (predicted.detach().float() - target).square().mean()
        return error.mean(), {"x0_error": rms}

    def work(self) -> list[Work]:
        copies = 2 if self.flow.context in ("teacher_forcing", "moving_buffer") else 1
        frame, frames = self.tokens_per_frame, self.flow.frames
        attended = frames if self.plans is None else mean_window(self.plans)
        tokens = self.batch_size * copies * frames * frame
        return [Work("flow of the clips", self.transformer, 1, tokens, round(attended * frame), True)]

    def validate(self, output: Path, step: int) -> dict[str, float]:
        if not self.flow.held_out:
            return {}
        first = len(self.shards) - self.flow.held_out
        losses = []
        for index in range(first, len(self.shards)):
            batch = self._prepare([index], np.random.default_rng([99, index]))
            batch = {k: v.to(self.device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
            losses.append(float(self(batch)[0]))
        return {"held_out_loss": round(sum(losses) / len(losses), 6)}
