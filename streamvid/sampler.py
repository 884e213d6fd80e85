"""Samplers: how blocks of latents come out of noise.

`few_step_block` is the arithmetic of one block; a `Sampler` says in which order a stream's forwards happen and which
window each of them sees. Siblings of one signature:

| sampler | denoised together | forwards per block | source |
|---|---|---|---|
| few_step | one block, all levels | steps + 1 | Self Forcing, algorithm 2 |
| rolling | as many blocks as levels, each one level cleaner than the next | 2 | Rolling Forcing, section 3.2 |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from streamvid.context import ContextCache
from streamvid.noise import NoiseSource
from streamvid.schedule import FewStepFlowScheduler
from streamvid.transformer import AttentionContext, CausalWanTransformer3DModel, PromptKV
from streamvid.window import BlockPlan

StepCallback = Callable[[int, torch.Tensor, torch.Tensor], None]
Steps = Sequence[tuple[float, float]]


def few_step_block(
    transformer: CausalWanTransformer3DModel,
    scheduler: FewStepFlowScheduler,
    steps: Steps,
    plan: BlockPlan,
    prompt_kv: PromptKV,
    context: AttentionContext,
    noise: NoiseSource,
    on_step: StepCallback | None = None,
) -> torch.Tensor:
    """Predict x0, re-noise to the next level, repeat (Self Forcing, algorithm 2): clean latents `[B, C, F, H, W]`.

    Args:
        steps: timestep and sigma of every level, descending.
        context: the stream's cache, on which `begin(plan)` was called.
        on_step: called after every step with its index, the noisy input and the predicted x0.
    """
    frames = len(plan.own)
    like = {"device": transformer.device, "dtype": transformer.dtype}
    x_t = noise(plan.block, 0, frames).to(**like)
    timestep = torch.empty(x_t.shape[0], frames, device=transformer.device)
    for index, (t, sigma) in enumerate(steps):
        output = transformer(x_t, timestep.fill_(t), prompt_kv=prompt_kv, context=context, return_dict=False)[
            0
        ]
        x_0 = scheduler.x0_from_output(output, x_t, sigma)
        if on_step is not None:
            on_step(index, x_t, x_0)
        if index + 1 < len(steps):
            x_t = scheduler.add_noise(
                x_0, noise(plan.block, index + 1, frames).to(**like), steps[index + 1][1]
            )
    return x_0


@dataclass(frozen=True)
class BlockInputs:
    """What a sampler works with: the weights, and the state of the stream as it is for this block.

    Attributes:
        blocks: length of the stream where it is known.
        new_scene: this block begins a scene of its own.
        context_timestep: of the context pass.
    """

    transformer: CausalWanTransformer3DModel
    scheduler: FewStepFlowScheduler
    steps: Steps
    prompt_kv: PromptKV
    cache: ContextCache
    noise: NoiseSource
    blocks: int | None = None
    context_timestep: float = 0.0
    new_scene: bool = False

    def context_pass(self, latents_BCFHW: torch.Tensor) -> None:
        """Write the clean keys and values of the planned frames (`cache.begin` was called)."""
        shape = latents_BCFHW.shape[0], latents_BCFHW.shape[2]
        timestep = torch.full(shape, self.context_timestep, device=latents_BCFHW.device)
        self.transformer(latents_BCFHW, timestep, prompt_kv=self.prompt_kv, context=self.cache)


class Sampler(Protocol):
    """Makes the blocks of one stream, in order. It changes nothing of itself until `commit`."""

    def denoise(self, inputs: BlockInputs) -> tuple[BlockPlan, torch.Tensor]:
        """The next block: its plan, and its clean latents `[B, C, F, H, W]`."""
        ...

    def context_pass(self, inputs: BlockInputs, plan: BlockPlan, latents_BCFHW: torch.Tensor) -> BlockPlan:
        """Write the block's clean keys and values; returns the plan to commit to the cache."""
        ...

    def commit(self) -> None:
        """The block is finished."""
        ...


