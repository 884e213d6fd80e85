"""Reading back what the writers wrote."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import imageio.v3 as imageio
import numpy as np

from streamvid.errors import UserError


def read_video(path: str | Path) -> Iterator[np.ndarray]:
    """The frames of a video file, an animation or a folder of PNG files, each uint8 (height, width, 3)."""
    path = Path(path)
    if path.is_dir():
        for file in sorted(path.glob("frame_*.png")):
            yield imageio.imread(file, mode="RGB")
    elif not path.is_file():
        raise UserError(f"video '{path}' does not exist; give a video file or a folder of PNG files.")
    elif path.suffix.lower() in (".gif", ".webp"):
        yield from imageio.imiter(path, plugin="pillow", mode="RGB")
    else:
        try:
            yield from imageio.imiter(path, plugin="FFMPEG")
        except OSError as error:
            raise UserError(f"video '{path}' cannot be read; give a video that ffmpeg can decode.") from error
