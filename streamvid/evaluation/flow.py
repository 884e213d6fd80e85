"""Optical flow and VBench's votes on it. A flow is a function of two RGB frames, float32 `[H, W, 2]` in pixels (x, y)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import cv2
import numpy as np

Flow = Callable[[np.ndarray, np.ndarray], np.ndarray]


class DisFlow:
    """OpenCV's dense inverse search (Kroeger et al. 2016), which needs no weights: `fast` or `medium`."""

    def __init__(self, preset: str = "medium"):
        number = {"fast": cv2.DISOPTICAL_FLOW_PRESET_FAST, "medium": cv2.DISOPTICAL_FLOW_PRESET_MEDIUM}
        self.name = f"dis_{preset}"
        self._search = cv2.DISOpticalFlow_create(number[preset])  # type: ignore[attr-defined]

    def of_gray(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Of uint8 `[H, W]`; zero where nothing moves at all (DIS invents motion in flat pictures)."""
        if min(first.shape) < 16 or np.array_equal(first, second):
            return np.zeros((*first.shape, 2), np.float32)
        return self._search.calc(first, second, None)

    def __call__(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        return self.of_gray(*(cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY) for rgb in (first, second)))


def magnitudes(flow: np.ndarray) -> np.ndarray:
    return np.hypot(flow[..., 0], flow[..., 1])


def top_mean(flow: np.ndarray, share: float) -> float:
    """Mean of the largest `share` of flow magnitudes."""
    sizes = magnitudes(flow).ravel()
    count = int(sizes.size * share)
    if count == 0:
        return float(sizes.max())
    return float(np.partition(sizes, sizes.size - count)[sizes.size - count :].mean())


def dynamic_interval(fps: float) -> int:
    """Every how manyth frame dynamic degree looks at: about 8 per second, rounded half to even."""
    return max(1, round(fps / 8))


def dynamic_threshold(height: int, width: int) -> float:
    """Pixels of flow above which a pair counts as moving."""
    return 6 * min(height, width) / 256


def dynamic_votes(frames: int) -> int:
    """Moving pairs that make a video of so many looked-at frames dynamic."""
    return round(4 * frames / 16)


def is_dynamic(top5: Sequence[float], frames: int, height: int, width: int) -> bool:
    """Dynamic degree's vote on the mean of the top 5% of flow of every pair."""
    moving = sum(value > dynamic_threshold(height, width) for value in top5)
    return moving >= dynamic_votes(frames)


def static_threshold(height: int, width: int) -> float:
    return 3 * min(height, width) / 256


def static_votes(frames: int) -> int:
    """Moving pairs that a static video may have."""
    return round(2 * frames / 16)


def is_static(
    top2: Sequence[float], first_to_last: tuple[float, float], frames: int, height: int, width: int
) -> bool:
    """The static filter of temporal flickering: few moving pairs and little motion from first to last and back."""
    threshold, allowed = static_threshold(height, width), static_votes(frames)
    if sum(value > threshold for value in top2) > allowed:
        return False
    return all(value <= threshold * allowed * 2 for value in first_to_last)


def warp_back(image: np.ndarray, flow: np.ndarray) -> np.ndarray:
    """`image` of the later frame seen at the places of the earlier one, for a flow from the earlier to the later."""
    height, width = flow.shape[:2]
    x, y = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    return cv2.remap(
        image, x + flow[..., 0], y + flow[..., 1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
    )


def consistent(forward: np.ndarray, backward: np.ndarray) -> np.ndarray:
    """Where going there and back ends at the start (Sundaram et al. 2010), bool `[H, W]`: not occluded."""
    there = warp_back(backward, forward)
    gap = ((forward + there) ** 2).sum(-1)
    return gap <= 0.01 * ((forward**2).sum(-1) + (there**2).sum(-1)) + 0.5


def between(first: np.ndarray, second: np.ndarray, flow: Flow) -> np.ndarray:
    """The frame in the middle of two: the mean of both, each moved by half the flow towards it; uint8."""
    forward, backward = flow(first, second), flow(second, first)
    a = warp_back(first.astype(np.float32), backward / 2)
    b = warp_back(second.astype(np.float32), forward / 2)
    return ((a + b) / 2).clip(0, 255).astype(np.uint8)
