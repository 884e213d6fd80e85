"""Drift: how far the end of a stream is from its beginning, under one prompt, by several published definitions.

`definition` chooses what the score is; all are in the details:
first_last  |mean of the last 5 s - mean of the first 5 s| (Rolling Forcing on imaging, Deep Forcing on aesthetics)
signed      the same with its sign: its mean over videos is not biased upwards
slope       Theil-Sen change per second
vde_linear, vde_log   video drift error of BlockVid over chunks of 2 s
Where a video has several prompts, each segment is measured by itself and the worst counts (signed, slope: the mean).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import cv2
import numpy as np

from streamvid.evaluation.appearance import slope, video_drift_error
from streamvid.evaluation.curves import Curves
from streamvid.evaluation.metrics.vbench_quality import AestheticQuality, ImagingQuality
from streamvid.evaluation.registry import Metric, register
from streamvid.evaluation.types import Batch, Clip, Outcome, Segment, ok, skip

ENDS = (
    5.0  # seconds of the first and the last window; a third of a segment that is shorter than three of them
)
CHUNK = 2.0  # seconds, of VDE
DEFINITIONS = ("first_last", "signed", "slope", "vde_linear", "vde_log")


def segments_of(clip: Clip) -> tuple[Segment, ...]:
    """Stretches of one prompt."""
    return clip.video.segments or (Segment(0, clip.frames, clip.video.prompt),)


def per_second(values: Sequence[float], fps: float) -> list[float]:
    """Means over seconds; a rest of less than half a second belongs to the one before."""
    count = max(1, round(len(values) / fps))
    edges = [round(i * fps) for i in range(count)] + [len(values)]
    return [float(np.mean(values[a:b])) for a, b in itertools.pairwise(edges) if b > a]


def drifts(values: Sequence[float], fps: float) -> dict[str, float]:
    """All definitions on the values of the frames of one segment."""
    ends = max(1, min(round(ENDS * fps), len(values) // 3))
    difference = float(np.mean(values[-ends:]) - np.mean(values[:ends]))
    chunk = max(1, min(round(CHUNK * fps), len(values) // 2))
    chunks = [float(np.mean(values[i : i + chunk])) for i in range(0, len(values) - chunk + 1, chunk)]
    found = {"first_last": abs(difference), "signed": difference, "slope": slope(per_second(values, fps))}
    if chunks[0]:
        found |= {f"vde_{kind}": video_drift_error(chunks, kind) for kind in ("linear", "log")}
    return found


def drift_outcome(values: Sequence[float], clip: Clip, definition: str) -> Outcome:
    """The outcome of a drift metric from its value per frame."""
    found = [
        drifts(values[segment.start : segment.stop], clip.fps)
        for segment in segments_of(clip)
        if len(values[segment.start : segment.stop]) >= max(3, clip.fps)
    ]
    if not found:
        return skip("no prompt lasts a second")
    details = {}
    for name in DEFINITIONS:
        told = [part[name] for part in found if name in part]
        if told:
            details[name] = float(np.mean(told)) if name in ("signed", "slope") else max(told)
    if definition not in details:
        return skip(f"{definition} is relative to a first value of 0")
    return ok(details[definition], details=details, series={"per_second": per_second(values, clip.fps)})


def check_definition(definition: str) -> str:
    if definition not in DEFINITIONS:
        raise TypeError(f"definition = {definition!r} must be one of {', '.join(DEFINITIONS)}")
    return definition


class StatisticDrift(Metric):
    """Drift of a statistic of frames."""

    statistic: str

    def __init__(self, backbones, definition: str = "first_last"):
        super().__init__(backbones)
        self.definition = check_definition(definition)

    def begin(self, clip: Clip) -> str | None:
        self.values: list[float] = []
        return super().begin(clip)

    def add(self, batch: Batch) -> None:
        self.values += [frame.statistics[self.statistic] for frame in batch.frames]

    def end(self) -> Outcome:
        return drift_outcome(self.values, self.clip, self.definition)


def _register_statistics() -> None:
    units = {"clipped": "share"}
    for name in ("luma", "contrast", "saturation", "colourfulness", "sharpness", "clipped"):
        cls = type(
            f"{name.title()}Drift",
            (StatisticDrift,),
            {"statistic": name, "__doc__": f"Drift of {name} under one prompt, first to last 5 s."},
        )
        register(f"drift.{name}", fidelity="own", better="down", unit=units.get(name, "grey levels"))(cls)


_register_statistics()


@register("drift.imaging", fidelity="equivalent", better="down", needs=("musiq",))
class ImagingDrift(ImagingQuality):
    """Drift of MUSIQ's score, first to last 5 s (Rolling Forcing's drift)."""

    def __init__(self, backbones, definition: str = "first_last", mode: str = "longer"):
        super().__init__(backbones, mode)
        self.definition = check_definition(definition)

    def end(self) -> Outcome:
        return drift_outcome(self.scores, self.clip, self.definition)


@register("drift.aesthetic", fidelity="equivalent", better="down", needs=("clip_l", "aesthetic_head"))
class AestheticDrift(AestheticQuality):
    """Drift of the aesthetic score, first to last 5 s (Deep Forcing's drift)."""

    def __init__(self, backbones, definition: str = "first_last"):
        super().__init__(backbones)
        self.definition = check_definition(definition)

    def end(self) -> Outcome:
        return drift_outcome(self.scores, self.clip, self.definition)


@register("drift.look", fidelity="own", better="down", unit="grey levels")
class LookDrift(Metric):
    """Distance of the look (colours, their spread, edges) of a prompt's last two seconds from its first two."""

    def begin(self, clip: Clip) -> str | None:
        self.curves = Curves(clip.fps)
        return super().begin(clip)

    def add(self, batch: Batch) -> None:
        for frame in batch.frames:
            self.curves.add(frame.rgb[None], self.clip.video.prompt_at(frame.index))

    def end(self) -> Outcome:
        curve = self.curves.drift
        lasts: list[
            float
        ] = []  # of every run under one prompt that has windows after its first, which is at 0
        for value, before in zip(curve[1:], curve, strict=False):
            if value is not None and before is not None and value > 0:
                lasts = [*lasts[:-1], value] if before > 0 and lasts else [*lasts, value]
            elif value == 0 and before == 0:  # a still picture does not drift
                lasts.append(0.0)
        if not lasts:
            return skip("no prompt lasts four seconds")
        return ok(max(lasts), series={"per_window": curve, "motion": self.curves.motion})


@register("drift.colour", fidelity="own", better="up", unit="of 100")
class ColourDrift(Metric):
    """100 (1 - half the L1 distance of the hue histograms of first and last second), hue weighted by saturation.

    After ID-Forcing's colour drift, which takes single frames and does not weigh; `weighted: false` does as it does.
    """

    def __init__(self, backbones, weighted: bool = True):
        super().__init__(backbones)
        self.weighted = weighted

    def begin(self, clip: Clip) -> str | None:
        self.seconds: dict[int, np.ndarray] = {}
        return super().begin(clip)

    def add(self, batch: Batch) -> None:
        width = max(1, round(self.clip.fps)) if self.weighted else 1
        wanted: dict[int, Callable[[int, Segment], bool]] = {
            0: lambda index, part: index < part.start + width,
            1: lambda index, part: index >= part.stop - width,
        }
        for frame in batch.frames:
            for number, part in enumerate(segments_of(self.clip)):
                if not part.start <= frame.index < part.stop:
                    continue
                for end, near in wanted.items():
                    if near(frame.index, part):
                        key = 2 * number + end
                        self.seconds[key] = self.seconds.get(key, 0) + self._histogram(frame.rgb)

    def _histogram(self, rgb: np.ndarray) -> np.ndarray:
        hsv = cv2.cvtColor(rgb, cv2.COLOR_RGB2HSV)
        weights = hsv[..., 1].ravel() if self.weighted else None
        return np.bincount(hsv[..., 0].ravel(), weights, 180).astype(float)

    def end(self) -> Outcome:
        scores = []
        for number in range(len(segments_of(self.clip))):
            pair = [self.seconds.get(2 * number + end) for end in (0, 1)]
            if any(h is None or not h.sum() for h in pair):
                continue
            first, last = (h / h.sum() for h in pair if h is not None)
            scores.append(100 * (1 - 0.5 * float(np.abs(first - last).sum())))
        return ok(min(scores)) if scores else skip("it has no colours")
