"""What the frames that a block evicts make of a sink of averages (streamvid.sinks): once per block, and only if it is kept.

The cache holds the sink twice: as it is (`raw_keys`, `sink_values`) and as the block will leave it (`fused_keys`,
`fused_values`, `fused_latents`), so that a block that fails can be begun again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from streamvid import sinks
from streamvid.kernels.companions import Meetings
from streamvid.rope import Rotation
from streamvid.window import BlockPlan

if TYPE_CHECKING:
    from streamvid.context import ContextCache


def fuse_evicted(cache: ContextCache, plan: BlockPlan, anchor: float) -> None:
    """Let what the block evicts change the sink, once per block, and write the sink where it is attended."""
    if not plan.fused:
        cache.fused_for = None
    # a block that starts again has overwritten what it evicted
    meet = bool(plan.fused) and cache.fused_for != plan.block
    average, fused = (cache.raw_keys, cache.sink_values), (cache.fused_keys, cache.fused_values)
    meetings = _meetings(cache, plan) if meet else None
    if meet:
        cache.fused_for = plan.block
    elif plan.fused:
        average = fused
    shown = {slot.slot: slot for slot in cache.shown_sink(plan)}
    if not shown and not meet:
        return
    at = {slot.frame: slot.position + anchor for slot in shown.values()}
    cache.rotated_at |= at
    cache.written_at |= at
    sink = range(cache.sink_slots)
    by = cache.turn((at[shown[slot].frame] if slot in shown else 0.0 for slot in sink), anchor)
    placed = [slot in shown for slot in sink]
    cache.companions.fuse_sink(average, meetings, _all_stored(cache), by, placed)


def keep_fused(cache: ContextCache) -> None:
    """The block is finished: the sink is what its evicted frames made of it."""
    if cache.fused_for is None:
        return
    cache.raw_keys, cache.fused_keys = cache.fused_keys, cache.raw_keys
    cache.sink_values, cache.fused_values = cache.fused_values, cache.sink_values
    for rank, latents in cache.fused_latents.items():
        cache.sink_latents[:, rank] = latents
    cache.fused_for, cache.fused_latents = None, {}


def _meetings(cache: ContextCache, plan: BlockPlan) -> Meetings:
    """What the plan evicts, and which of it every sink frame meets."""
    cache.fused_latents.clear()
    kept_frames = cache.planner.live_frames[: cache.options.sink]
    ranks = {cache.planner.slot_of[frame]: rank for rank, frame in enumerate(kept_frames)}
    frame_in = {cache.planner.slot_of[frame]: frame for frame in plan.evicted}
    met = []
    for evicted, sink in plan.fused:
        kept = 0.0 if plan.overwrites else _kept(cache, ranks[sink], frame_in[evicted])
        met.append((sink, evicted, sinks.shares(kept, cache.latents.shape[0])))
    met.sort(key=lambda meeting: meeting[0])  # the order of what one sink frame meets stays
    buffer, place = _all_stored(cache), {slot: slot for slot in frame_in}
    if cache.quantised is not None:
        spans = [cache.quantised.span(slot) for slot in frame_in]
        buffer = torch.cat([keys for keys, _ in spans], 2), torch.cat([values for _, values in spans], 2)
        place = {slot: index for index, slot in enumerate(frame_in)}
    back = cache.turn(cache.rotated_at[frame_in[evicted]] for _, evicted, _ in met)
    return Meetings(
        buffer,
        (cache.fused_keys, cache.fused_values),
        [sum(s < sink for s, *_ in met) for sink in range(cache.sink_slots + 1)],
        [place[evicted] for _, evicted, _ in met],
        torch.stack([shares for *_, shares in met]).to(cache.device),
        Rotation(back.cos, -back.sin),
    )


def _all_stored(cache: ContextCache) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of all layers in one buffer that has the sink's slots first."""
    if cache.quantised is not None:
        return cache.quantised.full[0].flatten(2, 3), cache.quantised.full[1].flatten(2, 3)
    return cache.keys, cache.values


def _kept(cache: ContextCache, rank: int, frame: int) -> float | torch.Tensor:
    """Share of a sink frame that stays when it meets an evicted frame; its latents follow where it is replaced."""
    assert cache.sink_update is not None
    old = cache.fused_latents.get(rank, cache.sink_latents[:, rank])
    new = cache.latents[:, frame % cache.options.window]
    kept = cache.sink_update(sinks.Meeting(rank - cache.options.sink, old, new))
    if isinstance(kept, torch.Tensor):
        cache.fused_latents[rank] = torch.where(kept > 0, old, new)
    return kept
