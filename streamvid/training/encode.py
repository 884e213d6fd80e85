"""`kind: encode`: a folder of videos with captions to shards of latents, once, for all stages that need real clips.

A video `name.mp4` has its caption beside it: `name.txt`, or `name.json` with `caption` or `prompt`. Videos are cut into
clips one after the other, at the model's frames per second, scaled and cropped to its size. What is left at a video's end
and does not fill a clip is not used.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan

from streamvid.checkpoints import load_vae
from streamvid.decoding import encode, encoder_state
from streamvid.errors import UserError
from streamvid.io.video import read_video
from streamvid.models import choose_device, resolve_model
from streamvid.training.datasets import ShardWriter, batches

VIDEOS = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".gif", ".webp")


def captioned_videos(folder: str | Path) -> list[tuple[Path, str]]:
    """Videos under a folder, in the order of their names, with their captions.

    Raises:
        UserError: there are none, or one lacks its caption.
    """
    videos = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in VIDEOS)
    if not videos:
        raise UserError(f"videos = {str(folder)!r} holds no videos: give a folder with {', '.join(VIDEOS)}")
    return [(video, _caption(video)) for video in videos]


def _caption(video: Path) -> str:
    text, facts = video.with_suffix(".txt"), video.with_suffix(".json")
    caption = ""
    try:
        if text.is_file():
            caption = text.read_text(encoding="utf-8")
        elif facts.is_file():
            row = json.loads(facts.read_text(encoding="utf-8"))
            caption = row.get("caption") or row.get("prompt") or ""
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(
            f"the caption beside {video} cannot be read ({type(error).__name__}): mend it"
        ) from None
    if not isinstance(caption, str) or not caption.strip():
        raise UserError(f"{video} has no caption: write what it shows into {text.name} beside it")
    return " ".join(caption.split())


def clips_of(video: Path, frames: int, fps: float, height: int, width: int) -> Iterator[torch.Tensor]:
    """Clips `[3, frames, height, width]` in [-1, 1]: every frame the one shown at its time."""
    meta = imageio.immeta(video, plugin="FFMPEG") if video.suffix.lower() not in (".gif", ".webp") else {}
    rate, due, clip = float(meta.get("fps", fps)), 0, []
    for index, frame in enumerate(read_video(video)):
        while round(due / fps * rate) <= index:
            clip.append(_fitted(frame, height, width))
            due += 1
            if len(clip) == frames:
                yield torch.stack(clip, 1)
                clip = []


def _fitted(frame: np.ndarray, height: int, width: int) -> torch.Tensor:
    """Scaled until it covers the size, then cropped in the middle."""
    pixels = torch.from_numpy(np.ascontiguousarray(frame)).permute(2, 0, 1)[None].float()
    scale = max(height / pixels.shape[-2], width / pixels.shape[-1])
    size = [max(height, round(pixels.shape[-2] * scale)), max(width, round(pixels.shape[-1] * scale))]
    if size != list(pixels.shape[-2:]):
        pixels = F.interpolate(pixels, size, mode="bilinear", antialias=True)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return pixels[0, :, top : top + height, left : left + width] / 127.5 - 1


def encode_folder(
    videos: str,
    output: str,
    model: str,
    frames: int = 21,
    height: int | None = None,
    width: int | None = None,
    fps: float | None = None,
    videos_per_shard: int = 16,
    device: str = "auto",
    processes: int = 1,
) -> None:
    """Encode a folder; finished shards are kept, so a killed job goes on.

    Args:
        videos: the folder; model: whose VAE, size and rate are used; frames: latent frames of a clip.
    """
    if processes > 1:
        raise UserError("kind = encode runs in one process: leave --processes out")
    source = Path(resolve_model(model))
    index = source / "model_index.json"
    if not index.is_file():
        raise UserError(f"model = {model!r} is not on this machine: download it to a folder and give that")
    facts = json.loads(index.read_text())
    height, width, fps = height or facts["height"], width or facts["width"], fps or facts["fps"]
    named = captioned_videos(videos)
    vae = load_vae(source, dtype=torch.float32, device=choose_device(device))
    ratio = 2 ** sum(vae.config.temperal_downsample)
    shape = [frames, *_latent_shape(vae, height, width)]
    writer = ShardWriter(
        output, {"kind": "latents", "shape": shape, "vae": model, "fps": fps, "pixels": [height, width]}
    )
    count = 0
    for shard, group in enumerate(batches(named, videos_per_shard)):
        name = f"clips_{shard:05d}"
        if name not in writer:
            latents, prompts = [], []
            for video, caption in group:
                for clip in clips_of(video, 1 + ratio * (frames - 1), fps, height, width):
                    latents.append(_encoded(vae, clip))
                    prompts.append([caption])
            if latents:
                writer.write(name, torch.stack(latents), prompts)
        count += writer.manifest["shards"].get(name, {"clips": 0})["clips"]
        done = min(len(named), (shard + 1) * videos_per_shard)
        print(f"{name}: {done}/{len(named)} videos, {count} clips", flush=True)
    if not count:
        seconds = (1 + ratio * (frames - 1)) / fps
        raise UserError(
            f"videos = {videos!r} holds no video of {seconds:.1f} s: lower frames = {frames} or give longer ones"
        )


def _latent_shape(vae: AutoencoderKLWan, height: int, width: int) -> tuple[int, int, int]:
    ratio = 2 ** len(vae.config.temperal_downsample) * (vae.config.patch_size or 1)
    if height % ratio or width % ratio:
        raise UserError(f"height = {height} and width = {width} must be multiples of {ratio}")
    return vae.config.z_dim, height // ratio, width // ratio


@torch.no_grad()
def _encoded(vae: AutoencoderKLWan, clip_CTHW: torch.Tensor) -> torch.Tensor:
    """Latents `[F, C, H, W]` in half precision."""
    latents = encode(vae, clip_CTHW[None].to(vae.device, vae.dtype), encoder_state(vae), None)
    return latents[0].transpose(0, 1).half().cpu()
