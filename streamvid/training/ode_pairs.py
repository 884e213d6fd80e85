"""`kind: ode_pairs`: states along a teacher's ODE paths from noise to a clip, for the regression of a few-step student.

A bidirectional teacher starts from prompts alone (CausVid, Self Forcing). A causal teacher starts from real clips: every
block's path runs beside the clean history (Causal-Forcing), and the clip is kept with the states.

Paths are Euler's, on the student's own shifted schedule (the released script made them at shift 8 for a student of shift 5:
its grid and the student's levels did not meet). Kept are the states at the student's levels, the end, and the clean clip.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from streamvid.errors import UserError
from streamvid.models import choose_device
from streamvid.training.causal_forward import clip_x0, method_plans
from streamvid.training.datasets import ClipShards, ShardWriter, batches, check_frames, load_prompts
from streamvid.training.distribution_matching import guided
from streamvid.training.model_stage import Denoiser, ModelStage


class PathMaker(ModelStage):
    """A teacher that writes paths."""

    def __init__(
        self,
        model: dict[str, Any],
        guidance: float,
        negative_prompt: str,
        steps: int,
        levels: Sequence[float],
    ):
        super().__init__(model)
        self.eval().requires_grad_(False)
        self.guidance, self.negative_prompt = guidance, negative_prompt
        wanted = self.scheduler.warped(levels)
        grid = [1000 * (1 - i / steps) for i in range(steps)]
        missing = [level for level in levels if min(abs(level - g) for g in grid) > 0.5]
        if missing:
            raise UserError(
                f"stage.steps = {steps} has no step at the level {missing[0]:g}: give a multiple of {len(levels)}, e.g. 48"
            )
        self.grid = [*self.scheduler.warped(grid), 0.0]
        self.kept = [min(range(steps), key=lambda i: abs(self.grid[i] - t)) for t in wanted]
        self.timesteps = [self.grid[i] for i in self.kept]

    @torch.no_grad()
    def states(self, noise: torch.Tensor, prompts: Sequence[str], plans=None, clean=None) -> torch.Tensor:
        """`[B, levels + 2, C, F, H, W]`: at the kept levels, at the end, and the clean clip (without one: the end again)."""
        denoiser: Denoiser = self.denoiser
        text, nothing = self.encode(prompts), self.encode([self.negative_prompt] * len(prompts))
        x_t, found = noise, []
        for index, (timestep, following) in enumerate(zip(self.grid[:-1], self.grid[1:], strict=True)):
            if index in self.kept:
                found.append(x_t)
            time = torch.full((len(prompts), noise.shape[2]), timestep, device=noise.device)
            x_0 = clip_x0(denoiser, x_t, time, text, plans, clean)
            if self.guidance:
                x_0 = guided(x_0, clip_x0(denoiser, x_t, time, nothing, plans, clean), self.guidance)
            sigma = denoiser.sigma(time)
            after = denoiser.sigma(torch.full_like(time, following)) if following else torch.zeros_like(sigma)
            x_t = x_t + (x_t - x_0) / sigma * (after - sigma)
        return torch.stack([*found, x_t, x_t if clean is None else clean], 1)


def make_ode_pairs(
    model: dict[str, Any],
    output: str,
    prompts: str | None = None,
    latents: str | None = None,
    frames: int = 21,
    levels: Sequence[float] | None = None,
    steps: int = 48,
    guidance: float = 5.0,
    negative_prompt: str = "",
    clips_per_shard: int = 64,
    batch_size: int = 1,
    seed: int = 0,
    device: str = "auto",
    processes: int = 1,
) -> None:
    """Write paths as shards; those that are there are kept, so a killed job goes on.

    Args:
        model: of the teacher (`ModelOptions`).
        prompts: a prompt set, for a bidirectional teacher; latents: clips, for a causal one. Give one of them.
        levels: of the student, before warping; None: those of the schedule.
        steps: of the path; guidance: `c + guidance (c - u)` (5 is a conventional 6).
    """
    if (prompts is None) == (latents is None):
        raise UserError(
            "stage.prompts is for a bidirectional and stage.latents for a causal teacher: give one of them"
        )
    if processes > 1:
        raise UserError("kind = ode_pairs runs in one process: leave --processes out")
    maker = PathMaker(model, guidance, negative_prompt, steps, levels or _levels(model))
    maker.to(choose_device(device))
    clips = None if latents is None else ClipShards(latents)
    rows = clips.prompts if clips is not None else load_prompts(prompts or "")
    told = [row[0] for row in rows]
    plans = None
    if clips is not None:
        check_frames(clips, frames, maker.latent_shape, maker.method.frames_per_block)
        plans = method_plans(maker.method, frames // maker.method.frames_per_block)
    shape = [len(maker.kept) + 2, frames, *maker.latent_shape]
    facts = {"kind": "ode", "causal": clips is not None, "shape": shape, "timesteps": maker.timesteps}
    writer = ShardWriter(output, {**facts, "steps": steps, "guidance": guidance, "seed": seed})
    for shard, indices in enumerate(batches(range(len(told)), clips_per_shard)):
        name = f"paths_{shard:05d}"
        if name in writer:
            continue
        found = []
        for some in batches(indices, batch_size):
            draws = [
                np.random.default_rng([seed, i]).standard_normal((frames, *maker.latent_shape), np.float32)
                for i in some
            ]
            noise = torch.from_numpy(np.stack(draws)).transpose(1, 2).to(maker.device)
            clean = None
            if clips is not None:
                clean = clips.batch(some)[0].transpose(1, 2)[:, :, :frames].to(maker.device)
            found.append(
                maker.states(noise, [told[i] for i in some], plans, clean).transpose(2, 3).half().cpu()
            )
        writer.write(name, torch.cat(found), [[told[i]] for i in indices])
        print(f"{name}: {indices[-1] + 1}/{len(told)} paths", flush=True)


def _levels(model: dict[str, Any]) -> Sequence[float]:
    """Levels of the student's method or schedule."""
    stage = ModelStage(model)
    return stage.method.denoising_steps or stage.scheduler.config.denoising_steps
