"""`kind: world_clips`: clips of the embedded world as shards of latents, for the published chain of stages.

Two folders under `output`. `starts` holds clips from the beginning of a stream: what a causal student learns. `later` holds
clips from somewhere in it, whose first latent frame is a still, as streaming long tuning shows them to the teacher; in a
share of them the prompt changed after the first block, and the clip has the new one. A bidirectional teacher learns both.

`prompts.jsonl` has the words of streams that are never rendered: a prompt and two that it changes to.

Beside each clip lies a weight per place: where the subject is, the loss counts up to four times (a tenth of the picture, on
which five of the seven attributes depend).
"""

from __future__ import annotations

import json
import time
from contextlib import nullcontext
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan

from streamvid.decoding import channels_last
from streamvid.errors import UserError
from streamvid.io.files import replace_atomically
from streamvid.training.datasets import ShardWriter
from streamvid.training.latents import encode_frames
from streamvid.world.prompts import describe
from streamvid.world.render import Shots, render_clip
from streamvid.world.sampling import BLOCK_FRAMES, block_start
from streamvid.world.scene import Scenery, change_scene, sample_scene, sample_scenery

STARTS, LATER = "starts", "later"
LAST_BLOCK = 80  # a minute

Encoded = tuple[str, int, torch.Tensor, torch.Tensor, list[str]]  # kind, shard, latents, weights, prompts


def make_world_clips(
    vae: str,
    output: str,
    starts: int,
    later: int,
    frames: int = 21,
    clips_per_shard: int = 50,
    switch_share: float = 0.4,
    prompts: int = 4000,
    seed: int = 0,
    processes: int = 1,
) -> None:
    """Render and encode; shards that are there are kept, so a killed job goes on.

    Args:
        vae: folder of the VAE; starts, later: shards of each kind; frames: latent frames of a clip.
        switch_share: of later clips, how many change their prompt after the first block; prompts: lines of `prompts.jsonl`.
    """
    if frames % 3 or min(starts, later) < 0 or starts + later < 1:
        raise UserError(
            f"stage.frames = {frames} must be a multiple of 3, and stage.starts + stage.later at least 1"
        )
    Path(output).mkdir(parents=True, exist_ok=True)
    with replace_atomically(Path(output) / "prompts.jsonl") as temporary:
        temporary.write_text(
            "".join(json.dumps({"prompts": row}) + "\n" for row in draw_prompts(prompts, seed))
        )
    config = AutoencoderKLWan.load_config(vae)
    ratio = 2 ** len(config["temperal_downsample"]) * (config.get("patch_size") or 1)
    shape = [frames, config["z_dim"], 128 // ratio, 128 // ratio]
    facts = {"kind": "latents", "shape": shape, "weights": True, "seed": seed}
    writers = {
        kind: ShardWriter(Path(output) / kind, facts)
        for kind, count in ((STARTS, starts), (LATER, later))
        if count
    }
    todo = [
        (vae, kind, number, clips_per_shard, frames, ratio, switch_share, seed)
        for kind, count in ((STARTS, starts), (LATER, later))
        for number in range(count)
        if f"clips_{number:05d}" not in writers[kind]
    ]
    began = time.monotonic()
    many = get_context("spawn").Pool(processes) if processes > 1 else nullcontext()
    with many as pool:
        shards = pool.imap(_encode_shard, todo) if pool else map(_encode_shard, todo)
        for done, (kind, number, latents, weights, told) in enumerate(shards, 1):
            writers[kind].write(f"clips_{number:05d}", latents, [[p] for p in told], weights=weights)
            left = (time.monotonic() - began) / done * (len(todo) - done)
            print(f"{kind} {number}: {done}/{len(todo)}, {left / 60:.1f} min left", flush=True)


def _encode_shard(job: tuple) -> Encoded:
    vae_folder, kind, number, count, frames, ratio, switch_share, seed = job
    torch.set_num_threads(1)
    vae = channels_last(AutoencoderKLWan.from_pretrained(vae_folder, dtype=torch.bfloat16))
    rng = np.random.default_rng([seed, number, (STARTS, LATER).index(kind)])
    latents, weights, prompts = [], [], []
    for _ in range(count):
        shots, scenery, first, prompt = draw_clip(rng, kind, switch_share)
        pixels = 1 + 4 * (frames - 1)
        latents.append(encode_frames(vae, render_clip(shots, scenery, pixels, first_frame=first)))
        weights.append(subject_weights(shots, scenery, pixels, first, ratio))
        prompts.append(prompt)
    return kind, number, torch.stack(latents), torch.stack(weights), prompts


def draw_prompts(count: int, seed: int) -> list[list[str]]:
    """Prompts of streams that change twice, one or two attributes each time; none of them shows what is held out."""
    rng = np.random.default_rng([seed, 2])
    rows = []
    for _ in range(count):
        scenes = [sample_scene(rng)]
        for _ in range(2):
            scenes.append(change_scene(rng, scenes[-1], int(rng.integers(1, 3))))
        rows.append([describe(scene, rng) for scene in scenes])
    return rows


def draw_clip(rng: np.random.Generator, kind: str, switch_share: float) -> tuple[Shots, Scenery, int, str]:
    """Shots, scenery, first pixel frame and prompt of a clip."""
    scenery, scene = sample_scenery(rng), sample_scene(rng)
    if kind == STARTS:
        return [(0, scene)], scenery, 0, describe(scene, rng)
    # a chunk of a stream begins with its block `block`; the clip with the last picture of the frame one block before it
    block = int(rng.integers(2, LAST_BLOCK))
    shots = [(0, scene)]
    if rng.random() < switch_share:
        scene = change_scene(rng, scene, int(rng.integers(1, 3)))
        shots.append((block_start(block), scene))
    return shots, scenery, BLOCK_FRAMES * (block - 1), describe(scene, rng)


def subject_weights(
    shots: Shots, scenery: Scenery, pixels: int, first_frame: int, ratio: int
) -> torch.Tensor:
    """Loss weights `[F, H, W]`: 0.4 where the subject is not, up to 4 where it is (by what changes when it is left out)."""
    shown, empty = (
        torch.from_numpy(
            render_clip(shots, scenery, pixels, first_frame=first_frame, subject=subject)
        ).float()
        for subject in (True, False)
    )
    places = F.avg_pool2d((shown - empty).abs().mean(-1)[:, None], ratio)[:, 0]  # T H W
    frames = torch.cat([places[:1], places[1:].unflatten(0, (-1, 4)).mean(1)])
    return (0.4 + 0.6 * (frames / frames.mean().clamp_min(1e-6)).clamp_max(6)).half()
