"""What the pipeline returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from diffusers.utils import BaseOutput


@dataclass
class StreamVidPipelineOutput(BaseOutput):
    """Frames of all videos: `pil` list of lists of images, `np` `[B, T, H, W, 3]` in [0, 1], `pt` `[B, T, 3, H, W]` in
    [0, 1], or `latent` `[B, C, F, H, W]`."""

    frames: Any
