"""How a frame that leaves the window changes the sink: siblings of one signature.

    kept = update(meeting)      # share of the sink frame's keys and values that stays; the evicted frame gives the rest

| `sink_update` | who meets whom | share that stays | paper |
|---|---|---|---|
| static | nobody | | LongLive, section 3.2 |
| ema | the n-th evicted frame, sink frame n modulo sink | `sink_decay` | Reward Forcing, equation 6 |
| ema_release | as released: every eviction from sink frame 0 on | `sink_decay`; 0 where numbers differ | its release |
| memory | every evicted frame, each of the last frames of the sink | `memory_decays`, one per memory frame | MemRoPE |
| adaptive | as ema | 1, or 0 where the two look different | StreamDiffusionV2 |

Who meets whom is the planner's business (streamvid.window). Averages are of keys before rotation, so that they hold at any
position.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch


class Meeting(NamedTuple):
    """A sink frame and a frame that leaves the window.

    Attributes:
        rank: of the sink frame within the sink, from its end: -1 is the last.
        sink, evicted: their clean latents `[B, C, H, W]`.
    """

    rank: int
    sink: torch.Tensor
    evicted: torch.Tensor


SinkUpdate = Callable[[Meeting], "float | torch.Tensor"]
SINK_UPDATES = ("static", "ema", "ema_release", "memory", "adaptive")


def average(decay: float) -> SinkUpdate:
    """Exponential average with one decay."""
    return lambda meeting: decay


def memories(decays: Sequence[float]) -> SinkUpdate:
    """Exponential averages at several speeds: the last frames of the sink, each with its own decay (MemRoPE).

    A memory begins as the stream's own frame at its place, not as the first frame that is evicted.
    """
    return lambda meeting: decays[meeting.rank]


def refresh(below: float) -> SinkUpdate:
    """A sink frame whose latents have a cosine similarity below `below` with the evicted ones is replaced by them.

    One answer per video, `[B, 1, 1, 1]`, without asking the device. StreamDiffusionV2 compares embeddings of the newest
    chunk; here the frame that is leaving stands in for it.
    """

    def kept(meeting: Meeting) -> torch.Tensor:
        similarity = torch.cosine_similarity(meeting.sink.flatten(1), meeting.evicted.flatten(1))
        return (similarity >= below).to(meeting.sink.dtype).view(-1, 1, 1, 1)

    return kept


def sink_update(
    name: str, decay: float, memory_decays: Sequence[float], refresh_below: float
) -> SinkUpdate | None:
    """The update called `name`, one of `SINK_UPDATES`; None leaves the sink as it is."""
    if name == "static":
        return None
    if name == "memory":
        return memories(memory_decays)
    return refresh(refresh_below) if name == "adaptive" else average(decay)


def shares(kept: float | torch.Tensor, videos: int) -> torch.Tensor:
    """What stays and what the evicted frame gives, float32 `[B, 2]`."""
    if isinstance(kept, torch.Tensor):
        stays = kept.flatten().float()
        return torch.stack([stays, 1 - stays], -1)
    return torch.tensor([[kept, 1 - kept]]).expand(videos, 2)
