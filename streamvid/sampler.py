"""Samplers: how blocks of latents come out of noise.

`few_step_block` is the arithmetic of one block; a `Sampler` says in which order a stream's forwards happen and which
window each of them sees. Siblings of one signature:

| sampler | denoised together | forwards per block | source |
|---|---|---|---|
| few_step | one block, all levels | steps + 1 | Self Forcing, algorithm 2 |
| rolling | levels / micro_steps blocks, each micro_steps levels cleaner than the next | micro_steps + 1 | see below |

With one micro-step the rolling sampler is that of Rolling Forcing (section 3.2), with more StreamDiT's moving buffer. How a
block of the few_step sampler gets from one level to the next is the solver's: `renoise` predicts x0 and adds new noise,
`unipc` adds none. With `recompute` it writes the past's keys anew before a block, and no context pass after it (Krea).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from diffusers import UniPCMultistepScheduler

from streamvid.context import ContextCache
from streamvid.joint_context import JointContext
from streamvid.noise import NoiseSource
from streamvid.schedule import FewStepFlowScheduler
from streamvid.transformer import AttentionContext, CausalWanTransformer3DModel, PromptKV, TimeEmbedding
from streamvid.window import BlockPlan

StepCallback = Callable[[int, torch.Tensor, torch.Tensor], None]
# timesteps and latents after a step -> latents to go on with
StepEnd = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Steps = Sequence[tuple[float, float]]


class TimeTable:
    """Embeddings of the timesteps that a stream meets block after block, each computed once."""

    LIMIT = 64  # a script's shots may have levels of their own

    def __init__(self, transformer: CausalWanTransformer3DModel):
        self.transformer = transformer
        self.known: dict[tuple[int, tuple[float, ...]], TimeEmbedding] = {}

    def __call__(self, batch: int, times: Sequence[float]) -> TimeEmbedding:
        """Of one timestep per frame."""
        key = batch, tuple(times)
        if key not in self.known:
            if len(self.known) >= self.LIMIT:
                self.known.clear()
            timestep = torch.tensor(key[1], device=self.transformer.device).expand(batch, -1)
            self.known[key] = self.transformer.time_embedding(timestep)
        return self.known[key]


def few_step_block(
    transformer: CausalWanTransformer3DModel,
    scheduler: FewStepFlowScheduler,
    steps: Steps,
    plan: BlockPlan,
    prompt_kv: PromptKV,
    context: AttentionContext,
    noise: NoiseSource,
    on_step: StepCallback | None = None,
    solver: str = "renoise",
    exit_step: int | None = None,
    on_step_end: StepEnd | None = None,
    times: TimeTable | None = None,
    joint: JointContext | None = None,
) -> torch.Tensor:
    """Predict x0, go to the next level, repeat (Self Forcing, algorithm 2): clean latents `[B, C, F, H, W]`.

    Args:
        steps: timestep and sigma of every level, descending.
        solver: one of `SOLVERS`.
        context: the stream's cache, on which `begin(plan)` was called.
        on_step: called after every step with its index, the noisy input and the predicted x0.
        exit_step: index of the step after which its x0 is taken for the result (training); None: the last.
        on_step_end: called after every step with its timestep and what the next step starts from, after the last the clean
            latents; its result takes their place.
        times: of the stream; None: timesteps are embedded anew in every forward.
        joint: the first forward takes the context pass of the block before along; `begin(plan)` was called on it.
    """
    last = len(steps) - 1 if exit_step is None else min(exit_step, len(steps) - 1)
    frames = len(plan.own)
    like = {"device": transformer.device, "dtype": transformer.dtype}
    x_t = noise(plan.block, 0, frames).to(**like)
    unipc = UniPC(steps) if solver == "unipc" else None
    for index, (t, sigma) in enumerate(steps[: last + 1]):
        if joint is not None and index == 0:
            output = joint_forward(transformer, joint, x_t, t, prompt_kv, times)
        else:
            timestep = _timestep(transformer, times, x_t.shape[0], [t] * frames)
            output = transformer(x_t, timestep, prompt_kv=prompt_kv, context=context, return_dict=False)[0]
        x_0 = scheduler.x0_from_output(output, x_t, sigma)
        if on_step is not None:
            on_step(index, x_t, x_0)
        if index == last:
            x_t = x_0
        elif unipc is not None:
            x_t = unipc.step(index, x_0, x_t)
        else:
            fresh = noise(plan.block, index + 1, frames).to(**like)
            x_t = scheduler.add_noise(x_0, fresh, steps[index + 1][1])
        if on_step_end is not None:
            x_t = on_step_end(torch.tensor(t), x_t)
    return x_t


def _timestep(transformer, times: TimeTable | None, batch: int, values: list[float]):
    """One timestep per frame, as a forward takes it."""
    if times is not None:
        return times(batch, values)
    return torch.tensor(values, device=transformer.device).repeat(batch, 1)


def joint_forward(
    transformer: CausalWanTransformer3DModel,
    joint: JointContext,
    x_t: torch.Tensor,
    t: float,
    prompt_kv: PromptKV,
    times: TimeTable | None,
) -> torch.Tensor:
    """The prediction for `x_t`, from the forward that also writes the clean keys of the block before."""
    values = [joint.timestep] * joint.frames + [t] * x_t.shape[2]
    both = torch.cat([joint.latents, x_t], 2)
    timestep = _timestep(transformer, times, len(both), values)
    return transformer(
        both,
        timestep,
        prompt_kv=prompt_kv,
        context=joint,
        return_dict=False,
        known_frames=joint.frames,
    )[0]


class UniPC:
    """The flow's path by a predictor-corrector of order 2 (UniPC, Zhao et al. 2023, as LongLive 2 runs it).

    One per block: nothing is remembered between blocks. `diffusers` does the arithmetic (bh2, predicting x0, the first and
    the last step of order 1); the levels are ours.
    """

    def __init__(self, steps: Steps):
        self.scheduler = UniPCMultistepScheduler(
            solver_order=2,
            solver_type="bh2",
            predict_x0=True,
            prediction_type="sample",
            use_flow_sigmas=True,
            lower_order_final=True,
        )
        self.scheduler.set_timesteps(len(steps))
        self.scheduler.timesteps = torch.tensor([t for t, _ in steps])
        self.scheduler.sigmas = torch.tensor([sigma for _, sigma in steps] + [0.0])

    def step(self, index: int, x_0: torch.Tensor, x_t: torch.Tensor) -> torch.Tensor:
        """From level `index` to the next one."""
        return self.scheduler.step(x_0, self.scheduler.timesteps[index], x_t, return_dict=False)[0]


def levels(scheduler: FewStepFlowScheduler, denoising_steps: Sequence[float], solver: str) -> Steps:
    """Timestep and sigma of denoising steps."""
    if solver == "unipc":
        return scheduler.unsnapped(denoising_steps)
    return tuple((t, float(scheduler.sigma(torch.tensor(t)))) for t in scheduler.warped(denoising_steps))


@dataclass(frozen=True)
class BlockInputs:
    """What a sampler works with: the weights, and the state of the stream as it is for this block.

    Attributes:
        blocks: length of the stream where it is known.
        new_scene: this block begins a scene of its own.
        context_timestep: of the context pass.
        exit_step: index of the step after which a block is taken as finished (training); None: the last.
        times: embeddings of timesteps, once computed; None: computed in every forward.
        joint: of the block before, whose context pass the first forward takes along; None: it was made.
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
    exit_step: int | None = None
    times: TimeTable | None = None
    joint: JointContext | None = None

    def context_pass(self, latents_BCFHW: torch.Tensor) -> None:
        """Write the clean keys and values of the planned frames (`cache.begin` was called)."""
        batch, frames = latents_BCFHW.shape[0], latents_BCFHW.shape[2]
        timestep = _timestep(self.transformer, self.times, batch, [self.context_timestep] * frames)
        self.transformer(
            latents_BCFHW, timestep, prompt_kv=self.prompt_kv, context=self.cache, known_frames=frames
        )


