"""What a method attends, forward by forward: rows, and rows as text.

    method = load_method("longlive")
    forwards = planned(method, blocks=9, switches={5: "cut"})
    print(format_forwards(forwards))

The rows are recorded from the planner, the samplers and the switch policies that run streams; only the network is missing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, cast

import torch

from streamvid.errors import UserError
from streamvid.methods import Method
from streamvid.sampler import BlockInputs
from streamvid.switching import SwitchPolicy, switch_policy
from streamvid.window import BlockPlan, WindowOptions, WindowPlanner, WindowSlot

MOST_BLOCKS = 1000
MOST_FRAMES = 20_000  # of a stream and of a window, for a table


# --- forwards, as the planner plans them ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Forward:
    """One forward of a stream.

    Attributes:
        kind: block (all steps of a block and its context pass), window and context (of blocks denoised jointly: the joint
            forward, the context pass of the block that it finishes), or replay (at a prompt switch).
        number: of the block, or of the window.
        plan: what it attends.
        sink, pinned: frames of its window that stay when others are evicted.
        stored: frames in the cache that it does not attend.
        fused: (evicted frame, frame of the sink into which it is averaged).
        sources: frames from whose tokens the compressed ones are chosen.
        already: frames' worth of tokens that were compressed before and are chosen from again.
        event, forgotten: the prompt switch right before it, and the frames that the switch took out of the window.
    """

    kind: str
    number: int
    plan: BlockPlan
    sink: tuple[int, ...] = ()
    pinned: tuple[int, ...] = ()
    stored: tuple[int, ...] = ()
    fused: tuple[tuple[int, int], ...] = ()
    sources: tuple[int, ...] = ()
    already: int = 0
    event: str = ""
    forgotten: tuple[int, ...] = ()

    @property
    def compressed(self) -> int:
        """Frames' worth of compressed tokens in the window."""
        return sum(slot.frame < 0 for slot in self.plan.window)


class _Recorder:
    """In the place of a stream's context cache: samplers and switch policies tell it their plans."""

    def __init__(self, options: WindowOptions):
        self.options, self.planner = options, WindowPlanner(options)
        self.forwards: list[Forward] = []
        self.kind, self.windows = "block", 0
        self.sources: tuple[int, ...] = ()
        self.event, self.before = "", set[int]()

    def switch(self, name: str) -> SwitchPolicy:
        """Apply a switch policy; the forwards that it asks for are recorded as replays."""
        policy = switch_policy(name)
        self.event, self.before, self.kind = name, set(self.planner.live_frames), "replay"
        policy.apply(cast(Any, self), lambda plan: None)
        return policy

    def reanchor(self) -> None:
        """The window part of `ContextCache.reanchor`."""
        if self.planner.latest_frames:
            self.planner.reanchor(self.planner.latest_frames)

    def clean_latents(self, plan: BlockPlan) -> torch.Tensor:
        """Latents of nothing."""
        return torch.zeros(1, 1, len(plan.own), 1, 1)

    def begin(self, plan: BlockPlan) -> None:
        """A forward is about to run."""
        planner = self.planner
        frame_in = {slot: frame for frame, slot in planner.slot_of.items()}
        sources = set(self.sources if planner.compressed else ())
        self.sources = tuple(sorted(sources.union(plan.evicted if plan.compressed_from else ())))
        sink_end = planner.sink_start + self.options.sink
        gone = {*plan.attended, *plan.evicted}
        rewritten = plan.own[0].frame in planner.slot_of
        self.forwards.append(
            Forward(
                "replay" if rewritten else self.kind,
                self.windows if self.kind == "window" else plan.block,
                plan,
                sink=tuple(frame for frame in plan.attended if 0 <= frame < sink_end),
                pinned=tuple(frame for frame in planner.pinned if frame in plan.attended),
                stored=tuple(frame for frame in planner.live_frames if frame not in gone),
                fused=tuple((frame_in[evicted], frame_in[sink]) for evicted, sink in plan.fused),
                sources=self.sources,
                already=len(planner.compressed) if plan.compressed_from else 0,
                event=self.event,
                forgotten=tuple(sorted(self.before.difference(planner.live_frames) if self.event else ())),
            )
        )
        self.windows += self.kind == "window"
        self.event = ""


