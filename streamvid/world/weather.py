"""Rain and snow: a pattern that repeats in space and falls by one of its periods per block of frames."""

from __future__ import annotations

from functools import lru_cache

import cv2
import numpy as np

from streamvid.world import palette
from streamvid.world.canvas import UNITS, Canvas
from streamvid.world.motion import FRAMES_PER_BLOCK

RAIN_TILE = (32.0, 96.0)  # width and height in units; drops move by (-width, height) per block
RAIN_DROPS = ((6.0, 8.0), (26.0, 40.0), (12.0, 70.0))
RAIN_LENGTH = 15.0
SNOW_TILE = (128.0, 32.0)  # flakes move by (0, height) per block and sway
SNOW_FLAKES = ((9.0, 5.0, 2.3), (33.0, 21.0, 1.9), (60.0, 9.0, 2.5), (86.0, 27.0, 2.0), (109.0, 15.0, 2.4))
SNOW_SWAY = 3.0
STRENGTH = {"rain": 0.5, "snow": 0.92}
COLOUR = {"rain": (222, 232, 246), "snow": (255, 255, 255)}


@lru_cache(maxsize=64)
def _cover(weather: str, step: int, size: int) -> np.ndarray:
    """How much of each pixel drops or flakes cover [size, size] float32, `step` frames into a block."""
    canvas = Canvas(size)
    time = step / FRAMES_PER_BLOCK
    width, height = RAIN_TILE if weather == "rain" else SNOW_TILE
    for left in np.arange(-width, UNITS + width, width):
        for top in np.arange(-height, UNITS + height, height):
            if weather == "rain":
                _draw_drops(canvas, left - time * width, top + time * height)
            else:
                _draw_flakes(canvas, left, top + time * height, time)
    cover = canvas.picture()[..., 0].astype(np.float32) / 255
    return STRENGTH[weather] * cover


def _draw_drops(canvas: Canvas, left: float, top: float) -> None:
    width, height = RAIN_TILE
    along = np.array([-width, height]) / np.hypot(width, height) * RAIN_LENGTH
    for x, y in RAIN_DROPS:
        start = np.array([left + x, top + y])
        canvas.line(np.stack([start, start + along]), (255, 255, 255), 2.0)


def _draw_flakes(canvas: Canvas, left: float, top: float, time: float) -> None:
    for x, y, radius in SNOW_FLAKES:
        sway = SNOW_SWAY * np.sin(2 * np.pi * (time + x / UNITS))
        canvas.ellipse(left + x + sway, top + y, radius, radius, (255, 255, 255))


@lru_cache(maxsize=16)
def _flat(weather: str, sky: str, size: int) -> np.ndarray:
    """A picture of nothing but the colour of drops or flakes at that hour."""
    colour = palette.lit(COLOUR[weather], sky, 0.5)
    return np.full((size, size, 3), np.rint(colour), np.uint8)


def add_weather(picture: np.ndarray, weather: str, sky: str, frame: int) -> np.ndarray:
    """The picture [size, size, 3] uint8 with rain or snow in front of it."""
    if weather == "clear":
        return picture
    size = picture.shape[0]
    cover = _cover(weather, frame % FRAMES_PER_BLOCK, size)
    return cv2.blendLinear(picture, _flat(weather, sky, size), 1 - cover, cover)
