"""VBench-Long: every dimension on clips of 2 s (10 s for some), and for subject and background the similarity between clips.

Clips are windows on the decoded frames: nothing is cut out and encoded again, which changes official values by up to 0.005.
The official quirks (names with an underscore lose the clip-to-clip half, stale folders) are not repeated.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from streamvid.evaluation.metrics import vbench_quality, vbench_semantic  # noqa: F401 - registers what is wrapped
from streamvid.evaluation.metrics.vbench_quality import Consistency, VBenchMetric
from streamvid.evaluation.registry import METRICS, Metric, register
from streamvid.evaluation.score import DIMENSIONS
from streamvid.evaluation.types import Batch, Clip, Outcome, ok, skip


@cache
def constants() -> dict[str, Any]:
    """Mapping tables, fusion weights and clip lengths of VBench-Long (Apache-2.0 data of the VBench repository)."""
    path = Path(__file__).parent.parent / "vbench_long_constants.json"
    return json.loads(path.read_text())


def clip_seconds(dimension: str, together: Sequence[str] = ()) -> float:
    """Length of a dimension's clips: the longest of all dimensions that a prompt belongs to."""
    lengths = constants()["clip_length_seconds"]["clip_length_mix"]
    return max(lengths[name] for name in (together or (dimension,)))


def split(frames: int, fps: float, seconds: float) -> list[tuple[int, int]]:
    """Frame ranges of a video's clips: full ones, then one more from the end if something is left over."""
    length = int(int(fps) * seconds)
    if frames <= length:
        return [(0, frames)]
    clips = [(start, start + length) for start in range(0, frames - length + 1, length)]
    if frames % length:
        clips.append((frames - length, frames))
    return clips


def mapped(dimension: str, similarity: float) -> float:
    """A clip-to-clip similarity on the scale of in-clip scores: linear between the knots 0, 0.01, ..., 1."""
    knots = constants()[dimension]
    return float(np.interp(similarity, np.arange(101) / 100, knots))


def fused(dimension: str, in_clip: float, between_clips: float | None) -> float:
    """Half in-clip, half mapped clip-to-clip score; in-clip alone where the mapped one is 0 or missing."""
    if between_clips is None:
        return in_clip
    value = mapped(dimension, between_clips)
    return 0.5 * in_clip + 0.5 * value if value else in_clip


class Clipped(Metric):
    """Base: another metric on every clip of a video; the score is the mean over clips, the weight their number."""

    inner: ClassVar[type[VBenchMetric]]
    inner_options: dict[str, Any]

    def __init__(self, backbones, **options):
        super().__init__(backbones)
        self.inner_options = options
        self.inner(backbones, **options)  # complains of options that do not fit

    def begin(self, clip: Clip) -> str | None:
        super().begin(clip)
        name = self.inner.name.split(".")[1]
        self.windows = split(clip.frames, clip.fps, clip_seconds(name, clip.video.dimensions))
        self.open: dict[int, Metric] = {}
        self.outcomes: dict[int, Outcome] = {}
        whole = self.inner(self.backbones, **self.inner_options)
        return whole.begin(Clip(clip.video, clip.frames, clip.height, clip.width, clip.fps))

    def add(self, batch: Batch) -> None:
        for number, (start, stop) in enumerate(self.windows):
            part = batch.between(start, stop)
            if part is None:
                continue
            if number not in self.open and number not in self.outcomes:
                metric = self.inner(self.backbones, **self.inner_options)
                clip = Clip(self.clip.video, stop - start, self.clip.height, self.clip.width, self.clip.fps)
                reason = metric.begin(clip)
                if reason:
                    self.outcomes[number] = skip(reason)
                    continue
                self.open[number] = metric
            if number in self.open:
                self.open[number].add(part)
                if part.frames[-1].index + 1 == stop:
                    self.outcomes[number] = self.open.pop(number).end()

    def end(self) -> Outcome:
        told = [self.outcomes[n] for n in sorted(self.outcomes) if self.outcomes[n].score is not None]
        if not told:
            first = self.outcomes.get(0)
            return skip(first.reason if first else "it has no clips")
        scores = [outcome.score for outcome in told if outcome.score is not None]
        return ok(float(np.mean(scores)), weight=len(scores), series={"per_clip": scores})


class FirstFrames(Clipped):
    """Base: also the similarity of the clips' first frames, raw and fused."""

    encoder: ClassVar[str]
    dimension: ClassVar[str]

    def begin(self, clip: Clip) -> str | None:
        self.firsts: dict[int, torch.Tensor] = {}
        return super().begin(clip)

    def add(self, batch: Batch) -> None:
        super().add(batch)
        encoder = self.backbones.get(self.encoder)
        for start, _ in self.windows:
            part = batch.between(start, start + 1)
            if part is not None:
                row = torch.from_numpy(encoder(part.frames[0].rgb[None]))[0].float()
                self.firsts[start] = torch.nn.functional.normalize(row, dim=-1)

    def end(self) -> Outcome:
        found = super().end()
        if found.status != "ok" or found.score is None:
            return found
        rows = [self.firsts[start] for start in sorted(self.firsts)]
        pairs = [
            (max(0.0, float(a @ b)) + max(0.0, float(rows[0] @ b))) / 2 for a, b in itertools.pairwise(rows)
        ]
        raw = float(np.mean(pairs)) if pairs else None
        details = {"in_clip": found.score, "clip_to_clip": raw}
        if raw is not None:
            details["mapped_clip_to_clip"] = mapped(self.dimension, raw)
        score = fused(self.dimension, found.score, raw)
        return ok(score, weight=found.weight, series=found.series, details=details)


class RawClipToClip(Metric):
    """Base: similarity of the clips' first frames, not mapped: what VBench-Long's scale hides."""

    source: ClassVar[type[FirstFrames]]

    def begin(self, clip: Clip) -> str | None:
        super().begin(clip)
        self.whole = self.source(self.backbones)
        reason = self.whole.begin(clip)
        return reason or ("it is one clip" if len(self.whole.windows) < 2 else None)

    def add(self, batch: Batch) -> None:
        self.whole.add(batch)

    def end(self) -> Outcome:
        found = self.whole.end()
        return ok(found.details["clip_to_clip"]) if found.status == "ok" else found


def _register() -> None:
    between = {"subject_consistency": "dinov2", "background_consistency": "dreamsim"}
    for name in DIMENSIONS:
        inner = METRICS[f"vbench.{name}"]
        base = FirstFrames if issubclass(inner, Consistency) else Clipped
        body: dict[str, Any] = {"inner": inner, "__doc__": f"VBench-Long: {inner.__doc__}"}
        needs = inner.needs
        if base is FirstFrames:
            body |= {"encoder": between[name], "dimension": name}
            needs = (*needs, between[name])
        cls = type(f"Long{inner.__name__}", (base,), body)
        # officially the mean over clips of all videos, hence by weight
        register(
            f"vbench_long.{name}", fidelity=inner.fidelity, better="up", needs=needs, aggregate="frames"
        )(cls)
        if base is FirstFrames:
            raw = type(
                f"Raw{cls.__name__}", (RawClipToClip,), {"source": cls, "__doc__": RawClipToClip.__doc__}
            )
            title = name.split("_")[0]
            register(f"long.{title}_clip_to_clip", fidelity=inner.fidelity, better="up", needs=needs)(raw)


_register()
