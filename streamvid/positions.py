"""Temporal position policies: at which positions the latent frames of a window are seen. Siblings of one signature.

    positions = policy(view)         # one number per frame of the window, in its order

| policy | sink | window | source |
|---|---|---|---|
| absolute | at its index in the scene | at its index | Self Forcing, LongLive |
| cache_relative | rank in the window | rank in the window | LongLive infinite, Reward Forcing |
| sink_before_window | directly before the window | at its index | Rolling Forcing, Deep Forcing as the papers say |
| deep_forcing_release | moved at every roll, a gap before the window | at its index | Deep Forcing as released |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class View:
    """A window as a position policy sees it.

    Attributes:
        indices: index of every frame within its scene plus its shot's offset, in temporal order.
        sink: how many of them, at the beginning, are the sink.
        compressed: frames' worth of compressed tokens between the sink and the rest, which keep the positions they have.
        rolled: frames that the stream has moved on since its first eviction; None before.
        first_sink_shift: by how much a released method moves the sink at the first eviction.
    """

    indices: Sequence[int]
    sink: int
    compressed: int = 0
    rolled: int | None = None
    first_sink_shift: int = 0


def absolute(view: View) -> list[float]:
    """Every frame is seen at its index in the scene: the sink's distance grows for ever."""
    return [float(index) for index in view.indices]


def cache_relative(view: View) -> list[float]:
    """Every frame is seen at its rank in the window: nothing ever grows."""
    return [float(rank) for rank in range(len(view.indices))]


def sink_before_window(view: View) -> list[float]:
    """The sink is seen directly before what follows it in the window (Rolling Forcing, section 3.3; Deep Forcing, 3.2)."""
    follows = view.indices[view.sink] if view.sink < len(view.indices) else view.indices[-1] + 1
    start = follows - view.compressed - view.sink
    return [float(start + rank) for rank in range(view.sink)] + absolute(view)[view.sink :]


def deep_forcing_release(view: View) -> list[float]:
    """The released code counts from the first eviction, at which it moves the sink by a constant: a gap stays behind it."""
    shift = 0 if view.rolled is None else view.first_sink_shift + view.rolled
    return [index + float(shift) for index in view.indices[: view.sink]] + absolute(view)[view.sink :]


POSITIONS: dict[str, Callable[[View], list[float]]] = {
    "absolute": absolute,
    "cache_relative": cache_relative,
    "sink_before_window": sink_before_window,
    "deep_forcing_release": deep_forcing_release,
}
