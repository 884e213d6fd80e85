"""How frames look, in a few numbers without weights; and how much a number drifts, by the definitions in use."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np


def look(frames: np.ndarray) -> np.ndarray:
    """Mean and standard deviation of each colour, and mean absolute gradient along rows and columns, `[8]`."""
    pixels = frames.astype(np.float32)
    colours = pixels.reshape(-1, pixels.shape[-1])
    edges = [np.abs(np.diff(pixels, axis=axis)).mean() for axis in (1, 2)]
    return np.concatenate([colours.mean(0), colours.std(0), edges])


def frame_statistics(rgb: np.ndarray, gray: np.ndarray) -> dict[str, float]:
    """Of one frame: luma, contrast, saturation (HSV), colourfulness (Hasler & Suesstrunk 2003), sharpness (Laplacian
    variance), and the share of pixels at either end of the range."""
    mean, deviation = cv2.meanStdDev(gray)
    saturation = cv2.mean(cv2.cvtColor(rgb, cv2.COLOR_RGB2HSV)[..., 1])[0]
    red, green, blue = (rgb[..., channel].astype(np.float32) for channel in range(3))
    opponents = [cv2.meanStdDev(plane) for plane in (red - green, (red + green) / 2 - blue)]
    spread = sum(float(std[0, 0]) ** 2 for _, std in opponents) ** 0.5
    offset = sum(float(average[0, 0]) ** 2 for average, _ in opponents) ** 0.5
    return {
        "luma": float(mean[0, 0]),
        "contrast": float(deviation[0, 0]),
        "saturation": float(saturation),
        "colourfulness": float(spread + 0.3 * offset),
        "sharpness": float(cv2.meanStdDev(cv2.Laplacian(gray, cv2.CV_32F))[1][0, 0] ** 2),
        "clipped": float(((gray <= 2) | (gray >= 253)).mean()),
    }


def video_drift_error(values: Sequence[float], weights: str = "linear") -> float:
    """VDE of BlockVid / LV-Bench: sum over chunks i = 2..N of w_i |m_i - m_1| / m_1, w_i = N - i + 1 or its logarithm."""
    first, count = values[0], len(values)
    total = 0.0
    for position, value in enumerate(values[1:], start=2):
        weight = count - position + 1
        total += (weight if weights == "linear" else np.log(weight)) * abs(value - first) / abs(first)
    return float(total)


def slope(values: Sequence[float]) -> float:
    """Theil-Sen estimate of the change per step: the median over pairs."""
    curve = np.asarray(values, float)
    first, second = np.triu_indices(len(curve), 1)
    return float(np.median((curve[second] - curve[first]) / (second - first))) if len(first) else 0.0
