"""Repetition, on 16 x 16 pictures of the frames: loops, copies of the sink, flashbacks, similarity over lags."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from streamvid.evaluation.registry import Metric, register
from streamvid.evaluation.types import Batch, Clip, Outcome, ok, skip

MOST_FRAMES = 4096  # kept; beyond, every other one is dropped and the step doubled
FIRST_FRAMES = 3  # what a sink holds
LAGS_FRAMES, LAGS_SECONDS = (2, 5, 10, 20, 50), (1, 5, 10, 30)


class Descriptors(Metric):
    """Base: keeps the descriptors of the frames."""

    def begin(self, clip: Clip) -> str | None:
        self.kept: list[np.ndarray] = []
        self.step = 1
        super().begin(clip)
        return "it is shorter than a second" if clip.seconds < 1 else None

    def add(self, batch: Batch) -> None:
        for frame in batch.frames:
            if frame.index % self.step == 0:
                self.kept.append(frame.descriptor)
                if len(self.kept) > MOST_FRAMES:
                    self.kept, self.step = self.kept[::2], 2 * self.step

    @property
    def rate(self) -> float:
        """Kept frames per second."""
        return self.clip.fps / self.step


def unit(rows: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1."""
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-9)


def lag_similarity(rows: np.ndarray) -> np.ndarray:
    """Mean similarity of unit rows at every lag from 0."""
    table = rows @ rows.T
    return np.array([np.diagonal(table, lag).mean() for lag in range(len(rows))])


def loop_prominence(frames: np.ndarray, rate: float) -> tuple[float, int]:
    """How far the similarity over lags rises again after it fell, and at which lag; 0 where hardly anything changes.

    Similarity is of what differs from the mean picture, after a mean over a quarter of a second.
    """
    width = max(1, round(rate / 4))
    sums = np.cumsum(np.concatenate([np.zeros_like(frames[:1]), frames], dtype=np.float64), axis=0)
    smooth = (sums[width:] - sums[:-width]) / width
    centred = smooth - smooth.mean(0)
    if len(smooth) < 4 or np.sqrt((centred**2).mean()) < 0.5:
        return 0.0, 0
    curve = lag_similarity(unit(centred))
    best = (0.0, 0)
    for lag in range(max(2, round(rate / 2)), int(0.6 * len(frames)) + 1):
        if lag < len(curve):
            best = max(best, (float(curve[lag] - curve[1:lag].min()), lag))
    return best


