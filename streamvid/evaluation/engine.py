"""One video, all metrics, one pass over its frames."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from streamvid.errors import UserError
from streamvid.evaluation.backbones import Backbones, MissingWeights
from streamvid.evaluation.registry import Metric, MetricRequest, all_metrics
from streamvid.evaluation.sources import BadVideo, Source, batches
from streamvid.evaluation.types import Clip, Outcome, Video, skip

BATCH_FRAMES = 16


@dataclass
class Running:
    """A metric at work, and the seconds that it took."""

    name: str
    metric: Metric
    seconds: float = 0.0


def measure(
    video: Video,
    source: Source | None,
    requests: Sequence[MetricRequest],
    backbones: Backbones,
    on_frames: Callable[[int], Any] = lambda count: None,
) -> dict[str, tuple[Outcome, float]]:
    """Every metric's outcome and seconds, by name. A metric that fails does not disturb the others.

    Args:
        source: of the frames; None where only metrics that need none are asked for.
        on_frames: told how many frames were looked at, batch by batch.
    """
    outcomes: dict[str, tuple[Outcome, float]] = {}
    running: list[Running] = []
    known = source.measure if source is not None else None
    clip = Clip(
        video,
        *((known.frames, known.height, known.width, known.fps) if known else (0, 0, 0, video.fps or 16.0)),
    )
    for request in requests:
        missing = backbones.problem(all_metrics()[request.name].needs)
        if missing:
            outcomes[request.name] = (skip(missing), 0.0)
            continue
        entry = Running(request.name, request.build(backbones))
        reason = _guard(entry, outcomes, partial(entry.metric.begin, clip))
        if reason:
            outcomes[request.name] = (skip(reason), entry.seconds)
        elif request.name not in outcomes:
            running.append(entry)
    looking = [entry for entry in running if entry.metric.frames_needed]
    if looking and source is not None:
        try:
            for batch in batches(source, BATCH_FRAMES):
                for entry in looking:
                    _guard(entry, outcomes, partial(entry.metric.add, batch))
                looking = [entry for entry in looking if entry.name not in outcomes]
                on_frames(batch.stop - batch.start)
        except BadVideo as error:
            for entry in looking:
                outcomes[entry.name] = (Outcome("failed", reason=str(error)), entry.seconds)
    for entry in running:
        if entry.name not in outcomes:
            found = _guard(entry, outcomes, entry.metric.end)
            if entry.name not in outcomes:
                outcomes[entry.name] = (found, entry.seconds)
    return outcomes


def _guard(entry: Running, outcomes: dict[str, tuple[Outcome, float]], act: Callable[[], Any]) -> Any:
    """Let a metric do one step; if it raises, that is its outcome."""
    began = time.perf_counter()
    try:
        return act()
    except MissingWeights as error:
        outcomes[entry.name] = (skip(str(error)), entry.seconds)
    except (KeyboardInterrupt, UserError, MemoryError):
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        outcomes[entry.name] = (Outcome("failed", reason=reason), entry.seconds)
    finally:
        entry.seconds += time.perf_counter() - began
    return None
