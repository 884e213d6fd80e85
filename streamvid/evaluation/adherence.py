"""Prompt adherence of the embedded model, measured by the shipped probe: `python -m streamvid.evaluation.adherence`.

For held-out scenes (pairs of shape and colour that training never saw) it generates videos and asks the probe what a
two-second window shows, attribute by attribute:

- `vae`: renders sent through the VAE, the ceiling of all other rows;
- `start`: seconds 3 to 5 of a stream;
- `minute`: the last two windows of 60 seconds;
- `ten_minutes`: the last two of ten minutes (not measured unless asked for);
- `switch`: the window from 2.5 to 4.5 seconds after one or two attributes of the prompt changed at 5 seconds; `soon`: of the
  attributes that changed, and of those that did not, what the window from 1.5 to 3.5 seconds shows.

Every group of videos is a file of its own in `--parts-folder`, so that a run that is stopped goes on where it was, and one
of more prompts or seeds takes the groups that are the same.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from streamvid.commands.common import parse_assignments
from streamvid.decoding import decode, decoder_state, encode, encoder_state
from streamvid.evaluation.stored import fingerprint, read_stored, release_of, stored, write_stored
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
BLOCKS = {  # part -> length of its videos
    "start": START_BLOCKS,
    "switch": SWITCH_BLOCK + 6,
    "minute": MINUTE_BLOCKS,
    "ten_minutes": 801,
}
ENDS = {  # part -> where its windows end, in pixel frames before the end of the video
    "start": (0,),
    "switch": (16, 0),  # 1.5 and 2.5 s after the switch
    "minute": (WINDOW_FRAMES, 0),
    "ten_minutes": (WINDOW_FRAMES, 0),
}
DEFAULT_PARTS = ("vae", "start", "switch", "minute")
WARM_UP_BLOCKS = 3  # decoded and dropped where only the end of a stream is decoded


@dataclass(frozen=True)
class Group:
    """Videos that are made together: their prompts, seeds, and for `switch` the prompts that follow."""

    part: str
    texts: tuple[str, ...]
    seeds: tuple[int, ...]
    then: tuple[str, ...] = ()


Answer = Callable[[Sequence[Group]], Iterable[torch.Tensor]]


@dataclass(frozen=True)
class Kept:
    """Where answers are kept, and the settings without which they are made anew."""

    folder: Path
    settings: Mapping[str, Any]

    def path(self, part: str, number: int | str) -> Path:
        return self.folder / part / f"{number}.json"


def measure(
    pipe: StreamVidPipeline,
    probe: AttributeProbe,
    prompts: int = 128,
    seeds: Sequence[int] = (0, 1),
    batch: int = 32,
    parts: Sequence[str] = DEFAULT_PARTS,
    answer: Answer | None = None,
    kept: Kept | None = None,
    first: int | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Accuracies by part and attribute, with 95% intervals.

    `options` go to `pipe.stream`; `answer` tells what the probe sees of groups of videos, in other processes say (default:
    here, one after the other). With `kept` every group's answer is a file, and what is there is not made again. With `first`
    only so many of the prompts are measured now.
    """
    result: dict[str, Any] = {"prompts": prompts, "seeds": list(seeds), "options": options}
    result |= {"first": first} if first else {}
    began = time.monotonic()
    scenes = _questions(prompts)[0]
    if "vae" in parts:

        def ceiling():
            return _vae_ceiling(pipe, probe, scenes, batch)

        known = {**kept.settings, "prompts": prompts} if kept else {}
        result["vae"] = stored(kept.path("vae", 0), known, ceiling) if kept else ceiling()
    answer = answer or (lambda groups: (answer_group(pipe, probe, group, **options) for group in groups))
    for part in BLOCKS:
        if part in parts:
            result[part] = summary(part, *right_answers(part, prompts, seeds, answer, batch, kept, first))
    result["seconds"] = round(time.monotonic() - began, 1)
    return result