class Sampler(Protocol):
    """Makes the blocks of one stream, in order. It changes nothing of itself until `commit`.

    Attributes:
        on_step_end: sees and may change the latents after every forward, of all blocks that are denoised together.
    """

    on_step_end: StepEnd | None

    def denoise(self, inputs: BlockInputs) -> tuple[BlockPlan, torch.Tensor]:
        """The next block: its plan, and its clean latents `[B, C, F, H, W]`."""
        ...

    def context_pass(self, inputs: BlockInputs, plan: BlockPlan, latents_BCFHW: torch.Tensor) -> BlockPlan:
        """Write the block's clean keys and values; returns the plan to commit to the cache."""
        ...

    def commit(self) -> None:
        """The block is finished."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What the next block needs of the last one (streamvid.saving)."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


@dataclass
class FewStepSampler:
    """One block after the other, each through all levels.

    Args:
        solver: one of `SOLVERS`.
        recompute: before a block, the frames that it will attend are written anew from their clean latents, as if they were
            the beginning of a stream; there is no context pass.
        first_steps: levels, before warping, of a block that begins a stream or a scene; None: those of all others.
    """

    solver: str = "renoise"
    recompute: bool = False
    first_steps: tuple[float, ...] | None = None
    on_step_end: StepEnd | None = None

    def denoise(self, inputs: BlockInputs) -> tuple[BlockPlan, torch.Tensor]:
        plan = inputs.cache.planner.plan()
        if self.recompute:
            for past in inputs.cache.planner.recompute(plan):
                inputs.cache.begin(past)
                inputs.context_pass(inputs.cache.clean_latents(past))
        (inputs.joint or inputs.cache).begin(plan)
        begins = plan.own[0].frame == inputs.cache.planner.scene_start
        latents = few_step_block(
            inputs.transformer,
            inputs.scheduler,
            levels(inputs.scheduler, self.first_steps, self.solver)
            if begins and self.first_steps
            else inputs.steps,
            plan,
            inputs.prompt_kv,
            inputs.cache,
            inputs.noise,
            solver=self.solver,
            exit_step=inputs.exit_step,
            on_step_end=self.on_step_end,
            times=inputs.times,
            joint=inputs.joint,
        )
        return plan, latents

    def context_pass(self, inputs: BlockInputs, plan: BlockPlan, latents_BCFHW: torch.Tensor) -> BlockPlan:
        if not self.recompute:
            inputs.context_pass(latents_BCFHW)
        return plan

    def commit(self) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


@dataclass
class RollingSampler:
    """A window of blocks at rising noise levels moves over the stream: one forward takes every block one level down.

    A block enters `micro_steps` forwards after the one before it. The window grows to levels / micro_steps blocks while the
    stream starts, and shrinks where it ends, if that is known; a stream without a known end never shrinks it.

    Args:
        micro_steps: forwards from one finished block to the next (the partition of StreamDiT's buffer; 1: Rolling Forcing).
        released_context: show the context pass the window that Rolling Forcing's release shows it (`context_plan`).
        joint: noisy latents of the blocks in the window after the last finished one, each with its next level.
    """

    micro_steps: int = 1
    released_context: bool = False
    joint: dict[int, tuple[torch.Tensor, int]] = field(default_factory=dict)
    on_step_end: StepEnd | None = None
    _next: dict[int, tuple[torch.Tensor, int]] = field(default_factory=dict)

    def denoise(self, inputs: BlockInputs) -> tuple[BlockPlan, torch.Tensor]:
        planner = inputs.cache.planner
        first, levels = planner.next_block, len(inputs.steps)
        assert levels == planner.options.joint_blocks * self.micro_steps, (
            "a window has one block per micro_steps levels"
        )
        joint = {} if inputs.new_scene else dict(self.joint)
        while True:
            newest = max(joint, default=first - 1)
            room = newest not in joint or joint[newest][1] >= self.micro_steps
            if room and (inputs.blocks is None or newest + 1 < inputs.blocks):
                joint[newest + 1] = (self._fresh(inputs, newest + 1), 0)
            plan, x_0 = self._forward(inputs, joint)
            done = joint[first][1] == levels - 1
            done_levels = torch.tensor([inputs.steps[level][0] for _, level in joint.values()])
            joint = self._renoise(inputs, joint, x_0)
            clean = x_0[:1] if done else []
            if self.on_step_end is not None:
                clean, joint = self._seen(self.on_step_end, done_levels, clean, joint)
            if done:
                self._next = joint
                return plan, clean[0]

    def _seen(self, on_step_end: StepEnd, timesteps: torch.Tensor, clean: list[torch.Tensor], joint):
        """The finished block, if there is one, and those in the making, as `on_step_end` leaves them."""
        blocks = [*clean, *(latents for latents, _ in joint.values())]
        blocks = on_step_end(timesteps, torch.cat(blocks, 2)).split(blocks[0].shape[2], 2)
        making = zip(joint.items(), blocks[len(clean) :], strict=True)
        return list(blocks[: len(clean)]), {
            block: (latents, level) for (block, (_, level)), latents in making
        }

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

    def state_dict(self) -> dict[str, Any]:
        return {"joint": dict(self.joint)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.joint = dict(state["joint"])


SAMPLERS = ("few_step", "rolling")
SOLVERS = ("renoise", "unipc")
