"""`kind: encode`: videos with captions to shards of latents, once, for all stages that need real clips.

A video `name.mp4` has its caption beside it: `name.txt`, or `name.json` with `caption` or `prompt`. Videos lie in a folder,
or in tar files in it (WebDataset's form: members that share a name up to the first dot belong together). They are cut into
clips one after the other, at the model's frames per second, scaled and cropped to its size. What is left at a video's end
and does not fill a clip is not used.
"""

from __future__ import annotations

import json
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

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


@dataclass(frozen=True)
class CaptionedVideo:
    """A video file, or a member of a tar file, with what it shows."""

    path: Path
    caption: str
    member: str | None = None

    @contextmanager
    def file(self) -> Iterator[Path]:
        """The video as a file."""
        if self.member is None:
            yield self.path
            return
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder) / ("video" + PurePosixPath(self.member).suffix)
            with _open_tar(self.path) as archive:
                place.write_bytes(_content(archive, self.path, self.member))
            yield place


def captioned_videos(folder: str | Path) -> list[CaptionedVideo]:
    """Videos under a folder and in its tar files, or in one tar file, in the order of their names, with their captions.

    Raises:
        UserError: there are none, one lacks its caption, or a tar file is damaged.
    """
    root = Path(folder)
    files = [root] if root.is_file() else sorted(root.rglob("*"))
    found: list[CaptionedVideo] = []
    for path in files:
        if path.suffix.lower() == ".tar":
            found += _tar_videos(path)
        elif path.suffix.lower() in VIDEOS:
            beside = [p for p in (path.with_suffix(".txt"), path.with_suffix(".json")) if p.is_file()]
            contents = {p.suffix: _read_beside(p, path) for p in beside}
            text = path.with_suffix(".txt").name
            found.append(CaptionedVideo(path, _caption(str(path), contents, text)))
    if not found:
        raise UserError(
            f"videos = {str(folder)!r} holds no videos: give a folder with {', '.join(VIDEOS)}, or .tar files of them"
        )
    return found


def _read_beside(path: Path, video: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(
            f"the caption beside {video} cannot be read ({type(error).__name__}): mend it"
        ) from None


def _tar_videos(path: Path) -> list[CaptionedVideo]:
    """Of one tar file, by key: what comes before the first dot of a member's name."""
    keys: dict[str, dict[str, str]] = {}
    found = []
    with _open_tar(path) as archive:
        for name in _names(archive, path):
            pure = PurePosixPath(name)
            stem, _, suffix = pure.name.partition(".")
            if not stem:  # a hidden file
                continue
            keys.setdefault(str(pure.with_name(stem)), {})["." + suffix.lower()] = name
        for key, members in sorted(keys.items()):
            for video in (members[suffix] for suffix in members if suffix in VIDEOS):
                beside = {s: _content(archive, path, members[s]) for s in (".txt", ".json") if s in members}
                where = f"{path}: {video}"
                caption = _caption(where, beside, PurePosixPath(key).name + ".txt")
                found.append(CaptionedVideo(path, caption, video))
    return found


@contextmanager
def _open_tar(path: Path) -> Iterator[tarfile.TarFile]:
    try:
        with tarfile.open(path, "r:") as archive:
            yield archive
    except (OSError, tarfile.TarError, EOFError) as error:
        raise UserError(
            f"{path} is no tar file that can be read ({error}): make it again, not compressed"
        ) from None


def _names(archive: tarfile.TarFile, path: Path) -> list[str]:
    """Of the members that are files. A tar file that is cut short is told, where tarfile would stop without a word."""
    members = archive.getmembers()
    end = max((m.offset_data + m.size for m in members), default=0)
    if path.stat().st_size < end + 512:
        raise UserError(f"{path} is cut short: copy or make it again")
    return [member.name for member in members if member.isfile()]


def _content(archive: tarfile.TarFile, path: Path, name: str) -> bytes:
    file = archive.extractfile(name)
    if file is None:
        raise UserError(f"{path}: {name} is no file: make it again")
    return file.read()


def _caption(video: str, beside: Mapping[Any, bytes], wanted: str) -> str:
    """From the contents of the .txt or .json file beside a video; `wanted` is the name that a missing one should have."""
    caption = ""
    try:
        if ".txt" in beside:
            caption = beside[".txt"].decode("utf-8")
        elif ".json" in beside:
            row = json.loads(beside[".json"])
            caption = row.get("caption") or row.get("prompt") or ""
    except (ValueError, AttributeError) as error:
        raise UserError(
            f"the caption beside {video} cannot be read ({type(error).__name__}): mend it"
        ) from None
    if not isinstance(caption, str) or not caption.strip():
        raise UserError(f"{video} has no caption: write what it shows into {wanted} beside it")
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
    """Encode all videos; finished shards are kept, so a killed job goes on.

    Args:
        videos: a folder of videos or tar files, or one tar file; model: whose VAE, size and rate are used.
        frames: latent frames of a clip.
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
            for video in group:
                with video.file() as file:
                    for clip in clips_of(file, 1 + ratio * (frames - 1), fps, height, width):
                        latents.append(_encoded(vae, clip))
                        prompts.append([video.caption])
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
