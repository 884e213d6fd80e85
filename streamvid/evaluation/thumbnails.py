"""Small pictures of a video inside a page."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

WIDTH = 112  # px
QUALITY = 80  # of JPEG


def frame_count(path: Path) -> int:
    """Frames of a file as its container says; 0 where there is none that can be read."""
    if not path.is_file():
        return 0
    capture = cv2.VideoCapture(str(path))
    try:
        return max(0, int(capture.get(cv2.CAP_PROP_FRAME_COUNT)))
    finally:
        capture.release()


def pictures_of(path: Path, indices: Sequence[int]) -> str:
    """The frames with these numbers, which rise, as `img` elements; those that cannot be decoded are left out."""
    if not path.is_file():
        return ""
    capture, images, position = cv2.VideoCapture(str(path)), "", 0
    try:
        for index in indices:
            if index - position > 48:  # further than decoding on is worth
                capture.set(cv2.CAP_PROP_POS_FRAMES, index)
                position = index
            while position < index and capture.grab():
                position += 1
            found, frame = capture.read()
            position += 1
            if found:
                images += _image(frame, index)
    finally:
        capture.release()
    return images


def _image(frame: np.ndarray, index: int) -> str:
    height = max(1, round(frame.shape[0] * WIDTH / frame.shape[1]))
    small = cv2.resize(frame, (WIDTH, height), interpolation=cv2.INTER_AREA)
    data = cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])[1].tobytes()
    return f'<img alt="frame {index}" src="data:image/jpeg;base64,{base64.b64encode(data).decode()}">'
