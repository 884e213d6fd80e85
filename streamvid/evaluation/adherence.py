"""Prompt adherence of the embedded model, measured by the shipped probe: `python -m streamvid.evaluation.adherence`.

For held-out scenes (pairs of shape and colour that training never saw) it generates videos and asks the probe what a
two-second window shows, attribute by attribute:

- `vae`: renders sent through the VAE, the ceiling of all other rows;
- `start`: seconds 3 to 5 of a stream;
- `minute`: the last two windows of 60 seconds;
- `switch`: the window from 2 to 4 seconds after one or two attributes of the prompt changed at 5 seconds.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from streamvid.decoding import decode, decoder_state, encode, encoder_state
from streamvid.io.contact_sheet import ContactSheet, Thumbnail
from streamvid.io.files import replace_atomically
from streamvid.models import load_pipeline, resolve_model
from streamvid.pipelines.pipeline_streamvid import StreamVidPipeline
from streamvid.training.vae_stage import reconstruction_quality, to_pixels
from streamvid.world.probe import WINDOW_FRAMES, AttributeProbe
from streamvid.world.prompts import describe
from streamvid.world.render import render_clip
from streamvid.world.sampling import block_start
from streamvid.world.scene import ATTRIBUTES, Scene, change_scene, sample_scene, sample_scenery

START_BLOCKS, SWITCH_BLOCK, MINUTE_BLOCKS = 7, 7, 81
BLOCKS = {
    "start": START_BLOCKS,
    "switch": SWITCH_BLOCK + 6,
    "minute": MINUTE_BLOCKS,
}  # part -> length of its videos
WARM_UP_BLOCKS = 3  # decoded and dropped where only the end of a stream is decoded


@dataclass(frozen=True)
class Group:
    """Videos that are made together: their prompts, seeds, and for `switch` the prompts that follow."""

    part: str
    texts: tuple[str, ...]
    seeds: tuple[int, ...]
    then: tuple[str, ...] = ()


Answer = Callable[[Sequence[Group]], Iterable[torch.Tensor]]


def measure(
    pipe: StreamVidPipeline,
    probe: AttributeProbe,
    prompts: int = 128,
    seeds: Sequence[int] = (0, 1),
    batch: int = 32,
    parts: Sequence[str] = ("vae", *BLOCKS),
    answer: Answer | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Accuracies by part and attribute, with 95% intervals.

    `options` go to `pipe.stream`; `answer` tells what the probe sees of groups of videos, in other processes say (default:
    here, one after the other).
    """
    scenes, texts, changed, changed_texts = _questions(prompts)
    jobs = [(i, seed) for seed in seeds for i in range(prompts)]
    result: dict[str, Any] = {"prompts": prompts, "seeds": list(seeds), "options": options}
    began = time.monotonic()
    if "vae" in parts:
        result["vae"] = _vae_ceiling(pipe, probe, scenes, batch)
    answer = answer or (lambda groups: (answer_group(pipe, probe, group, **options) for group in groups))
    for part in BLOCKS:
        if part not in parts:
            continue
        groups = []
        for first in range(0, len(jobs), batch):
            some = jobs[first : first + batch]
            then = tuple(changed_texts[i] for i, _ in some) if part == "switch" else ()
            numbers = tuple(1000 * i + seed for i, seed in some)
            groups.append(Group(part, tuple(texts[i] for i, _ in some), numbers, then))
        answers = []
        for told in answer(groups):
            answers.append(told)
            print(
                f"{part}: {sum(map(len, answers))}/{len(jobs)}, {time.monotonic() - began:.0f} s", flush=True
            )
        shown = changed if part == "switch" else scenes
        truth = torch.tensor([shown[i].labels() for i, _ in jobs])
        right = torch.cat(answers) == truth[:, None]  # N windows 7
        result[part] = _accuracies(right.float())
        if part == "switch":
            differs = torch.tensor([scenes[i].labels() for i, _ in jobs]) != truth
            result[part]["changed"] = _share(right[:, 0][differs])
            result[part]["kept"] = _share(right[:, 0][~differs])
    result["seconds"] = round(time.monotonic() - began, 1)
    return result


