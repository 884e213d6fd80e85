"""What attention is told of a window's keys, once per block and from plain numbers: which count, how much, turned how far.

`key_weights` says what weighs differently. `key_mask` tells it to backends that attend the front of one buffer,
`plan_parts` to the windowed-attention kernel (streamvid.kernels.windowed), which reads every buffer where it lies.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch

from streamvid.kernels.windowed import Part
from streamvid.rope import Rotation
from streamvid.window import BlockPlan


def key_weights(
    plan: BlockPlan,
    past_bias: float = 1.0,
    trained_frames: int | None = None,
    far_decay: float = 1.0,
    far_scale: float = 1.0,
) -> tuple[dict[int, float], dict[int, float]]:
    """What is added to the scores of slots, and what multiplies them; arguments as of `ContextCache`."""
    bias: dict[int, float] = {}
    if past_bias != 1.0:
        bias = {slot.slot: math.log(past_bias) for slot in plan.window[1:] if slot not in plan.own}
    far = []  # compressed tokens are nowhere
    if trained_frames is not None:
        nearest = plan.own[-1].position - trained_frames
        far = [slot.slot for slot in plan.window if slot.position <= nearest]
    if far_decay != 1.0:
        bias |= {slot: bias.get(slot, 0.0) + math.log(far_decay) for slot in far}
    return bias, dict.fromkeys(far, far_scale) if far_scale != 1.0 else {}


def key_mask(
    plan: BlockPlan,
    bias: Mapping[int, float],
    gain: Mapping[int, float],
    frame_tokens: int,
    dtype: torch.dtype,
    device: torch.device | str,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Mask or bias `[L]` of the buffer's front and of empty frames behind it, and scale `[L, 1, 1]` of the front's keys."""
    attended = sorted(slot.slot for slot in plan.window)
    front = attended[-1] + 1
    mask = scale = None
    if gain:  # a scaled key scales its scores
        scale = torch.tensor([gain.get(slot, 1.0) for slot in range(front)]).to(device, dtype)
        scale = scale.repeat_interleave(frame_tokens)[:, None, None]
    if bias:
        added = torch.full((front,), float("-inf"), dtype=dtype, device=device)
        added[attended] = torch.tensor([bias.get(slot, 0.0) for slot in attended]).to(added)
        mask = added.repeat_interleave(frame_tokens)
    elif len(attended) < front:
        alive = torch.zeros(front, dtype=torch.bool, device=device)
        alive[attended] = True
        mask = alive.repeat_interleave(frame_tokens)
    if mask is not None and plan.empty:
        mask = torch.cat([mask, torch.full((plan.empty * frame_tokens,), not bias).to(mask)])
    return mask, scale


class Seen(NamedTuple):
    """A frame as a block attends it.

    Attributes:
        buffer, place: where its keys and values are: name of a buffer, and which of its frames.
        bias, gain: what is added to its scores, and what multiplies them before.
        turn: turns its keys on load: one row for all of its tokens, or one each; None: they are not turned.
    """

    buffer: str
    place: int
    bias: float = 0.0
    gain: float = 1.0
    turn: Rotation | None = None


class PlannedPart(NamedTuple):
    """Name of a buffer, and all of `Part` but its keys, values and their scales."""

    buffer: str
    facts: dict[str, Any]

    def of(self, keys: torch.Tensor, values: torch.Tensor, k_scale=None, v_scale=None) -> Part:
        """Of the buffer's tensors in one layer."""
        return Part(keys, values, **self.facts, k_scale=k_scale, v_scale=v_scale)


def plan_parts(seen: Sequence[Seen], frame_tokens: int, device: torch.device | str) -> list[PlannedPart]:
    """One part per buffer; keys that are turned are a part of their own, so that others need not be."""

    def kind(frame: Seen) -> tuple[str, int]:
        return frame.buffer, 0 if frame.turn is None else len(frame.turn.cos)

    parts = []
    ordered = sorted(seen, key=lambda frame: (*kind(frame), frame.place))
    for (buffer, rows), group in groupby(ordered, key=kind):
        at = {frame.place: frame for frame in group}
        frames = [at.get(place, Seen(buffer, place)) for place in range(max(at) + 1)]
        tokens = 1 if rows > 1 else frame_tokens  # of what turns by one angle: a frame of the part
        repeats = frame_tokens // tokens
        runs = [[run.start, run.stop - run.start] for _, run in contiguous_runs(sorted(at), frame_tokens)]
        facts: dict[str, Any] = {
            "runs": torch.tensor(runs, dtype=torch.int32, device=device),
            "frame_tokens": tokens,
        }
        for name, neutral in (("bias", 0.0), ("gain", 1.0)):
            numbers = [getattr(frame, name) for frame in frames]
            if any(number != neutral for number in numbers):
                of_frames = torch.tensor(numbers, dtype=torch.float32, device=device)
                facts[name] = of_frames.repeat_interleave(repeats)
        if rows:
            nothing = Rotation(*(torch.zeros_like(x) for x in next(iter(at.values())).turn or ()))
            turns = [frame.turn or nothing for frame in frames]
            facts["phase"] = Rotation(*(torch.cat(each) for each in zip(*turns, strict=True)))
        parts.append(PlannedPart(buffer, facts))
    return parts


def contiguous_runs(slots: Sequence[int], tokens_per_frame: int, first: int = 0) -> list[tuple[slice, slice]]:
    """Token slices (in the block, in the buffer) of runs of neighbouring slots: usually one, two where the ring wraps.

    The block's frames before `first` are left out.
    """
    runs: list[list[int]] = []
    for slot in slots[first:]:
        if runs and slot == runs[-1][-1] + 1:
            runs[-1].append(slot)
        else:
            runs.append([slot])
    pieces, start = [], first * tokens_per_frame
    for run in runs:
        length = len(run) * tokens_per_frame
        first = run[0] * tokens_per_frame
        pieces.append((slice(start, start + length), slice(first, first + length)))
        start += length
    return pieces
