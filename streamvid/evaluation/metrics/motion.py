"""Motion and flicker without weights: flicker net of motion, smoothness, seams of chunks, stillstand."""

from __future__ import annotations

import cv2
import numpy as np

from streamvid.evaluation.flow import DisFlow, Flow, between, consistent, magnitudes, warp_back
from streamvid.evaluation.metrics.drift import per_second, segments_of
from streamvid.evaluation.metrics.vbench_quality import TOO_SHORT, FlowVotes
from streamvid.evaluation.registry import Metric, register
from streamvid.evaluation.types import Batch, Clip, Frame, Outcome, ok, skip

FROZEN = 0.25  # grey levels of mean difference below which a frame repeats the one before


class Pairwise(Metric):
    """Base: one value per pair of neighbouring frames."""

    def begin(self, clip: Clip) -> str | None:
        self.values: list[float] = []
        self.started = False
        super().begin(clip)
        return TOO_SHORT if clip.frames < 2 else None

    def add(self, batch: Batch) -> None:
        for frame in batch.frames:
            if self.started:
                self.values.append(self.pair(frame))
            self.started = True

    def pair(self, frame: Frame) -> float:
        """Of a frame and the one before."""
        raise NotImplementedError


@register("long.warp_flicker", fidelity="own", better="up")
class WarpFlicker(Pairwise):
    """One minus the mean difference, over 255, of neighbouring frames after motion is undone, where nothing is occluded."""

    def begin(self, clip: Clip) -> str | None:
        self.hidden: list[float] = []
        return super().begin(clip)

    def pair(self, frame: Frame) -> float:
        assert frame.previous is not None and frame.flow is not None and frame.flow_back is not None
        seen = consistent(frame.flow, frame.flow_back)
        self.hidden.append(1 - float(seen.mean()))
        warped = warp_back(frame.small_gray, frame.flow)
        difference = cv2.absdiff(warped, frame.previous.small_gray)
        return float(difference[seen].mean()) if seen.any() else 0.0

    def end(self) -> Outcome:
        curve = per_second(self.values, self.clip.fps)
        return ok(
            1 - float(np.mean(self.values)) / 255,
            series={"per_second": curve},
            details={"occluded": float(np.mean(self.hidden))},
        )


@register("long.interpolation_smoothness", fidelity="own", better="up")
class InterpolationSmoothness(Metric):
    """VBench's motion smoothness with the middle frame moved there by optical flow: judder, dropped and repeated frames."""

    def begin(self, clip: Clip) -> str | None:
        self.flow = DisFlow("fast")
        self.recent: list[np.ndarray] = []
        self.errors: list[float] = []
        super().begin(clip)
        return "it has fewer than three frames" if clip.frames < 3 else None

    def add(self, batch: Batch) -> None:
        for frame in batch.frames:
            self.recent.append(frame.small_gray)
            if len(self.recent) == 3:
                first, odd, last = self.recent
                predicted = between(first, last, self.flow.of_gray)
                self.errors.append(float(cv2.absdiff(predicted, odd).mean()))
                self.recent = [last]

    def end(self) -> Outcome:
        curve = per_second(self.errors, self.clip.fps / 2)
        return ok(1 - float(np.mean(self.errors)) / 255, series={"per_second": curve})


@register("long.dynamic_degree", fidelity="compatible", better="up")
class DynamicDegreeDis(FlowVotes):
    """Share of videos that move: VBench's votes on DIS optical flow. Jitter and cuts count as motion."""

    def begin(self, clip: Clip) -> str | None:
        self.dis = DisFlow("fast")
        reason = super().begin(clip)
        return None if reason and reason.startswith("its prompt") else reason

    def flow(self) -> Flow:
        return self.dis


@register("long.motion", fidelity="own", better="", unit="short sides per second")
class MotionAmount(Pairwise):
    """Mean length of optical flow per second, in short sides of the picture."""

    def pair(self, frame: Frame) -> float:
        assert frame.flow is not None
        side = min(frame.flow.shape[:2])
        return float(magnitudes(frame.flow).mean()) / side * self.clip.fps

    def end(self) -> Outcome:
        return ok(float(np.mean(self.values)), series={"per_second": per_second(self.values, self.clip.fps)})


@register("long.stagnation", fidelity="own", better="down", unit="share")
class Stagnation(MotionAmount):
    """Share of its motion that a prompt's picture has lost in the last third of its time; the worst prompt counts."""

    def end(self) -> Outcome:
        lost = []
        for part in segments_of(self.clip):
            values = self.values[part.start : max(part.start, part.stop - 1)]
            third = len(values) // 3
            if third < self.clip.fps / 2 or np.median(values[:third]) < 0.01:
                continue  # too short, or it hardly moves from the start
            lost.append(1 - float(np.median(values[-third:]) / np.median(values[:third])))
        if not lost:
            return skip("no prompt's picture moves long enough")
        return ok(max(0.0, *lost))


@register("long.freeze", fidelity="own", better="down", unit="share")
class Freeze(Pairwise):
    """Longest run of frames that repeat the one before, as a share of the video."""

    def pair(self, frame: Frame) -> float:
        return frame.step

    def end(self) -> Outcome:
        longest = run = 0
        for step in self.values:
            run = run + 1 if step < FROZEN else 0
            longest = max(longest, run)
        still = float(np.mean([step < FROZEN for step in self.values]))
        return ok(longest / len(self.values), details={"frames": longest, "still": still})


@register("long.seam", fidelity="own", better="down", unit="robust z")
class Seam(Pairwise):
    """How much more frames differ across chunk borders than around them, in robust deviations of what is usual elsewhere."""

    def begin(self, clip: Clip) -> str | None:
        self.borders = set(clip.video.borders) - {part.start for part in clip.video.segments}
        return super().begin(clip) or (None if self.borders else "its chunk borders are not known")

    def pair(self, frame: Frame) -> float:
        return frame.step

    def end(self) -> Outcome:
        steps = np.array(self.values)
        excess = {}
        for index in range(3, len(steps) - 3):  # step i leads to frame i + 1
            around = np.delete(steps[index - 3 : index + 4], 3)
            excess[index + 1] = float(steps[index] - np.median(around))
        at = [value for frame, value in excess.items() if frame in self.borders]
        elsewhere = np.array([value for frame, value in excess.items() if frame not in self.borders])
        if not at or not len(elsewhere):
            return skip("no chunk border lies inside it")
        usual = np.median(elsewhere)
        spread = max(1.4826 * float(np.median(np.abs(elsewhere - usual))), 0.05)
        return ok(float(np.median(at) - usual) / spread, details={"borders": len(at)})
