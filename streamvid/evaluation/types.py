"""What evaluation is about: videos with their prompts, frames as they stream by, and the outcome of a metric."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Literal

import cv2
import numpy as np

from streamvid.evaluation.appearance import frame_statistics
from streamvid.evaluation.flow import DisFlow

Fidelity = Literal["exact", "equivalent", "compatible", "related", "own"]
FIDELITIES: dict[str, str] = {
    "exact": "the official quantity, checked against official values",
    "equivalent": "the same network and weights, with our pre- and post-processing",
    "compatible": "the official definition with another network or optical flow",
    "related": "a different quantity of the same intent: never compare it with official numbers",
    "own": "defined by this project",
}


@dataclass(frozen=True)
class Segment:
    """A stretch of a video under one prompt: frames `start` to `stop` (exclusive)."""

    start: int
    stop: int
    prompt: str


@dataclass(frozen=True)
class Video:
    """One line of a run's manifest.

    Attributes:
        id: unique within a run; the name of the file without its suffix.
        path: of the file or frame folder, relative to the manifest's folder or absolute.
        prompt: the prompt of the suite that the video is scored with (and named after).
        sample: which of several videos of one prompt; group: the unit of resampling, the prompt or script it belongs to.
        segments: of the video by prompt; empty: one prompt throughout.
        borders: first frames of the chunks that the video was made in, from the second on.
        labels: what the suite knows of the prompt, by dimension; dimensions: which of VBench's it belongs to.
        timings: seconds of each chunk and frames in it, as the run measured them.
    """

    id: str
    path: str
    prompt: str = ""
    sample: int = 0
    group: str = ""
    seed: int | None = None
    fps: float | None = None
    segments: tuple[Segment, ...] = ()
    borders: tuple[int, ...] = ()
    dimensions: tuple[str, ...] = ()
    labels: Mapping[str, Any] = field(default_factory=dict)
    timings: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Video:
        """The inverse of `to_dict`. Raises TypeError, KeyError or ValueError where the record is no video."""
        values = dict(record)
        values["segments"] = tuple(Segment(**segment) for segment in values.get("segments", ()))
        for name in ("borders", "dimensions"):
            values[name] = tuple(values.get(name, ()))
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value not in ((), {}, None, "")}

    def facts(self) -> str:
        """A hash of everything that a metric may read here; times and places are not among it."""
        known = {k: v for k, v in self.to_dict().items() if k not in ("path", "timings")}
        return digest(known)

    def prompt_at(self, frame: int) -> str:
        """The prompt that a frame was made under."""
        for segment in self.segments:
            if segment.start <= frame < segment.stop:
                return segment.prompt
        return self.prompt


def digest(value: Any) -> str:
    """SHA-256 of a JSON value, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


class Frame:
    """One frame `rgb [H, W, 3]`, uint8, with what several metrics derive from it, each computed once.

    `previous` is the frame before it; it is let go once both were looked at, so that memory stays bounded.
    """

    def __init__(self, index: int, rgb: np.ndarray, previous: Frame | None = None):
        self.index, self.rgb, self.previous = index, rgb, previous

    @cached_property
    def gray(self) -> np.ndarray:
        """Luma as OpenCV defines it, uint8 `[H, W]`."""
        return cv2.cvtColor(self.rgb, cv2.COLOR_RGB2GRAY)

    @cached_property
    def step(self) -> float:
        """Mean absolute difference from the previous frame, in grey levels (0 for the first)."""
        if self.previous is None:
            return 0.0
        difference = cv2.absdiff(self.rgb, self.previous.rgb)
        return cv2.norm(difference, cv2.NORM_L1) / difference.size

    @cached_property
    def descriptor(self) -> np.ndarray:
        """The whole frame as 16 x 16 colours (YCrCb, area-averaged), float32 `[768]` in grey levels."""
        small = cv2.resize(self.rgb, (16, 16), interpolation=cv2.INTER_AREA)
        return cv2.cvtColor(small, cv2.COLOR_RGB2YCrCb).astype(np.float32).ravel()

    @cached_property
    def small_gray(self) -> np.ndarray:
        """Luma with the longer side at most 320 px: what optical flow between all frames is computed on."""
        height, width = self.gray.shape
        scale = 320 / max(height, width)
        if scale >= 1:
            return self.gray
        return cv2.resize(
            self.gray, (round(width * scale), round(height * scale)), interpolation=cv2.INTER_AREA
        )

    @cached_property
    def statistics(self) -> dict[str, float]:
        """Luma, contrast, saturation and so on, see `appearance.frame_statistics`."""
        return frame_statistics(self.rgb, self.gray)

    @cached_property
    def flow(self) -> np.ndarray | None:
        """From the previous frame to this one at the size of `small_gray`, in its pixels; None for the first."""
        return None if self.previous is None else _FLOW.of_gray(self.previous.small_gray, self.small_gray)

    @cached_property
    def flow_back(self) -> np.ndarray | None:
        """From this frame to the previous one."""
        return None if self.previous is None else _FLOW.of_gray(self.small_gray, self.previous.small_gray)


_FLOW = DisFlow("fast")


class Features:
    """Of a batch of frames: embeddings by encoder, each computed once however many metrics ask."""

    def __init__(self, frames: Sequence[Frame]):
        self.frames = list(frames)
        self._known: dict[str, np.ndarray] = {}

    def embedding(self, encoder: Any) -> np.ndarray:
        """`encoder(uint8 [T, H, W, 3])` of all frames; `encoder.name` tells encoders apart."""
        if encoder.name not in self._known:
            self._known[encoder.name] = np.asarray(encoder(np.stack([frame.rgb for frame in self.frames])))
        return self._known[encoder.name]


@dataclass(frozen=True)
class Batch:
    """Consecutive frames of one video: those from `start` to `stop` of a batch of features."""

    features: Features
    start: int
    stop: int

    @property
    def frames(self) -> list[Frame]:
        return self.features.frames[self.start : self.stop]

    def embedding(self, encoder: Any) -> np.ndarray:
        """Float array, one row per frame."""
        return self.features.embedding(encoder)[self.start : self.stop]

    def between(self, first: int, last: int) -> Batch | None:
        """The part with frame numbers first <= index < last, or None where there is none."""
        base = self.features.frames[0].index
        start, stop = max(self.start, first - base), min(self.stop, last - base)
        return Batch(self.features, start, stop) if start < stop else None


@dataclass(frozen=True)
class Clip:
    """What a metric is told before the first frame: the video and its measure."""

    video: Video
    frames: int
    height: int
    width: int
    fps: float

    @property
    def seconds(self) -> float:
        return self.frames / self.fps


@dataclass(frozen=True)
class Outcome:
    """What a metric says of one video.

    Attributes:
        status: ok; skipped (it does not apply, or something is missing: `reason`); failed.
        score: the value, or None. A skipped video is never a zero.
        weight: how many units the score is the mean of (frames for frame-weighted aggregates).
        series: named curves and matrices, as lists (None where there is no value).
        details: further numbers.
    """

    status: Literal["ok", "skipped", "failed"]
    score: float | None = None
    weight: float = 1.0
    reason: str = ""
    series: Mapping[str, Any] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)


def ok(score: float | bool | None, weight: float = 1.0, **more: Any) -> Outcome:
    """A value; `series`, `details` may follow. What is not finite is no value."""
    if score is not None and not np.isfinite(score):
        return Outcome("failed", reason=f"the value is not finite ({score})")
    return Outcome("ok", None if score is None else float(score), float(weight), **more)


def skip(reason: str, **more: Any) -> Outcome:
    return Outcome("skipped", reason=reason, **more)
