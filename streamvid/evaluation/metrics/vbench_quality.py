"""VBench's seven quality dimensions (Huang et al. 2024), as the official code at commit 45e79ec computes them.

Everything but the networks is exact: decoding, sampling, preprocessing, formulae, votes. Networks come as `backbones`.
"""

from __future__ import annotations

import numpy as np
import torch

from streamvid.evaluation.flow import (
    DisFlow,
    Flow,
    dynamic_interval,
    dynamic_threshold,
    dynamic_votes,
    is_dynamic,
    is_static,
    top_mean,
)
from streamvid.evaluation.registry import Metric, register
from streamvid.evaluation.sampling import MUSIQ_MODES, for_musiq
from streamvid.evaluation.types import Batch, Clip, Frame, Outcome, ok, skip

TOO_SHORT = "it has fewer than two frames"


class VBenchMetric(Metric):
    """Base: a dimension applies to the prompts of its suite, or to any prompt where videos name no dimensions."""

    def begin(self, clip: Clip) -> str | None:
        super().begin(clip)
        self.dimension = self.name.split(".")[1]
        named = clip.video.dimensions
        if named and self.dimension not in named:
            return f"its prompt belongs to {', '.join(named)}"
        return None


class Consistency(VBenchMetric):
    """Mean over frames of the cosine similarities, not below 0, to the frame before and to the first."""

    encoder: str

    def begin(self, clip: Clip) -> str | None:
        self.total, self.count = 0.0, 0
        self.first: torch.Tensor | None = None
        self.last = torch.empty(0)
        return super().begin(clip) or (TOO_SHORT if clip.frames < 2 else None)

    def add(self, batch: Batch) -> None:
        rows = torch.from_numpy(batch.embedding(self.backbones.get(self.encoder))).float()
        for row in torch.nn.functional.normalize(rows, dim=-1):
            if self.first is None:
                self.first = row
            else:
                pair = [max(0.0, float(torch.dot(other, row))) for other in (self.last, self.first)]
                self.total += sum(pair) / 2
                self.count += 1
            self.last = row

    def end(self) -> Outcome:
        return ok(self.total / self.count, weight=self.count)


@register(
    "vbench.subject_consistency", fidelity="equivalent", better="up", needs=("dino",), aggregate="frames"
)
class SubjectConsistency(Consistency):
    """Similarity of DINO features to the frame before and to the first."""

    encoder = "dino"


@register(
    "vbench.background_consistency", fidelity="equivalent", better="up", needs=("clip_b",), aggregate="frames"
)
class BackgroundConsistency(Consistency):
    """Similarity of CLIP ViT-B/32 features to the frame before and to the first."""

    encoder = "clip_b"


@register("vbench.temporal_flickering", fidelity="exact", better="up")
class TemporalFlickering(VBenchMetric):
    """One minus the mean absolute difference of neighbouring frames over 255; motion counts as flicker.

    `static_filter` = dis or raft measures only videos that pass VBench's filter for still scenes, as its own suite does.
    """

    def __init__(self, backbones, static_filter: str = "none"):
        super().__init__(backbones)
        flows = {"none": None, "dis": DisFlow, "raft": lambda: backbones.get("raft")}
        if static_filter not in flows:
            raise TypeError(f"static_filter = {static_filter!r} must be one of {', '.join(flows)}")
        maker = flows[static_filter]
        self.flow: Flow | None = maker() if maker else None

    def begin(self, clip: Clip) -> str | None:
        self.steps: list[float] = []
        self.top: list[float] = []
        self.first: Frame | None = None
        return super().begin(clip) or (TOO_SHORT if clip.frames < 2 else None)

    def add(self, batch: Batch) -> None:
        for frame in batch.frames:
            if self.first is None:
                self.first = frame
            else:
                self.steps.append(frame.step)
                if self.flow is not None:
                    assert frame.previous is not None
                    self.top.append(top_mean(self.flow(frame.previous.rgb, frame.rgb), 0.02))
            self.last = frame

    def end(self) -> Outcome:
        if self.flow is not None and self.first is not None:
            a, b = self.first.rgb, self.last.rgb
            ends = top_mean(self.flow(a, b), 0.02), top_mean(self.flow(b, a), 0.02)
            if not is_static(self.top, ends, len(self.top) + 1, *a.shape[:2]):
                return skip("it is not a still scene (static filter)")
        return ok((255.0 - float(np.mean(self.steps))) / 255.0, series={"per_pair": self.steps})