class _Still:
    """Transformer, scheduler and noise of a stream of nothing: what goes in comes out."""

    device, dtype = torch.device("cpu"), torch.float32

    def __call__(self, latents: torch.Tensor, *_, **__) -> tuple[torch.Tensor]:
        return (latents,)

    def x0_from_output(self, output: torch.Tensor, *_) -> torch.Tensor:
        return output

    def add_noise(self, latents: torch.Tensor, *_) -> torch.Tensor:
        return latents

    def noise(self, block: int, step: int, frames: int) -> torch.Tensor:
        return torch.zeros(1, 1, frames, 1, 1)


def planned(
    method: Method, blocks: int, switches: Mapping[int, str] | None = None, levels: int | None = None
) -> list[Forward]:
    """The forwards of a stream that ends after `blocks` blocks.

    Args:
        switches: block before which the prompt changes, and the policy's name.
        levels: denoising steps where the method names none (only the rolling sampler asks).

    Raises:
        UserError: a number is out of range.
    """
    options = window_options(method, levels)
    switches = _checked(switches or {}, blocks, options)
    recorder, still = _Recorder(options), cast(Any, _Still())
    sampler = replace(method, first_denoising_steps=None).new_sampler()  # levels do not matter here
    steps = [(0.0, 0.0)] * options.joint_blocks * method.micro_steps
    for block in range(blocks):
        policy = recorder.switch(switches[block]) if block in switches else None
        new_scene = policy is not None and policy.restarts_decoder
        cache = cast(Any, recorder)
        inputs = BlockInputs(still, still, steps, still, cache, still.noise, blocks, new_scene=new_scene)
        recorder.kind = "window" if options.joint_blocks > 1 else "block"
        plan, latents = sampler.denoise(inputs)
        recorder.kind = "context"
        plan = sampler.context_pass(inputs, plan, latents)
        recorder.planner.commit(plan)
        sampler.commit()
    return recorder.forwards


def window_options(method: Method, levels: int | None) -> WindowOptions:
    """The method's window; `levels` denoising steps count where it names none."""
    return method.window_options(levels if method.denoising_steps is None else None)


def _checked(switches: Mapping[int, str], blocks: int, options: WindowOptions) -> Mapping[int, str]:
    if not 1 <= blocks <= MOST_BLOCKS:
        raise UserError(f"blocks = {blocks} must be between 1 and {MOST_BLOCKS}")
    frames = blocks * options.frames_per_block
    if max(frames, options.slots) > MOST_FRAMES:
        raise UserError(
            f"{blocks} blocks of {options.frames_per_block} latent frames and a window of {options.window} are too many "
            f"for a table: give at most {MOST_FRAMES} frames"
        )
    for block, name in switches.items():
        if not 1 <= block < MOST_BLOCKS:
            raise UserError(
                f"{name} at block {block} is not possible: give a block between 1 and {MOST_BLOCKS - 1}"
            )
        if block >= blocks:
            raise UserError(
                f"{name} at block {block} is after the end: give --blocks of at least {block + 1}"
            )
    return switches


def switches_at(
    cuts: Sequence[int] = (), shots: Sequence[int] = (), others: Mapping[int, str] | None = None
) -> dict[int, str]:
    """Blocks with cuts, with shots and with `others`, as `planned` takes them.

    Raises:
        UserError: a block is named twice.
    """
    switches: dict[int, str] = {}
    named = [
        *((block, "cut") for block in cuts),
        *((block, "shot") for block in shots),
        *(others or {}).items(),
    ]
    for block, name in named:
        if switches.get(block, name) != name:
            raise UserError(f"block {block} has two switches, {switches[block]} and {name}: give one of them")
        switches[block] = name
    return switches


