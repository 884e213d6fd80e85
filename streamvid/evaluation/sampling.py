"""Which frames VBench looks at and how it prepares them, restated so that no package of it is needed.

Functions on pixels take uint8 frames `[T, H, W, 3]` and give float32 `[T, 3, h, w]`.
"""

from __future__ import annotations

import re
from pathlib import PurePath

import numpy as np
import torch
import torch.nn.functional as F

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MUSIQ_MODES = ("longer", "shorter", "shorter_centercrop", "None")


def middle_frames(count: int, total: int) -> list[int]:
    """The middle of each of `count` equal intervals of `total` frames; the last is repeated where there are fewer."""
    taken = min(count, total)
    cuts = [int(cut) for cut in np.linspace(0, total, taken + 1)]
    middles = [(cuts[i] + cuts[i + 1] - 1) // 2 for i in range(taken)]
    return middles + [middles[-1]] * (count - taken)


def frames_per_second(wanted: float, total: int, fps: float) -> list[int]:
    """Frames at `wanted` per second, each from the middle of its interval, rounded half to even."""
    step = 1 / wanted
    times = np.arange(step / 2, total / fps + step / 2, step)
    return [int(frame) for frame in np.around(times * fps) if frame < total]


def prompt_of_name(name: str) -> str:
    """The prompt that VBench reads from a file's name: without suffix, and without one trailing `-<digits>`."""
    return re.sub(r"-\d+$", "", PurePath(name).stem)


def to_tensor(frames: np.ndarray) -> torch.Tensor:
    """uint8 `[T, H, W, 3]` as float32 0..255 `[T, 3, H, W]`."""
    return torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float()


def resize(images: torch.Tensor, height: int, width: int, mode: str) -> torch.Tensor:
    """Without antialiasing, as on tensors in the official code."""
    if images.shape[-2:] == (height, width):
        return images
    return F.interpolate(images, (height, width), mode=mode, align_corners=False)


def resize_short_side(images: torch.Tensor, side: int, mode: str) -> torch.Tensor:
    height, width = images.shape[-2:]
    if height <= width:
        return resize(images, side, int(side * width / height), mode)
    return resize(images, int(side * height / width), side, mode)


def centre_crop(images: torch.Tensor, side: int) -> torch.Tensor:
    height, width = images.shape[-2:]
    top, left = round((height - side) / 2), round((width - side) / 2)
    return images[..., top : top + side, left : left + side]


def normalise(images: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    """0..255 to what a network takes."""
    columns = [torch.tensor(values).view(3, 1, 1) for values in (mean, std)]
    return (images / 255 - columns[0]) / columns[1]


def for_clip(frames: np.ndarray, side: int = 224) -> torch.Tensor:
    """Bicubic to a short side of `side`, cropped to the centre. Overshoot is not clipped."""
    return normalise(
        centre_crop(resize_short_side(to_tensor(frames), side, "bicubic"), side), CLIP_MEAN, CLIP_STD
    )


def for_dino(frames: np.ndarray, side: int = 224) -> torch.Tensor:
    """Bilinear to a short side of `side`, not cropped."""
    return normalise(resize_short_side(to_tensor(frames), side, "bilinear"), IMAGENET_MEAN, IMAGENET_STD)


def for_dinov2(frames: np.ndarray) -> torch.Tensor:
    """Bilinear to a short side of 256, cropped to 224."""
    images = centre_crop(resize_short_side(to_tensor(frames), 256, "bilinear"), 224)
    return normalise(images, IMAGENET_MEAN, IMAGENET_STD)


def musiq_size(height: int, width: int, mode: str = "longer") -> tuple[int, int]:
    """Size to resize to before MUSIQ; only larger pictures change."""
    reference = {"longer": max(height, width), "None": 0}.get(mode, min(height, width))
    if reference <= 512:
        return height, width
    scale = 512.0 / reference
    return int(scale * height), int(scale * width)


def for_musiq(frames: np.ndarray, mode: str = "longer") -> torch.Tensor:
    """Resized where larger than 512 (mode `longer`: the longer side), as 0..1."""
    images = to_tensor(frames)
    height, width = musiq_size(images.shape[-2], images.shape[-1], mode)
    images = resize(images, height, width, "bilinear")
    if mode == "shorter_centercrop" and min(frames.shape[1:3]) > 512:
        images = centre_crop(images, 512)
    return images / 255
