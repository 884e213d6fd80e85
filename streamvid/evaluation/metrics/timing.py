"""Speed as a viewer meets it, from the times that a run recorded; no frames are needed.

`Video.timings` holds `chunk_seconds` and `chunk_frames`, `switches` (indices of chunks that answer a new prompt) and
`peak_memory_mb`. These numbers differ from run to run and are kept apart from the scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from streamvid.evaluation.registry import Metric, register
from streamvid.evaluation.types import Clip, Outcome, ok, skip

START_BUFFER = 1  # chunks that a viewer waits for before playing


@dataclass(frozen=True)
class Viewing:
    """What a viewer met: chunks that came too late, interruptions, and their seconds."""

    misses: int
    stalls: int
    stalled_seconds: float


def watch(arrivals: Sequence[float], durations: Sequence[float], buffer: int = START_BUFFER) -> Viewing:
    """Play chunks that arrive at `arrivals` and last `durations` seconds, from when `buffer` of them are there.

    A chunk misses its deadline if it comes after the moment at which an undisturbed viewer would need it; a stall is a wait
    of the real viewer, whose clock stands still meanwhile.
    """
    ready = min(buffer, len(arrivals)) - 1
    start = max(arrivals[: ready + 1])
    needed = [start + before for before in accumulate(durations, initial=0.0)][: len(arrivals)]
    clock, stalls, waited = start, 0, 0.0
    for arrival, duration in zip(arrivals, durations, strict=True):
        if arrival > clock + 1e-9:
            stalls += 1
            waited += arrival - clock
            clock = arrival
        clock += duration
    misses = sum(a > n + 1e-9 for a, n in zip(arrivals, needed, strict=True))
    return Viewing(misses, stalls, waited)


class Timed(Metric):
    """Base: reads the recorded times."""

    frames_needed = False

    def begin(self, clip: Clip) -> str | None:
        super().begin(clip)
        self.seconds = [float(s) for s in clip.video.timings.get("chunk_seconds", ())]
        self.frames = [int(n) for n in clip.video.timings.get("chunk_frames", ())]
        return (
            None if self.seconds and len(self.seconds) == len(self.frames) else "its times were not recorded"
        )

    @property
    def durations(self) -> list[float]:
        return [count / self.clip.fps for count in self.frames]


@register("timing.first_chunk", fidelity="own", better="down", unit="s")
class FirstChunk(Timed):
    """Seconds until the first chunk is there."""

    def end(self) -> Outcome:
        return ok(self.seconds[0], series={"chunk_seconds": self.seconds})


class ChunkPercentile(Timed):
    """Base: a percentile of the seconds per chunk after the first."""

    percent: float

    def end(self) -> Outcome:
        return ok(float(np.percentile(self.seconds[1:] or self.seconds, self.percent)))


@register("timing.chunk_p50", fidelity="own", better="down", unit="s")
class ChunkMedian(ChunkPercentile):
    """Median of the seconds between chunks."""

    percent = 50


@register("timing.chunk_p95", fidelity="own", better="down", unit="s")
class ChunkP95(ChunkPercentile):
    """95th percentile of the seconds between chunks."""

    percent = 95


@register("timing.chunk_p99", fidelity="own", better="down", unit="s")
class ChunkP99(ChunkPercentile):
    """99th percentile of the seconds between chunks."""

    percent = 99


@register("timing.real_time_factor", fidelity="own", better="up", unit="x")
class RealTimeFactor(Timed):
    """Seconds of video per second of work, the first chunk left out."""

    def end(self) -> Outcome:
        later = slice(1, None) if len(self.seconds) > 1 else slice(None)
        return ok(sum(self.durations[later]) / max(sum(self.seconds[later]), 1e-9))


@register("timing.deadline_misses", fidelity="own", better="down", unit="share")
class DeadlineMisses(Timed):
    """Share of chunks that come after the moment at which a viewer who started with the first chunk needs them."""

    def end(self) -> Outcome:
        seen = watch(list(accumulate(self.seconds)), self.durations)
        return ok(seen.misses / len(self.seconds))


@register("timing.stalls", fidelity="own", better="down", unit="s per minute")
class Stalls(Timed):
    """Seconds per minute of video that a viewer waits in interruptions."""

    def end(self) -> Outcome:
        seen = watch(list(accumulate(self.seconds)), self.durations)
        return ok(60 * seen.stalled_seconds / sum(self.durations), details={"stalls": seen.stalls})


@register("timing.prompt_to_pixel", fidelity="own", better="down", unit="s")
class PromptToPixel(Timed):
    """Seconds from a new prompt, given at a chunk's border, until its first chunk is there; mean over switches."""

    def end(self) -> Outcome:
        at = [self.seconds[i] for i in self.clip.video.timings.get("switches", ()) if i < len(self.seconds)]
        return ok(float(np.mean(at)), series={"per_switch": at}) if at else skip("its prompt never changes")


@register("timing.peak_memory", fidelity="own", better="down", unit="MB")
class PeakMemory(Timed):
    """Peak memory of the process (of the device, on a GPU)."""

    def end(self) -> Outcome:
        peak = self.clip.video.timings.get("peak_memory_mb")
        return ok(float(peak)) if peak else skip("it was not recorded")
