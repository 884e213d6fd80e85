"""What the pipeline returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.utils import BaseOutput
from PIL import Image

from streamvid.errors import UserError

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


@dataclass
class StreamVidPipelineOutput(BaseOutput):
    """Frames of all videos: `pil` list of lists of images, `np` `[B, T, H, W, 3]` in [0, 1], `pt` `[B, T, 3, H, W]` in
    [0, 1], or `latent` `[B, C, F, H, W]`."""

    frames: Any


def check_output_type(output_type: str) -> None:
    """Refuse an output type that does not exist.

    Raises:
        UserError: it is none of `OUTPUT_TYPES`.
    """
    if output_type not in OUTPUT_TYPES:
        raise UserError(
            f"output_type = {output_type!r} is not known: choose one of {', '.join(OUTPUT_TYPES)}"
        )


def as_output_type(videos_BTHWC: np.ndarray, output_type: str):
    """Videos of bytes `[B, T, H, W, 3]` as `pil`, `np` or `pt` (see `StreamVidPipelineOutput`)."""
    if output_type == "pil":
        return [[Image.fromarray(frame) for frame in video] for video in videos_BTHWC]
    scaled = videos_BTHWC.astype(np.float32) / 255
    return scaled if output_type == "np" else torch.from_numpy(scaled).permute(0, 1, 4, 2, 3)
