"""Latents of rendered clips, encoded once: what the student is trained on.

A clip is 5 blocks of 3 latent frames. In a `late` clip the first block is the stream's beginning (the sink) and the others
come from up to a minute later, so that training sees the windows of long streams.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from streamvid.decoding import channels_last, encode, encoder_state
from streamvid.errors import UserError
from streamvid.training.vae_stage import to_pixels
from streamvid.world.render import render_clip
from streamvid.world.sampling import BLOCK_FRAMES, CHANGED, block_start, sample_clip
from streamvid.world.scene import change_scene, sample_scene, sample_scenery

BLOCKS = 5
FRAMES_PER_BLOCK = 3
CLIP_FRAMES = block_start(BLOCKS)  # 57 pixel frames


@dataclass
class Clips:
    """Encoded clips.

    latents `[N, 15, C, H, W]`; labels `[N, 5, 7]`: the scene of every block (3 frames and 1 block of first blocks);
    scenery `[N, 6]`: `Scenery.cells()`; late `[N]`: whether blocks 1.. come from later in the stream.
    """

    latents: torch.Tensor
    labels: torch.Tensor
    scenery: torch.Tensor
    late: torch.Tensor

    def __len__(self) -> int:
        return len(self.latents)


CLIPS, FIRST_BLOCKS = "clips", "first"  # kinds of shards: whole clips, and many first blocks for little work


def load_clips(folder: str | Path, kind: str = CLIPS) -> Clips:
    """All finished shards of a folder."""
    parts = [_load_shard(path) for path in sorted(Path(folder).glob(f"{kind}_*.safetensors"))]
    if not parts:
        raise UserError(
            f"latents = {str(folder)!r} holds no shards of {kind}: run the stage of kind latents first"
        )
    return Clips(
        *(torch.cat([part[name] for part in parts]) for name in ("latents", "labels", "scenery", "late"))
    )


def _load_shard(path: Path) -> dict[str, torch.Tensor]:
    try:
        part = load_file(path)
    except (SafetensorError, OSError):
        part = {}
    if set(part) != {"latents", "labels", "scenery", "late"}:
        raise UserError(f"shard {path} is damaged: delete it and run the stage of kind latents again")
    return part


def encode_shards(
    vae: str | Path,
    output: str | Path,
    shards: int,
    first_block_shards: int,
    clips_per_shard: int = 100,
    seed: int = 0,
    late_share: float = 0.2,
    processes: int = 1,
) -> None:
    """Render and encode `clips_per_shard` clips per shard; finished shards are kept, so a killed run goes on."""
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    every = [(CLIPS, index) for index in range(shards)]
    every += [(FIRST_BLOCKS, index) for index in range(first_block_shards)]
    todo = [shard for shard in every if not _path(output, *shard).exists()]
    jobs = [
        (str(vae), str(output), todo[rank::processes], clips_per_shard, seed, late_share)
        for rank in range(processes)
    ]
    if processes == 1:
        _encode_some(*jobs[0])
        return
    with get_context("spawn").Pool(processes) as pool:
        pool.starmap(_encode_some, jobs)


def _path(output: Path, kind: str, index: int) -> Path:
    return output / f"{kind}_{index:04d}.safetensors"


def _encode_some(
    vae_path: str, output: str, todo: list[tuple[str, int]], count: int, seed: int, late_share: float
) -> None:
    torch.set_num_threads(1)
    vae = channels_last(AutoencoderKLWan.from_pretrained(vae_path, dtype=torch.bfloat16))
    began = time.monotonic()
    for done, (kind, index) in enumerate(todo, 1):
        rng = np.random.default_rng([seed, index, (CLIPS, FIRST_BLOCKS).index(kind)])
        if kind == FIRST_BLOCKS:
            clips = [_clip(vae, rng, blocks=1) for _ in range(count)]
        else:
            clips = [
                _late_clip(vae, rng) if rng.random() < late_share else _clip(vae, rng) for _ in range(count)
            ]
        latents, labels, scenery, late = zip(*clips, strict=True)
        tensors = {
            "latents": torch.stack(latents),
            "labels": torch.tensor(labels),
            "scenery": torch.tensor(scenery),
            "late": torch.tensor(late),
        }
        path = _path(Path(output), kind, index)
        save_file(tensors, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").rename(path)
        left = (time.monotonic() - began) / done * (len(todo) - done)
        print(f"{path.stem}: {done}/{len(todo)}, {left / 60:.1f} min left", flush=True)


@torch.no_grad()
def encode_frames(vae: AutoencoderKLWan, frames: np.ndarray) -> torch.Tensor:
    latents = encode(vae, to_pixels(frames)[None].to(vae.dtype), encoder_state(vae), None)
    return latents[0].transpose(0, 1).half().contiguous()


def _clip(vae: AutoencoderKLWan, rng: np.random.Generator, blocks: int = BLOCKS):
    frames = block_start(blocks)
    shots, scenery = sample_clip(rng, frames, switch_probability=0.4)
    latents = encode_frames(vae, render_clip(shots, scenery, frames))
    labels = [[s for start, s in shots if start <= block_start(b)][-1].labels() for b in range(blocks)]
    return latents, labels, scenery.cells(), False


def _late_clip(vae: AutoencoderKLWan, rng: np.random.Generator):
    """Block 0 of a stream, then blocks m .. m + 3; now and then with a switch in between or inside."""
    scenery = sample_scenery(rng)
    first = int(rng.integers(6, 81))
    scenes = [(0, sample_scene(rng))]
    if rng.random() < 0.5:  # a shot of the past
        scenes.append((int(rng.integers(1, first - 1)), change_scene(rng, scenes[-1][1], 2)))
    if rng.random() < 0.4:  # a switch seen with its whole window
        scenes.append(
            (
                first + 2 + int(rng.integers(2)),
                change_scene(rng, scenes[-1][1], int(rng.integers(1, 3)), weights=CHANGED),
            )
        )
    shots = [(block_start(block), scene) for block, scene in scenes]
    # the segment's own first block warms up the encoder and is dropped
    start = BLOCK_FRAMES * (first - 1)
    frames = render_clip(shots, scenery, CLIP_FRAMES, first_frame=start)
    beginning = encode_frames(vae, render_clip(shots[:1], scenery, block_start(1)))
    latents = torch.cat([beginning, encode_frames(vae, frames)[FRAMES_PER_BLOCK:]])
    blocks = [0, *range(first, first + BLOCKS - 1)]
    labels = [[s for block, s in scenes if block <= b][-1].labels() for b in blocks]
    return latents, labels, scenery.cells(), True