@register("vbench.motion_smoothness", fidelity="equivalent", better="up", needs=("amt",))
class MotionSmoothness(VBenchMetric):
    """How well the odd frames are predicted by interpolation between the even ones (AMT-S)."""

    def begin(self, clip: Clip) -> str | None:
        self.errors: list[float] = []
        self.even: np.ndarray | None = None
        self.odd: np.ndarray | None = None
        self.count = 0
        return super().begin(clip) or ("it has fewer than three frames" if clip.frames < 3 else None)

    def add(self, batch: Batch) -> None:
        for frame in batch.frames:
            if self.count % 2:
                self.odd = frame.rgb
            else:
                if self.even is not None and self.odd is not None:
                    self.errors.append(self._error(self.even, self.odd, frame.rgb))
                self.even = frame.rgb
            self.count += 1

    def _error(self, before: np.ndarray, odd: np.ndarray, after: np.ndarray) -> float:
        ends = [torch.from_numpy(rgb).permute(2, 0, 1)[None].float() / 255 for rgb in (before, after)]
        middle = self.backbones.get("amt")(*ends)[0].permute(1, 2, 0)
        predicted = (middle * 255).clamp(0, 255).byte().numpy()  # truncated, not rounded
        return float(np.abs(predicted.astype(np.int16) - odd).mean())

    def end(self) -> Outcome:
        return ok((255.0 - float(np.mean(self.errors))) / 255.0)


class FlowVotes(VBenchMetric):
    """Whether enough pairs of frames at about 8 per second move more than a threshold."""

    def flow(self) -> Flow:
        return self.backbones.get("raft")

    def begin(self, clip: Clip) -> str | None:
        self.interval = dynamic_interval(clip.fps)
        self.seen = 0
        self.kept: np.ndarray | None = None
        self.top: list[float] = []
        return super().begin(clip) or (
            "fewer than two frames are looked at" if clip.frames <= self.interval else None
        )

    def add(self, batch: Batch) -> None:
        for frame in batch.frames:
            if self.seen % self.interval == 0:
                if self.kept is not None:
                    self.pair(self.kept, frame.rgb)
                self.kept = frame.rgb
            self.seen += 1

    def pair(self, before: np.ndarray, after: np.ndarray) -> None:
        self.top.append(top_mean(self.flow()(before, after), 0.05))

    def end(self) -> Outcome:
        assert self.kept is not None
        height, width = self.kept.shape[:2]
        frames = len(self.top) + 1
        return ok(
            is_dynamic(self.top, frames, height, width),
            series={"top5": self.top},
            details={
                "threshold": dynamic_threshold(height, width),
                "votes": dynamic_votes(frames),
                "frames": frames,
            },
        )


@register("vbench.dynamic_degree", fidelity="compatible", better="up", needs=("raft",))
class DynamicDegree(FlowVotes):
    """Share of videos that move, by RAFT flow at about 8 frames per second (torchvision's weights, not raft-things)."""


@register("vbench.aesthetic_quality", fidelity="equivalent", better="up", needs=("clip_l", "aesthetic_head"))
class AestheticQuality(VBenchMetric):
    """LAION's linear head on CLIP ViT-L/14 features, over 10, mean over frames."""

    def begin(self, clip: Clip) -> str | None:
        self.scores: list[float] = []
        return super().begin(clip)

    def add(self, batch: Batch) -> None:
        rows = torch.from_numpy(batch.embedding(self.backbones.get("clip_l"))).float()
        rows = torch.nn.functional.normalize(rows, dim=-1)
        self.scores += [float(value) / 10 for value in self.backbones.get("aesthetic_head")(rows)]

    def end(self) -> Outcome:
        return ok(float(np.mean(self.scores)), series={"per_frame": self.scores})


@register("vbench.imaging_quality", fidelity="equivalent", better="up", needs=("musiq",))
class ImagingQuality(VBenchMetric):
    """MUSIQ (trained on SPAQ) per frame, over 100, mean over frames."""

    def __init__(self, backbones, mode: str = "longer"):
        super().__init__(backbones)
        if mode not in MUSIQ_MODES:
            raise TypeError(f"mode = {mode!r} must be one of {', '.join(MUSIQ_MODES)}")
        self.mode = mode

    def begin(self, clip: Clip) -> str | None:
        self.scores: list[float] = []
        return super().begin(clip)

    def add(self, batch: Batch) -> None:
        scorer = self.backbones.get("musiq")
        for frame in batch.frames:  # one by one: its patches take memory
            self.scores.append(float(scorer(for_musiq(frame.rgb[None], self.mode))) / 100)

    def end(self) -> Outcome:
        return ok(float(np.mean(self.scores)), series={"per_frame": self.scores})
