"""Given frames: a picture or a clip that a stream goes on from, as pixels and as clean latents."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from PIL import Image, ImageOps

from streamvid.decoding import encode, encoder_state
from streamvid.errors import UserError
from streamvid.io.video import read_video

LATENTS_PER_CALL = 8  # encoded at once, so that a long clip is never in memory as floats
KINDS = {
    "image": "give a path, a PIL image, an array [H, W, 3] or a tensor [3, H, W], or a list with one of them per video",
    "video": "give a path, a list of PIL images, an array [T, H, W, 3] or a tensor [T, 3, H, W], or a batch of them",
}


def given_clips(kind: str, given: Any, videos: int) -> list[Any]:
    """One picture or clip per video of a batch, of whatever form; one for all is repeated."""
    several = given if kind == "image" and isinstance(given, (list, tuple)) else None
    if isinstance(given, (np.ndarray, torch.Tensor)) and given.ndim == (4 if kind == "image" else 5):
        several = list(given)
    clips = [given] * videos if several is None else list(several)
    if len(clips) != videos:
        raise UserError(f"{kind} has {len(clips)} entries for {videos} videos: give one for all or one each")
    return clips


def frames_of(kind: str, clip: Any, height: int, width: int) -> np.ndarray:
    """uint8 `[T, height, width, 3]`, scaled to cover the size and cut around the middle; floats are in [0, 1].

    Raises:
        UserError: it is not a picture or a clip, or cannot be read.
    """
    if isinstance(clip, (str, Path)):
        clip = _read(kind, Path(clip))
    frames: Sequence[Any] = [clip] if kind == "image" else list(clip) if hasattr(clip, "__iter__") else []
    if not frames:
        raise UserError(f"{kind} = {str(clip)[:40]!r} has no frames: {KINDS[kind]}")
    size = width, height
    return np.stack(
        [np.asarray(ImageOps.fit(_picture(kind, frame), size, Image.Resampling.LANCZOS)) for frame in frames]
    )


def _read(kind: str, path: Path) -> Any:
    if kind == "video":
        return list(read_video(path))
    try:
        return Image.open(path)
    except (OSError, ValueError) as error:
        raise UserError(
            f"image = '{path}' cannot be read: give a picture that exists, e.g. a PNG or JPEG file"
        ) from error


def _picture(kind: str, frame: Any) -> Image.Image:
    """One frame, upright and in RGB."""
    if isinstance(frame, Image.Image):
        return ImageOps.exif_transpose(frame).convert("RGB")
    if isinstance(frame, torch.Tensor) and frame.ndim == 3:
        frame = frame.detach().float().cpu().permute(1, 2, 0).numpy()
    if not isinstance(frame, np.ndarray) or frame.ndim != 3 or frame.shape[2] != 3:
        raise UserError(f"{kind} has a frame of another form ({type(frame).__name__}): {KINDS[kind]}")
    if frame.dtype != np.uint8:
        if not (frame.min() >= 0 and frame.max() <= 1):
            raise UserError(f"{kind} has numbers outside [0, 1]: give floats between 0 and 1, or uint8")
        frame = (frame.astype(np.float32) * 255).round().astype(np.uint8)
    return Image.fromarray(frame)


def fill_blocks(frames_THWC: np.ndarray, frames_per_block: int, ratio: int) -> np.ndarray:
    """As many of the last frames as fill whole blocks; too few are preceded by copies of the first.

    Latent frame 0 holds one pixel frame and every other one `ratio`, so m blocks of F latent frames hold
    `ratio (m F - 1) + 1` pixel frames. A picture fills one block.
    """
    blocks = max(1, (len(frames_THWC) + ratio - 1) // (ratio * frames_per_block))
    length = ratio * (blocks * frames_per_block - 1) + 1
    missing = max(0, length - len(frames_THWC))
    return np.concatenate([np.repeat(frames_THWC[:1], missing, 0), frames_THWC])[-length:]


@torch.no_grad()
def encode_frames(vae: AutoencoderKLWan, clips_BTHWC: np.ndarray) -> torch.Tensor:
    """Clean latents `[B, C, F, H, W]` of uint8 frames that fill latent frames, from the streaming encoder."""
    state, ratio = encoder_state(vae), 2 ** sum(vae.config.temperal_downsample)
    step, latents, start = LATENTS_PER_CALL * ratio, [], 0
    while start < clips_BTHWC.shape[1]:
        stop = start + step + (start == 0)
        piece = torch.from_numpy(np.ascontiguousarray(clips_BTHWC[:, start:stop])).to(vae.device)
        pixels = piece.permute(0, 4, 1, 2, 3).to(vae.dtype) / 127.5 - 1
        latents.append(encode(vae, pixels, state))
        start = stop
    return torch.cat(latents, 2)
