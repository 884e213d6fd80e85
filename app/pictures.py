"""Frames as JPEG: thumbnails of shots, and the picture-by-picture feed for browsers without H.264."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

THUMBNAIL_WIDTH = 192


def jpeg(frame: np.ndarray, quality: int = 82) -> bytes:
    """A uint8 frame [H, W, 3]."""
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def thumbnail(frame: np.ndarray) -> bytes:
    """A frame at thumbnail width."""
    picture = Image.fromarray(frame)
    height = max(1, round(picture.height * THUMBNAIL_WIDTH / picture.width))
    buffer = io.BytesIO()
    picture.resize((THUMBNAIL_WIDTH, height), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()