@register("long.loop", fidelity="own", better="down")
class Loop(Descriptors):
    """Prominence of the strongest loop, over the whole video, each prompt and windows of 10 s; above 0.8 it loops.

    A subject that bounces before a still background loops by nature: compare methods on the same prompts.
    """

    def end(self) -> Outcome:
        frames, window = np.stack(self.kept), round(10 * self.rate)
        starts = range(0, max(1, len(frames) - window + 1), max(1, window // 2))
        parts = [frames] + [frames[a : a + window] for a in starts if len(frames) > window]
        if self.step == 1:
            parts += [
                frames[s.start : s.stop] for s in self.clip.video.segments if s.stop - s.start > self.rate
            ]
        score, lag = max(loop_prominence(part, self.rate) for part in parts)
        return ok(score, details={"lag_seconds": lag / self.rate})


@register("long.repetition", fidelity="own", better="down", unit="share", version=2)
class Repetition(Descriptors):
    """How much of the second half was seen before: one minus the distance to the nearest frame half a second or more
    earlier, over the usual distance of neighbours, squared (1: every frame is an exact copy; 0: none is nearer than a
    neighbour).

    Squared, exact copies outweigh pictures that come near one another, as those of a wheel do. Unlike `long.loop` it tells
    motion that merely comes round again from pictures that do.
    """

    def end(self) -> Outcome:
        frames = np.stack(self.kept).astype(np.float64)
        squares = (frames**2).sum(1)
        distances = np.sqrt(np.maximum(squares[:, None] + squares - 2 * frames @ frames.T, 0))
        adjacent = float(np.median(np.diagonal(distances, 1)))
        gap, half = max(1, round(self.rate / 2)), len(frames) // 2
        if adjacent < 0.1 * frames.shape[1] ** 0.5 or half <= gap:
            return skip("hardly anything changes in it, or it is too short")
        nearest = np.array([distances[i, : i - gap + 1].min() for i in range(half, len(frames))])
        return ok(float(np.mean((1 - np.minimum(nearest / adjacent, 1)) ** 2)))


@register("long.sink_copy", fidelity="own", better="down", unit="cosine")
class SinkCopy(Descriptors):
    """Mean similarity of the second half to the nearest of the first three frames, less the video's mean picture."""

    def end(self) -> Outcome:
        frames = np.stack(self.kept)
        centred = frames - frames.mean(0)
        if np.sqrt((centred**2).mean()) < 0.5:
            return skip("hardly anything changes in it")
        rows = unit(centred)
        late = rows[len(rows) // 2 :]
        nearest = (late @ rows[:FIRST_FRAMES].T).max(1)
        neighbours = (late[1:] * late[:-1]).sum(1).mean()
        return ok(float(nearest.mean()), details={"neighbours": float(neighbours)})


@register("long.flashback", fidelity="own", better="down", unit="per minute")
class Flashback(Descriptors):
    """How often a frame is suddenly one of the first three again: similarity above 0.98 where its predecessor is far."""

    def end(self) -> Outcome:
        frames = np.stack(self.kept)
        rows = unit(frames - frames.mean(1, keepdims=True))
        nearest = (rows @ rows[:FIRST_FRAMES].T).max(1)
        adjacent = np.concatenate([[1.0], (rows[1:] * rows[:-1]).sum(1)])
        late = np.arange(len(rows)) >= self.rate / 2
        found = np.flatnonzero((nearest > 0.98) & (adjacent < 0.9 * nearest) & late)
        return ok(60 * len(found) / self.clip.seconds, details={"frames": (found * self.step).tolist()})


@register("long.coherence", fidelity="own", better="", unit="cosine")
class Coherence(Descriptors):
    """Similarity of frames one second apart; the series has the curve over all lags (after VBench issue 206)."""

    def end(self) -> Outcome:
        frames = np.stack(self.kept)
        curve = lag_similarity(unit(frames - frames.mean(1, keepdims=True)))
        seconds = {
            lag * self.step / self.clip.fps: float(curve[lag]) for lag in range(1, int(0.8 * len(curve)))
        }
        lags = [lag / self.clip.fps for lag in LAGS_FRAMES] + [float(s) for s in LAGS_SECONDS]
        at = {f"{lag:g} s": _nearest(seconds, lag) for lag in lags if lag <= max(seconds, default=0)}
        stride = max(1, len(seconds) // 120)
        return ok(
            _nearest(seconds, 1.0),
            details=at,
            series={"lags": list(seconds)[::stride], "similarity": list(seconds.values())[::stride]},
        )


def _nearest(curve: dict[float, float], lag: float) -> float:
    return curve[min(curve, key=lambda known: abs(known - lag))]


@register("long.jumps", fidelity="own", better="down", unit="per minute")
class Jumps(Descriptors):
    """How often the whole picture changes at once where no prompt does: neighbours more than eight usual steps apart."""

    def end(self) -> Outcome:
        steps = np.array([float(np.abs(b - a).mean()) for a, b in pairwise(self.kept)])
        limit = max(8 * float(np.median(steps)), 8.0)
        switches = [part.start for part in self.clip.video.segments[1:]]
        found = [
            (i + 1) * self.step
            for i in np.flatnonzero(steps > limit).tolist()
            if not any(0 <= (i + 1) * self.step - s <= self.clip.fps for s in switches)
        ]
        return ok(60 * len(found) / self.clip.seconds, details={"frames": found})