def _questions(prompts: int) -> tuple[list[Scene], list[str], list[Scene], list[str]]:
    """Held-out scenes with their words, and each with one or two attributes changed."""
    rng = np.random.default_rng(2024)
    scenes = [sample_scene(rng, held_out=True) for _ in range(prompts)]
    texts = [describe(scene, rng) for scene in scenes]
    changed = [change_scene(rng, scene, 1 + i % 2, held_out=None) for i, scene in enumerate(scenes)]
    return scenes, texts, changed, [describe(scene, rng) for scene in changed]


def answer_group(
    pipe: StreamVidPipeline, probe: AttributeProbe, group: Group, **options: Any
) -> torch.Tensor:
    """Make the videos of a group; what the probe sees at their ends: class indices `[N, windows, 7]`."""
    stream = pipe.stream(
        list(group.texts), seed=list(group.seeds), blocks=BLOCKS[group.part], decode_pixels=False, **options
    )
    latents = []
    for chunk in stream:
        latents.append(chunk.latents)
        if group.then and chunk.index == SWITCH_BLOCK - 1:
            stream.prompt(list(group.then))
    return _probe_tail(pipe, probe, latents, windows=2 if group.part == "minute" else 1)


@contextmanager
def in_processes(count: int, model: str, options: dict[str, Any]) -> Iterator[Answer]:
    """`answer` for `measure` in as many processes of one thread, each with its own copy of the model."""
    with get_context("spawn").Pool(count, _load, (model, options)) as pool:
        yield lambda groups: pool.imap(_answer_in_worker, groups)


