"""Anti-aliased drawing in diorama units on a picture of twice the size."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from streamvid.world.palette import Colour

UNITS = 128  # width and height of the diorama, in units; one unit is one pixel of a 128 x 128 picture
OVERSAMPLING = 2
SHIFT = 4  # bits of sub-pixel precision in OpenCV's integer coordinates


class Canvas:
    """A square RGB picture, drawn at OVERSAMPLING times its size.

    Positions and lengths are in units: x from the left, y from the top. The array `pixels` is [S, S, 3] uint8
    with S = OVERSAMPLING * size.
    """

    def __init__(self, size: int, pixels: np.ndarray | None = None):
        side = OVERSAMPLING * size
        self.size = size
        self.scale = side / UNITS
        self.pixels = np.zeros((side, side, 3), np.uint8) if pixels is None else pixels

    def _fixed(self, points: np.ndarray) -> np.ndarray:
        """Points [N, 2] in units to OpenCV's fixed-point integers, whose whole numbers are pixel centres."""
        unit, half = self.scale * (1 << SHIFT), 1 << (SHIFT - 1)
        return np.rint(points * unit - half).astype(np.int32)

    def polygon(self, contours: np.ndarray | Sequence[np.ndarray], colour: Colour) -> None:
        """Fill one contour [N, 2], or several with holes where they overlap."""
        contours = [contours] if isinstance(contours, np.ndarray) else contours
        cv2.fillPoly(self.pixels, [self._fixed(c) for c in contours], colour, cv2.LINE_AA, SHIFT)

    def outline(self, contours: np.ndarray | Sequence[np.ndarray], colour: Colour, width: float) -> None:
        """Draw closed contours with a pen of that width."""
        contours = [contours] if isinstance(contours, np.ndarray) else contours
        pen = max(1, round(width * self.scale))
        cv2.polylines(self.pixels, [self._fixed(c) for c in contours], True, colour, pen, cv2.LINE_AA, SHIFT)

    def line(self, points: np.ndarray, colour: Colour, width: float) -> None:
        """Draw an open line through points [N, 2]."""
        pen = max(1, round(width * self.scale))
        cv2.polylines(self.pixels, [self._fixed(points)], False, colour, pen, cv2.LINE_AA, SHIFT)

    def ellipse(
        self, x: float, y: float, width: float, height: float, colour: Colour, angle: float = 0
    ) -> None:
        """Fill an ellipse with half axes width and height, turned clockwise by angle (degrees)."""
        unit, half = self.scale * (1 << SHIFT), 1 << (SHIFT - 1)
        centre = (round(x * unit) - half, round(y * unit) - half)
        axes = (round(width * unit), round(height * unit))
        cv2.ellipse(self.pixels, centre, axes, angle, 0, 360, colour, cv2.FILLED, cv2.LINE_AA, SHIFT)

    def glow(self, x: float, y: float, width: float, height: float, colour: Colour, strength: float) -> None:
        """Blend a soft Gaussian spot over the picture; width and height are where it has faded to 1/e."""
        reach = 2.0
        side = self.pixels.shape[0]
        left, right = (int(np.clip((x + s * reach * width) * self.scale, 0, side)) for s in (-1, 1))
        top, bottom = (int(np.clip((y + s * reach * height) * self.scale, 0, side)) for s in (-1, 1))
        if left >= right or top >= bottom:
            return
        across = ((np.arange(left, right, dtype=np.float32) + 0.5) / self.scale - x) / width
        down = ((np.arange(top, bottom, dtype=np.float32) + 0.5) / self.scale - y) / height
        floor = np.float32(np.exp(-(reach**2)))
        spot = np.maximum(np.exp(-(down**2))[:, None] * np.exp(-(across**2))[None] - floor, 0)
        share = np.float32(strength / (1 - floor)) * spot
        region = self.pixels[top:bottom, left:right]
        flat = np.empty_like(region)
        flat[:] = np.rint(colour).astype(np.uint8)
        region[:] = cv2.blendLinear(np.ascontiguousarray(region), flat, 1 - share, share)

    def picture(self) -> np.ndarray:
        """The finished picture [size, size, 3] uint8."""
        return cv2.resize(self.pixels, (self.size, self.size), interpolation=cv2.INTER_AREA)
