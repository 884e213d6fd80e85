"""Few-step initialisation: a causal student learns to predict x0 at the levels of its sampler, before any distillation.

- `ode`: regression onto the end of a teacher's ODE paths (`streamvid.training.ode_pairs`). Every block is shown the path's
  state at one of the student's levels, drawn at random (CausVid). Where the paths were made with clean history, by a causal
  teacher (Causal-Forcing), blocks attend that history; else the noisy states of the blocks before them.
- `consistency`: no paths, but real clips. A guided Euler step of the causal teacher leads from one level of a fine grid to
  the next, where an average of the student says what the student shall say here (causal consistency distillation).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from streamvid.errors import UserError
from streamvid.training.causal_forward import clip_x0, method_plans
from streamvid.training.datasets import ClipShards, check_frames
from streamvid.training.distribution_matching import guided
from streamvid.training.dry_run import Work, mean_window
from streamvid.training.model_stage import (
    Denoiser,
    ModelStage,
    choose,
    frozen,
    load_denoiser,
    options,
    trainable_copy,
)

TARGETS = ("ode", "consistency")


@dataclass
class FewStepOptions:
    """What the student is shown.

    Args:
        target: ode or consistency.
        frames: latent frames of a clip.
        grid: consistency: levels between noise and data.
        guidance: consistency: of the teacher's step, `c + guidance (c - u)`.
        negative_prompt: of the unconditional prediction.
        target_ema: consistency: decay of the average that gives the targets.
        weighted: consistency: errors count by the weights that lie beside the clips.
    """

    target: str = "ode"
    frames: int = 21
    grid: int = 48
    guidance: float = 2.0
    negative_prompt: str = ""
    target_ema: float = 0.95
    weighted: bool = False


class FewStepStage(ModelStage):
    """See the module's docstring.

    Args:
        model: `ModelOptions`.
        data: a shard folder: of ODE paths, or of latents for consistency.
        batch_size: clips per micro-batch.
        few_step: `FewStepOptions`.
        teacher: consistency: folder and weights of the causal teacher; None: the weights that the student starts from.
    """

    def __init__(
        self,
        model: dict[str, Any],
        data: str,
        batch_size: int = 1,
        few_step: Mapping[str, Any] | None = None,
        teacher: Mapping[str, str] | None = None,
    ):
        super().__init__(model)
        self.few_step = options(FewStepOptions, few_step, "stage.few_step")
        choose(self.few_step.target, TARGETS, "stage.few_step.target")
        self.by_paths = self.few_step.target == "ode"
        self.shards, self.batch_size = ClipShards(data, "ode" if self.by_paths else "latents"), batch_size
        check_frames(self.shards, self.few_step.frames, self.latent_shape, self.method.frames_per_block)
        if self.few_step.weighted and self.by_paths:
            raise UserError("stage.few_step.weighted is for target = consistency: leave it out")
        if self.few_step.weighted:
            self.shards.weights([0])
        if not 0 < batch_size <= len(self.shards):
            raise UserError(
                f"stage.batch_size = {batch_size} must be between 1 and the {len(self.shards)} clips of {data}"
            )
        self.blocks = self.few_step.frames // self.method.frames_per_block
        self.plans = method_plans(self.method, self.blocks)
        if self.by_paths:
            self.path_timesteps = torch.tensor(self.shards.manifest["timesteps"])
            self.causal_paths = bool(self.shards.manifest["causal"])
        else:
            own = {name: getattr(self.options, name) for name in ("folder", "weights", "attention")}
            source: dict[str, Any] = {**own, **(teacher or {})}
            self.teacher: Denoiser = frozen(load_denoiser(**source), self.frozen_dtype)
            self.target: Denoiser = frozen(trainable_copy(self.denoiser))

    def train(self, mode: bool = True):
        super().train(mode)
        if not self.by_paths:
            self.teacher.eval()
            self.target.eval()
        return self

    def batch(self, seed: int, step: int, process: int) -> dict[str, Any]:
        rng = np.random.default_rng([seed, step, process])
        index = rng.choice(len(self.shards), self.batch_size, replace=False).tolist()
        clips, prompts = self.shards.batch(index)
        clips = clips.transpose(-4, -3)[..., : self.few_step.frames, :, :]  # B (S) C F H W
        if self.by_paths:
            levels = rng.integers(len(self.path_timesteps), size=(self.batch_size, self.blocks))
        else:
            levels = rng.integers(self.few_step.grid, size=(self.batch_size, self.blocks))
        batch = {"clips": clips, "prompts": prompts, "levels": torch.from_numpy(levels)}
        if not self.by_paths:
            batch["noise"] = torch.from_numpy(rng.standard_normal(clips.shape, np.float32))
        if self.few_step.weighted:
            batch["weight"] = self.shards.weights(index)[:, :, : self.few_step.frames]
        return batch

    def forward(self, batch: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        text = self.encode(batch["prompts"])
        level_BF = batch["levels"].repeat_interleave(self.method.frames_per_block, 1)
        return (self._paths if self.by_paths else self._consistency)(batch, text, level_BF)

    def _paths(self, batch, text, level_BF):
        """Regression onto the ends of paths; states are `[levels..., end, clean]`."""
        states = batch["clips"]  # B S C F H W
        index = level_BF[:, None, None, :, None, None].expand(-1, 1, states.shape[2], -1, *states.shape[4:])
        x_t = states.gather(1, index)[:, 0]
        timestep = self.path_timesteps.to(level_BF.device)[level_BF]
        clean = states[:, -1] if self.causal_paths else None
        predicted = clip_x0(self.denoiser, x_t, timestep, text, self.plans, clean)
        error = (predicted.float() - states[:, -2]).square()
        return error.mean(), {}

    def _consistency(self, batch, text, level_BF):
        clean, options = batch["clips"], self.few_step
        grid = torch.tensor([1000 * (1 - i / options.grid) for i in range(options.grid)])
        grid = torch.tensor([*self.scheduler.warped(grid.tolist()), 0.0], device=level_BF.device)
        timestep, following = grid[level_BF], grid[level_BF + 1]
        x_t = self.denoiser.noisy(clean, batch["noise"], timestep)
        with torch.no_grad():
            nothing = self.encode([options.negative_prompt] * len(text))
            told, untold = (
                clip_x0(self.teacher, x_t, timestep, t, self.plans, clean) for t in (text, nothing)
            )
            sigma = self.teacher.sigma(timestep)
            flow = (x_t - guided(told, untold, options.guidance).float()) / sigma
            end = (following > 0)[:, None, :, None, None]
            next_sigma = torch.where(end, self.teacher.sigma(following), 0.0)
            x_next = x_t + flow * (next_sigma - sigma)
            target = clip_x0(self.target, x_next, following, text, self.plans, clean)
            target = torch.where(end, target.float(), x_next)  # at the end of the grid it is the clip itself
        predicted = clip_x0(self.denoiser, x_t, timestep, text, self.plans, clean)
        error = (predicted.float() - target).square()
        return (error * batch.get("weight", 1.0)).mean(), {}

    def work(self) -> list[Work]:
        clean = not self.by_paths or self.causal_paths
        tokens = self.batch_size * (1 + clean) * self.few_step.frames * self.tokens_per_frame
        keys = round(mean_window(self.plans) * self.tokens_per_frame)
        works = [Work("regression", self.transformer, 1, tokens, keys, True)]
        if not self.by_paths:
            works.append(Work("teacher's step and target", self.target.model, 3, tokens, keys))
        return works

    @torch.no_grad()
    def after_step(self, phase: str) -> None:
        if self.by_paths:
            return
        average = dict(self.target.model.named_parameters())
        for name, parameter in self.transformer.named_parameters():
            average[name].lerp_(parameter.to(average[name]), 1 - self.few_step.target_ema)