def enough_blocks(options: WindowOptions, switches: Mapping[int, str]) -> int:
    """So many blocks that the last of them show a full window, also after the last switch."""
    filled = -(-options.window // options.frames_per_block)
    return min(max([0, *switches]) + filled + 5, 60 + max([0, *switches]), MOST_BLOCKS)


# --- forwards as text -----------------------------------------------------------------------------------------------


def runs(numbers: Sequence[float]) -> str:
    """Numbers with neighbours drawn together: `0-2, 15-23`; `none` for what has none."""
    texts = []
    for _, group in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        members = ["none" if math.isnan(number) else f"{number:.15g}" for _, number in group]
        texts.append(members[0] if len(members) == 1 else f"{members[0]}-{members[-1]}")
    return ", ".join(texts)


def attended_text(plan: BlockPlan) -> str:
    """Frames of the window in its order, compressed tokens as `top 2 frames`."""
    return _window_text(plan.window, lambda slots: _top(len(slots)), lambda slot: slot.frame)


def positions_text(plan: BlockPlan) -> str:
    """Positions of the window in its order; compressed tokens keep the positions of their frames."""
    return _window_text(plan.window, lambda slots: "theirs", lambda slot: slot.position)


def _window_text(window: Sequence[WindowSlot], tokens, number) -> str:
    parts = []
    for compressed, group in groupby(window, lambda slot: slot.frame < 0):
        slots = list(group)
        parts.append(tokens(slots) if compressed else runs([number(slot) for slot in slots]))
    return ", ".join(parts)


def _top(frames: int) -> str:
    return f"top {frames} frame{'s' * (frames != 1)}"


def changes_text(forward: Forward) -> str:
    """What the forward evicts, averages into the sink or compresses, and which frames are pinned."""
    plan, parts = forward.plan, []
    if forward.kind in ("context", "replay"):
        return ""  # said where the block or the window begins
    if plan.compressed_from:
        sources = ", ".join([_top(forward.already)] * bool(forward.already) + [runs(plan.evicted)])
        parts.append(f"compresses {sources} to {_top(forward.compressed)}")
    elif forward.fused:
        evicted, sink = runs(plan.evicted), runs(sorted({sink for _, sink in forward.fused}))
        parts.append(
            f"evicts {evicted}, overwriting {sink}" if plan.overwrites else f"averages {evicted} into {sink}"
        )
    elif plan.evicted:
        parts.append(f"evicts {runs(plan.evicted)}")
    if forward.pinned:
        parts.append(f"{runs(forward.pinned)} pinned")
    if plan.empty:
        parts.append(f"attends {plan.empty} empty")
    if plan.frozen:
        parts.append(f"{runs(plan.frames[: plan.frozen])} stay as in the first step")
    return "; ".join(parts)


def label(forward: Forward) -> str:
    """The row's name: `4`, or `window 9`, or the kind of a forward between blocks."""
    numbered = {"block": str(forward.number), "window": f"window {forward.number}"}
    return numbered.get(forward.kind, f"  {forward.kind}")


def event_text(forward: Forward) -> str:
    """The prompt switch before the forward."""
    forgotten = f": forgets {runs(forward.forgotten)}" if forward.forgotten else ""
    return f"{forward.event}{forgotten}" if forward.event else ""


def format_forwards(forwards: Sequence[Forward]) -> str:
    """A table of forwards, one line each."""
    joint = any(forward.kind == "window" for forward in forwards)
    table: list[list[str]] = [["forward" if joint else "block", "frames", "attends", "seen at", ""]]
    events: dict[int, str] = {}
    for forward in forwards:
        if forward.event:
            events[len(table)] = f"-- {event_text(forward)}"
        plan = forward.plan
        cells = [label(forward), runs(plan.frames), attended_text(plan), positions_text(plan)]
        table.append([*cells, changes_text(forward)])
    lines = []
    for number, line in enumerate(aligned(table)):
        lines += [*([events[number]] if number in events else []), line]
    return "\n".join(lines)


def heading(method: Method, levels: int | None = None) -> str:
    """What the method is, in two lines."""
    options = window_options(method, levels)
    joint = f"{options.joint_blocks} jointly denoised " if options.joint_blocks > 1 else ""
    budget = f", compressed to {budget_sum(options)} (sink + chosen + recent)" if method.budget else ""
    shots = f", {method.shot_offset} positions skipped at a shot" if method.shot_offset else ""
    shots += f", its first {method.sink} frames pinned" if method.pin_shots else ""
    return (
        f"{method.name}: {method.source}\n"
        f"{joint}blocks of {method.frames_per_block} latent frames, window {window_sum(options)} (sink + recent + block)"
        f"{budget}, positions {method.positions}{shots}, at a prompt switch {method.transition}"
    )


def window_sum(options: WindowOptions) -> str:
    """Window = sink + recent + block(s) being denoised."""
    block = options.frames_per_block * options.joint_blocks
    return f"{options.window} = {options.sink} + {options.window - options.sink - block} + {block}"


def budget_sum(options: WindowOptions) -> str:
    """Budget = sink + frames' worth of chosen tokens + recent, the block among them."""
    if options.budget is None:
        return "-"
    recent = options.whole_frames
    return f"{options.budget} = {options.sink} + {options.budget - options.sink - recent} + {recent}"


def aligned(table: Sequence[Sequence[str]]) -> Iterator[str]:
    """Lines of a table whose cells begin below each other."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
