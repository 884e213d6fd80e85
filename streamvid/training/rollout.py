"""Rollouts for training: the very stream that inference runs, with gradient in chosen forwards (Self Forcing, section 3.2).

A `RolloutStream` is a `VideoStream`: planner, cache, sinks, samplers, prompt switches and noise are those of inference, so
with the last step as the exit step its latents are those of `pipe.stream(...)`, bit for bit. Where the stream expects its
transformer stands a `GradientTap`: forwards run without gradient, chosen ones with it, and the stream goes on with the
detached output. What a chosen forward predicted is kept for the loss.

A graded forward attends a copy of the window (`GradedContext`). So its gradient stays right when the cache moves on before
the backward, also under gradient checkpointing, which runs the forward again; and nothing flows into finished blocks, as the
papers describe it. With `straight_through` something does: the gradient by a finished block's (clean) keys and values goes
into those of its own graded (noisy) forward, as in the releases, whose cache was never detached.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, fields
from types import SimpleNamespace
from typing import Any

import torch

from streamvid.context import ContextCache
from streamvid.errors import UserError
from streamvid.methods import Method
from streamvid.noise import NoiseSource
from streamvid.rope import rotate, rotation
from streamvid.sampler import BlockInputs, Steps, levels
from streamvid.schedule import FewStepFlowScheduler
from streamvid.stream import PromptChange, VideoStream
from streamvid.transformer import CausalWanTransformer3DModel, PromptKV
from streamvid.window import NO_POSITION

Encode = Callable[[Sequence[str]], torch.Tensor]
KeyValue = tuple[torch.Tensor, torch.Tensor]


class GradedContext:
    """One forward of a block against a copy of its window (`AttentionContext`): may be run again at any later time.

    Args:
        cache: on which `begin` was called for this forward; the forward writes to it what it would write in inference.
        past: per layer, keys before rotation and values of finished frames, with the graph of the forward that made them:
            gradient by the window's keys and values of these frames goes there (straight-through).
    """

    def __init__(self, cache: ContextCache, past: Sequence[dict[int, KeyValue]] = ()):
        if cache.in_place:
            raise UserError("attention backend = triton has no gradient: choose another, or auto")
        self.cache, self.past = cache, past
        self.then = copy(cache)  # with what `begin` made for this forward; the next `begin` makes new ones
        self.plan = cache._plan
        self.places = {}  # where finished frames lie, for straight-through
        fused = cache.options.sink if cache.options.fuse else 0  # averages are no one frame's
        for slot in self.plan.window[fused:]:
            if slot.position is not NO_POSITION and slot not in self.plan.own:
                self.places[slot.frame] = (slot.slot, cache.rotated_at[slot.frame])
        self.window: dict[int, KeyValue] = {}  # layer -> copy of keys and values
        self.written: dict[
            int, list[tuple[slice, slice]]
        ] = {}  # layer -> where this forward's own are among them
        self.made: dict[int, KeyValue] = {}  # layer -> this block's keys before rotation, and values

    def attend(
        self, layer: int, q_BLHD: torch.Tensor, k_BLHD: torch.Tensor, v_BLHD: torch.Tensor
    ) -> torch.Tensor:
        if layer not in self.window:
            self.written[layer] = self.cache.runs(layer)
            with torch.no_grad():
                _, keys, values = self.cache.write(layer, q_BLHD, k_BLHD, v_BLHD)
            self.window[layer] = keys.clone(), values.clone()
            self.made[layer] = k_BLHD, v_BLHD
        query, key = rotate(q_BLHD, self.then._query_rotation), rotate(k_BLHD, self.then._rotation)
        keys, values = (tensor.clone() for tensor in self.window[layer])
        for source, target in self.written[layer]:
            keys[:, target] = key[:, source].to(keys.dtype)
            values[:, target] = v_BLHD[:, source].to(values.dtype)
        for frame, (k, v) in self.past[layer].items() if self.past else ():
            if frame in self.places:
                slot, position = self.places[frame]
                by = rotation(
                    [position], *self.cache.grid, self.cache.head_dim, k.device, self.cache.temporal
                )
                span = self.cache._span(slot)
                for window, graph in ((keys, rotate(k, by)), (values, v)):
                    window[:, span] = window[:, span] + (graph - graph.detach()).to(window.dtype)
        return self.then.attention(*self.then.seen(query, keys, values), self.then._mask)


@dataclass(frozen=True)
class KeptForward:
    """A forward for the loss: the frames it made, its noisy input and timesteps `[B, F]`, and what it predicted."""

    frames: tuple[int, ...]
    x_t: torch.Tensor
    timestep: torch.Tensor
    output: torch.Tensor


class GradientTap:
    """Stands for the transformer in a stream and decides which of its forwards carry gradient.

    Args:
        model: the transformer.
        straight_through: see the module's docstring.

    Attributes:
        calls: denoising forwards since the count was last set to 0.
        chosen: whether the forward of this number is kept.
        gradient: whether kept forwards carry gradient.
        kept: what such forwards made, in order.
        passing: during a context pass.
    """

    def __init__(self, model: CausalWanTransformer3DModel, straight_through: bool = False):
        self.model, self.straight_through = model, straight_through
        self.calls, self.passing, self.gradient = 0, False, True
        self.chosen: Callable[[int], bool] = set().__contains__
        self.kept: list[KeptForward] = []
        self.past: list[dict[int, KeyValue]] = [{} for _ in range(model.config.num_layers)]
        self._told: list[tuple[PromptKV, torch.Tensor]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def prompt_kv(self, text_BLD: torch.Tensor) -> PromptKV:
        prompt_kv = self.model.prompt_kv(text_BLD)
        self._told = [*self._told[-1:], (prompt_kv, text_BLD)]
        return prompt_kv

    def __call__(self, hidden_states, timestep, prompt_kv, context, return_dict=True, **options):
        call = self.calls
        self.calls += not self.passing
        if self.passing or not self.chosen(call):
            return self.model(
                hidden_states,
                timestep,
                prompt_kv=prompt_kv,
                context=context,
                return_dict=return_dict,
                **options,
            )
        if self.gradient:
            text = next(text for known, text in self._told if known is prompt_kv)
            window = GradedContext(context, self.past if self.straight_through else ())
            with torch.enable_grad():
                # the prompt's keys and values again, so that their projections learn
                prompt_kv = self.model.prompt_kv(text)
                output = self.model(
                    hidden_states, timestep, prompt_kv=prompt_kv, context=window, return_dict=False
                )[0]
                if self.straight_through:
                    self._keep(window)
        else:
            output = self.model(
                hidden_states, timestep, prompt_kv=prompt_kv, context=context, return_dict=False
            )[0]
        self.kept.append(KeptForward(context._plan.frames, hidden_states, timestep.clone(), output))
        return (output.detach(),)

    def _keep(self, window: GradedContext) -> None:
        tokens = window.cache.tokens_per_frame
        for layer, pair in window.made.items():
            for index, frame in enumerate(window.plan.frames):
                k, v = (t[:, index * tokens : (index + 1) * tokens] for t in pair)
                self.past[layer][frame] = (k, v)

    def forget(self) -> None:
        """Drop all graphs."""
        self.kept = []
        self.past = [{} for _ in self.past]


class _TappedInputs(BlockInputs):
    """Context passes go past the tap: they never carry gradient and do not count."""

    def context_pass(self, latents_BCFHW: torch.Tensor) -> None:
        tap: Any = self.transformer
        tap.passing = True
        super().context_pass(latents_BCFHW)
        tap.passing = False


@dataclass(frozen=True)
class Rolled:
    """Blocks rolled out together.

    Attributes:
        latents: x0 `[B, C, F, H, W]` for the loss: with gradient where `graded` (`[F]`, boolean).
        first_frame: of the stream.
        timestep: `[B, F]`, of the forward that predicted each frame.
    """

    latents: torch.Tensor
    graded: torch.Tensor
    first_frame: int
    timestep: torch.Tensor


class RolloutStream(VideoStream):
    """A stream of training: `roll` makes its next blocks with gradient.

    Args:
        model, scheduler: of the student.
        encode: prompts to embeddings `[B, text length, D]`.
        method: how blocks are made.
        prompts: one per video.
        latent_size: latent rows and columns.
        noise: noise source.
        blocks: length of the stream, where it is known.
        straight_through: see the module's docstring.
    """

    def __init__(
        self,
        model: CausalWanTransformer3DModel,
        scheduler: FewStepFlowScheduler,
        encode: Encode,
        method: Method,
        prompts: Sequence[str],
        latent_size: tuple[int, int],
        noise: NoiseSource,
        blocks: int | None = None,
        straight_through: bool = False,
        attention: str = "auto",
    ):
        self.tap = GradientTap(model, straight_through)
        pipe: Any = SimpleNamespace(
            transformer=self.tap,
            scheduler=scheduler,
            decoder=SimpleNamespace(_cached_conv_counts={"decoder": 0}),  # nothing is decoded here
            encode_prompt=encode,
            check_prompts=lambda prompt: (prompt,) if isinstance(prompt, str) else tuple(prompt),
            temporal_ratio=4,
        )
        self.exit_step: int | None = None
        first = PromptChange(tuple(prompts))
        super().__init__(
            pipe,
            method,
            first,
            latent_size,
            noise,
            16.0,
            None,
            blocks,
            attention,
            decode_pixels=False,
            context_pass="separate",
        )
        self.times = None  # weights change

    def _inputs(self, state, prompt_kv) -> BlockInputs:
        inputs = super()._inputs(state, prompt_kv)
        values: Any = {f.name: getattr(inputs, f.name) for f in fields(BlockInputs)}
        return _TappedInputs(**{**values, "exit_step": self.exit_step})

    def roll(self, exit_steps: Sequence[int], graded_blocks: int) -> Rolled:
        """The next blocks, as many as there are exit steps: each block's x0 is taken after the step of that index.

        Args:
            graded_blocks: the last so many carry gradient.
        """
        assert self.method.sampler == "few_step", "a window of joint blocks is rolled by `roll_windows`"
        blocks = len(exit_steps)
        first_frame, latents, times = self.cache.planner.next_frame, [], []
        self.tap.gradient = True
        for index, step in enumerate(exit_steps):
            with_gradient = index >= blocks - graded_blocks
            # a first block may have other levels (`first_denoising_steps`): the last step stays the last
            own_levels = self._levels()
            last = len(own_levels) - 1
            step = last if step == len(self.steps) - 1 else min(step, last)
            self.exit_step, self.tap.calls, self.tap.kept = step, 0, []
            self.tap.chosen = {step}.__contains__ if with_gradient else set().__contains__
            chunk = next(self)
            latents.append(self._x0(self.tap.kept[0]) if with_gradient else chunk.latents)
            shape = chunk.latents.shape[0], chunk.latents.shape[2]
            times.append(torch.full(shape, own_levels[step][0], device=chunk.latents.device))
        self._rest()
        graded = (
            torch.arange(blocks).repeat_interleave(self.method.frames_per_block) >= blocks - graded_blocks
        )
        return Rolled(torch.cat(latents, 2), graded, first_frame, torch.cat(times, 1))

    def roll_windows(self, offset: int, gradient: bool = True) -> Rolled:
        """The whole stream by its rolling sampler, for the loss by windows that do not overlap (Rolling Forcing).

        Window w counts where `w` modulo the number of levels is `offset`: together these windows hold every block exactly
        once, each at the level it has there.
        """
        assert self.method.sampler == "rolling" and self.blocks is not None
        joint = self.cache.options.joint_blocks * self.method.micro_steps
        self.tap.calls, self.tap.gradient = 0, gradient
        self.tap.chosen = lambda call: call % joint == offset
        while self.block < self.blocks:
            next(self)
        found = {}
        for forward in self.tap.kept:
            x_0 = self._x0(forward)
            for index, frame in enumerate(forward.frames):
                found[frame] = (x_0[:, :, index], forward.timestep[:, index])
        self._rest()
        latents = torch.stack([found[frame][0] for frame in sorted(found)], 2)
        times = torch.stack([found[frame][1] for frame in sorted(found)], 1)
        return Rolled(latents, torch.full((len(found),), gradient), 0, times)

    def _first_levels(self) -> Steps:
        first = self.method.first_denoising_steps
        return levels(self.pipe.scheduler, first, self.method.solver) if first else ()

    def _levels(self) -> Steps:
        """Of the next block."""
        planner = self.cache.planner
        return (planner.next_frame == planner.scene_start and self._first_levels()) or self.steps

    def _x0(self, forward: KeptForward) -> torch.Tensor:
        wide = torch.float32 if forward.x_t.device.type == "mps" else torch.float64
        sigma = torch.zeros_like(forward.timestep, dtype=wide)
        for timestep, level in (*self._first_levels(), *self.steps):
            sigma = torch.where(forward.timestep == timestep, level, sigma)
        return self.pipe.scheduler.x0_from_output(forward.output, forward.x_t, sigma[:, None, :, None, None])

    def _rest(self) -> None:
        """Between calls of `roll` nothing holds a graph."""
        self.tap.forget()
        self.tap.chosen = set().__contains__