class FewStepSampler:
    """One block after the other, each through all levels."""

    def denoise(self, inputs: BlockInputs) -> tuple[BlockPlan, torch.Tensor]:
        plan = inputs.cache.planner.plan()
        inputs.cache.begin(plan)
        latents = few_step_block(
            inputs.transformer,
            inputs.scheduler,
            inputs.steps,
            plan,
            inputs.prompt_kv,
            inputs.cache,
            inputs.noise,
        )
        return plan, latents

    def context_pass(self, inputs: BlockInputs, plan: BlockPlan, latents_BCFHW: torch.Tensor) -> BlockPlan:
        inputs.context_pass(latents_BCFHW)
        return plan

    def commit(self) -> None:
        pass


@dataclass
class RollingSampler:
    """A window of blocks at rising noise levels moves over the stream: one forward takes every block one level down.

    The window grows to as many blocks as there are levels while the stream starts, and shrinks where it ends, if that is
    known; a stream without a known end never shrinks it.

    Args:
        released_context: show the context pass the window that Rolling Forcing's release shows it (`context_plan`).
        joint: noisy latents of the blocks in the window after the last finished one, each with its next level.
    """

    released_context: bool = False
    joint: dict[int, tuple[torch.Tensor, int]] = field(default_factory=dict)
    _next: dict[int, tuple[torch.Tensor, int]] = field(default_factory=dict)

    def denoise(self, inputs: BlockInputs) -> tuple[BlockPlan, torch.Tensor]:
        planner = inputs.cache.planner
        first, levels = planner.next_block, len(inputs.steps)
        assert levels == planner.options.joint_blocks, "a window has one block per level"
        joint = {} if inputs.new_scene else dict(self.joint)
        while True:
            newest = max(joint, default=first - 1) + 1
            if inputs.blocks is None or newest < inputs.blocks:
                joint[newest] = (self._fresh(inputs, newest), 0)
            plan, x_0 = self._forward(inputs, joint)
            done = joint[first][1] == levels - 1
            joint = self._renoise(inputs, joint, x_0)
            if done:
                self._next = joint
                return plan, x_0[0]

    def _fresh(self, inputs: BlockInputs, block: int) -> torch.Tensor:
        transformer = inputs.transformer
        count = inputs.cache.options.frames_per_block
        return inputs.noise(block, 0, count).to(device=transformer.device, dtype=transformer.dtype)

    def _forward(self, inputs: BlockInputs, joint) -> tuple[BlockPlan, list[torch.Tensor]]:
        """One forward over the window: predicted x0 of its blocks."""
        count = inputs.cache.options.frames_per_block
        plan = inputs.cache.planner.plan(count * len(joint))
        inputs.cache.begin(plan)
        x_t = torch.cat([latents for latents, _ in joint.values()], 2)
        t, sigma = (
            torch.tensor([inputs.steps[level][part] for _, level in joint.values()], device=x_t.device)
            for part in (0, 1)
        )
        timestep = t.repeat_interleave(count).expand(x_t.shape[0], -1)
        output = inputs.transformer(
            x_t, timestep, prompt_kv=inputs.prompt_kv, context=inputs.cache, return_dict=False
        )[0]
        sigma_BF = sigma.repeat_interleave(count).expand(x_t.shape[0], -1)
        x_0 = inputs.scheduler.x0_from_output(output, x_t, sigma_BF[:, None, :, None, None])
        return plan, list(x_0.split(count, 2))

    def _renoise(self, inputs: BlockInputs, joint, x_0: list[torch.Tensor]):
        """The window's unfinished blocks at their next levels."""
        following = {}
        for (block, (_, level)), clean in zip(joint.items(), x_0, strict=True):
            if level + 1 < len(inputs.steps):
                draw = inputs.noise(block, level + 1, clean.shape[2]).to(clean)
                following[block] = (
                    inputs.scheduler.add_noise(clean, draw, inputs.steps[level + 1][1]),
                    level + 1,
                )
        return following

    def context_pass(self, inputs: BlockInputs, plan: BlockPlan, latents_BCFHW: torch.Tensor) -> BlockPlan:
        first = inputs.cache.planner.context_plan(plan, self.released_context)
        inputs.cache.begin(first)
        inputs.context_pass(latents_BCFHW)
        return first

    def commit(self) -> None:
        self.joint = self._next


def sampler_named(name: str, released_context: bool = False) -> Sampler:
    """A new sampler for one stream, one of `SAMPLERS`."""
    return RollingSampler(released_context) if name == "rolling" else FewStepSampler()


SAMPLERS = ("few_step", "rolling")