def _load(model: str, options: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    _worker.update(pipe=load_pipeline(model), probe=_shipped_probe(), options=options)


_worker: dict[str, Any] = {}  # of a process of `in_processes`


def _answer_in_worker(group: Group) -> torch.Tensor:
    return answer_group(_worker["pipe"], _worker["probe"], group, **_worker["options"])


def _shipped_probe() -> AttributeProbe:
    return AttributeProbe.load(Path(resolve_model("diorama")) / "probe" / "probe.safetensors")


def contact_sheet(
    pipe: StreamVidPipeline, path: Path, prompts: int = 12, seeds: Sequence[int] = (0, 1)
) -> None:
    """A picture of what is measured: the first prompts with each seed, after four seconds."""
    _, texts, _, _ = _questions(prompts)
    sheet = ContactSheet(pipe.config.fps)
    for text in texts:
        for seed in seeds:
            video = pipe(text, num_frames=65, seed=1000 * texts.index(text) + seed, output_type="pil").frames[
                0
            ]
            sheet.thumbnails.append(Thumbnail(video[-1], 4.0, f"{text} (seed {seed})"))
    sheet.save(path)


def _vae_ceiling(
    pipe: StreamVidPipeline, probe: AttributeProbe, scenes: Sequence[Scene], batch: int
) -> dict[str, Any]:
    rng = np.random.default_rng(7)
    frames = block_start(START_BLOCKS)
    right = []
    for scene in scenes:
        scenery = sample_scenery(rng)
        pixels = to_pixels(render_clip([(0, scene)], scenery, frames))[None].to(pipe.vae.dtype)
        with torch.no_grad():
            latents = encode(pipe.vae, pixels, encoder_state(pipe.vae), None)
        right.append(_probe_tail(pipe, probe, [latents], windows=1) == torch.tensor(scene.labels()))
    quality = reconstruction_quality(pipe.vae, clips=24, frames=81)
    return {
        **_accuracies(torch.cat(right).float()),
        "psnr": quality["psnr"],
        "psnr_last": quality["psnr_last"],
    }


@torch.no_grad()
def _probe_tail(
    pipe: StreamVidPipeline, probe: AttributeProbe, latents: Sequence[torch.Tensor], windows: int
) -> torch.Tensor:
    """What the probe sees in the last `windows` windows: class indices `[N, windows, 7]`."""
    whole = torch.cat(list(latents), 2)
    per_block = 3
    needed = -(-windows * WINDOW_FRAMES // 12) + WARM_UP_BLOCKS
    tail = whole[:, :, -needed * per_block :]
    seen = []
    for video in tail.split(8):  # memory: pixels of eight videos at a time
        pixels = decode(pipe.vae, video.to(pipe.vae.dtype), decoder_state(pipe.vae), None)
        frames = pixels[:, :, -windows * WINDOW_FRAMES :].float().add(1).div(2)
        pieces = frames.permute(0, 2, 3, 4, 1).unflatten(1, (windows, WINDOW_FRAMES))
        told = probe.classify(pieces.flatten(0, 1))
        seen.append(torch.stack([told[name] for name in ATTRIBUTES], -1).unflatten(0, (-1, windows)))
    return torch.cat(seen)


def _accuracies(right: torch.Tensor) -> dict[str, Any]:
    """Of `[N, windows, 7]` (or `[N, 7]`): mean, worst, all seven at once, and each attribute."""
    flat = right.flatten(0, -2)
    by_name = {name: round(float(value), 4) for name, value in zip(ATTRIBUTES, flat.mean(0), strict=True)}
    per_video = right.flatten(1).mean(1)
    error = 1.96 * float(per_video.std()) / len(per_video) ** 0.5
    return {
        "mean": round(float(flat.mean()), 4),
        "interval": round(error, 4),
        "worst": min(by_name.values()),
        "all_right": round(float(flat.bool().all(-1).float().mean()), 4),
        "attributes": by_name,
    }


def _share(right: torch.Tensor) -> dict[str, float]:
    value = float(right.float().mean())
    return {
        "accuracy": round(value, 4),
        "count": right.numel(),
        "interval": round(1.96 * (value * (1 - value) / right.numel()) ** 0.5, 4),
    }


def table(result: dict[str, Any]) -> str:
    """The measurement as a Markdown table."""
    parts = [part for part in ("vae", "start", "minute", "switch") if part in result]
    lines = ["| | mean | " + " | ".join(ATTRIBUTES) + " | all right |", "|---" * (3 + len(ATTRIBUTES)) + "|"]
    for part in parts:
        row = result[part]
        cells = [
            f"{row['mean']:.3f} ± {row['interval']:.3f}",
            *(f"{v:.3f}" for v in row["attributes"].values()),
        ]
        lines.append(f"| {part} | " + " | ".join(cells) + f" | {row['all_right']:.3f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="diorama")
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--parts", nargs="+", default=["vae", *BLOCKS])
    parser.add_argument("--method")
    parser.add_argument("--processes", type=int, default=1, help="of one thread each")
    parser.add_argument("--contact-sheet", type=Path, help="also a PNG of some of the videos")
    parser.add_argument("--output", default="out/adherence.json")
    options = parser.parse_args()
    pipe = load_pipeline(options.model)
    probe = _shipped_probe()
    extra = {"method": options.method} if options.method else {}
    many = in_processes(options.processes, options.model, extra) if options.processes > 1 else nullcontext()
    with many as answer:
        measured = measure(
            pipe, probe, options.prompts, options.seeds, parts=options.parts, answer=answer, **extra
        )
    result = {"model": options.model, **measured}
    if options.contact_sheet:
        contact_sheet(pipe, options.contact_sheet, prompts=min(12, options.prompts), seeds=options.seeds)
    Path(options.output).parent.mkdir(parents=True, exist_ok=True)
    with replace_atomically(Path(options.output)) as temporary:
        Path(temporary).write_text(json.dumps(result, indent=2) + "\n")
    print(table(result))
    if "switch" in result:
        print(f"changed attributes {result['switch']['changed']}, kept {result['switch']['kept']}")


if __name__ == "__main__":
    main()