def right_answers(
    part: str,
    prompts: int,
    seeds: Sequence[int],
    answer: Answer,
    batch: int = 32,
    kept: Kept | None = None,
    first: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of every video, seed by seed: which attributes are right, `[N, windows, 7]`, and which of them changed, `[N, 7]`."""
    scenes, texts, changed, changed_texts = _questions(prompts)
    jobs = [(i, seed) for seed in seeds for i in range(first or prompts)]
    groups = []
    for start in range(0, len(jobs), batch):
        some = jobs[start : start + batch]
        then = tuple(changed_texts[i] for i, _ in some) if part == "switch" else ()
        numbers = tuple(1000 * i + seed for i, seed in some)
        groups.append(Group(part, tuple(texts[i] for i, _ in some), numbers, then))
    known = [{**kept.settings, **asdict(group)} if kept else {} for group in groups]
    told = [read_stored(kept.path(part, n), known[n]) if kept else None for n in range(len(groups))]
    missing = [number for number, answers in enumerate(told) if answers is None]
    began = time.monotonic()
    for number, found in zip(missing, answer([groups[n] for n in missing]), strict=True):
        told[number] = found.tolist()
        if kept:
            write_stored(kept.path(part, number), known[number], told[number])
        done = sum(answers is not None for answers in told)
        print(f"{part}: {done}/{len(groups)} groups, {time.monotonic() - began:.0f} s", flush=True)
    before = torch.tensor([scenes[i].labels() for i, _ in jobs])
    truth = torch.tensor([changed[i].labels() for i, _ in jobs]) if part == "switch" else before
    right = torch.cat([torch.tensor(answers) for answers in told]) == truth[:, None]
    return right, before != truth


def summary(part: str, right: torch.Tensor, changed: torch.Tensor) -> dict[str, Any]:
    """Accuracies of a part from `right_answers`."""
    if part != "switch":
        return _accuracies(right.float())
    soon, late = right[:, 0], right[:, 1]
    return {
        **_accuracies(late[:, None].float()),
        "changed": _share(late[changed]),
        "kept": _share(late[~changed]),
        "soon": {"changed": _share(soon[changed]), "kept": _share(soon[~changed])},
    }


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
    latents: deque[torch.Tensor] = deque(maxlen=MINUTE_BLOCKS)
    for chunk in stream:
        latents.append(chunk.latents)
        if group.then and chunk.index == SWITCH_BLOCK - 1:
            stream.prompt(list(group.then))
    return probe_tail(pipe, probe, torch.cat(list(latents), 2), ENDS[group.part])


def answers_of(model: str, options: Mapping[str, Any]) -> Callable[[Group], torch.Tensor]:
    """`answer_group` of a model that is loaded here."""
    return partial(answer_group, load_pipeline(model), shipped_probe(), **options)


@contextmanager
def in_processes(count: int, make: Callable[[], Callable[[Any], Any]]) -> Iterator[Callable]:
    """Answers to many questions, in order, by as many processes of one thread; `make` loads what answers in each of them.

    With one process it is this one, and loads when the first question comes.
    """
    if count == 1:
        loaded: list[Callable[[Any], Any]] = []

        def here(questions: Iterable[Any]) -> Iterator[Any]:
            for question in questions:
                if not loaded:
                    loaded.append(make())
                yield loaded[0](question)

        yield here
        return
    with get_context("spawn").Pool(count, _load, (make,)) as pool:
        yield lambda questions: pool.imap(_answer_in_worker, questions)


def _load(make: Callable[[], Callable[[Any], Any]]) -> None:
    torch.set_num_threads(1)
    _worker.append(make())


_worker: list[Callable[[Any], Any]] = []  # of a process of `in_processes`


def _answer_in_worker(question: Any) -> Any:
    return _worker[-1](question)


def shipped_probe() -> AttributeProbe:
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
        right.append(probe_tail(pipe, probe, latents) == torch.tensor(scene.labels()))
    quality = reconstruction_quality(pipe.vae, clips=24, frames=81)
    return {
        **_accuracies(torch.cat(right).float()),
        "psnr": quality["psnr"],
        "psnr_last": quality["psnr_last"],
    }


@torch.no_grad()
def probe_tail(
    pipe: StreamVidPipeline, probe: AttributeProbe, latents_BCFHW: torch.Tensor, ends: Sequence[int] = (0,)
) -> torch.Tensor:
    """What the probe sees in windows that end so many pixel frames before the end: class indices `[N, windows, 7]`."""
    per_block = 3
    longest = WINDOW_FRAMES + max(ends)
    needed = -(-longest // 12) + WARM_UP_BLOCKS
    tail = latents_BCFHW[:, :, -needed * per_block :]
    seen = []
    for video in tail.split(8):  # memory: pixels of eight videos at a time
        pixels = decode(pipe.vae, video.to(pipe.vae.dtype), decoder_state(pipe.vae), None)
        frames = pixels[:, :, -longest:].float().add(1).div(2).permute(0, 2, 3, 4, 1)
        starts = [longest - WINDOW_FRAMES - end for end in ends]
        pieces = torch.stack([frames[:, start : start + WINDOW_FRAMES] for start in starts], 1)
        told = probe.classify(pieces.flatten(0, 1))
        seen.append(torch.stack([told[name] for name in ATTRIBUTES], -1).unflatten(0, (-1, len(ends))))
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
    parts = [part for part in ("vae", "start", "minute", "ten_minutes", "switch") if part in result]
    lines = ["| | mean | " + " | ".join(ATTRIBUTES) + " | all right |", "|---" * (3 + len(ATTRIBUTES)) + "|"]
    for part in parts:
        row = result[part]
        cells = [
            f"{row['mean']:.3f} ± {row['interval']:.3f}",
            *(f"{v:.3f}" for v in row["attributes"].values()),
        ]
        lines.append(f"| {part} | " + " | ".join(cells) + f" | {row['all_right']:.3f} |")
    return "\n".join(lines)


def settings(
    pipe: StreamVidPipeline,
    probe: AttributeProbe,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """Without which a kept answer is made anew, whatever it is the answer to."""
    weights = fingerprint(pipe.transformer, pipe.text_encoder, pipe.vae, probe)
    return {"options": dict(options), "weights": weights}


def add_method_options(parser: argparse.ArgumentParser) -> None:
    """Which method is measured, and with which changes."""
    parser.add_argument("--method")
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="OPTION=VALUE",
        help="of the method, e.g. denoising_steps=[1000,500]",
    )


def method_options(options: argparse.Namespace) -> dict[str, Any]:
    """The same as options of a stream."""
    chosen: dict[str, Any] = {"method": options.method} if options.method else {}
    if options.set:
        chosen["overrides"] = parse_assignments(options.set)
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="diorama")
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--first", type=int, help="measure only so many of the prompts, a part of the whole")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--parts", nargs="+", default=DEFAULT_PARTS, choices=("vae", *BLOCKS))
    add_method_options(parser)
    parser.add_argument(
        "--parts-folder", type=Path, default=Path("out/adherence"), help="of a file per group"
    )
    parser.add_argument("--processes", type=int, default=1, help="of one thread each")
    parser.add_argument("--contact-sheet", type=Path, help="also a PNG of some of the videos")
    parser.add_argument("--output", default="out/adherence.json")
    options = parser.parse_args()
    pipe = load_pipeline(options.model)
    probe = shipped_probe()
    extra = method_options(options)
    kept = Kept(options.parts_folder, settings(pipe, probe, extra))
    make = partial(answers_of, options.model, extra)
    many = in_processes(options.processes, make) if options.processes > 1 else nullcontext()
    with many as answer:
        measured = measure(
            pipe,
            probe,
            options.prompts,
            options.seeds,
            parts=options.parts,
            answer=answer,
            kept=kept,
            first=options.first,
            **extra,
        )
    result = {"model": options.model, "release": release_of(options.model), **measured}
    if options.contact_sheet:
        contact_sheet(pipe, options.contact_sheet, prompts=min(12, options.prompts), seeds=options.seeds)
    Path(options.output).parent.mkdir(parents=True, exist_ok=True)
    with replace_atomically(Path(options.output)) as temporary:
        Path(temporary).write_text(json.dumps(result, indent=2) + "\n")
    print(table(result))
    if "switch" in result:
        for name, row in (("2.5 s", result["switch"]), ("1.5 s", result["switch"]["soon"])):
            print(f"from {name} after the switch: changed attributes {row['changed']}, kept {row['kept']}")


if __name__ == "__main__":
    main()
