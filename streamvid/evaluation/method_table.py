"""All methods on the embedded model, with the same prompts and seeds: `python -m streamvid.evaluation.method_table`.

Every video is 60 seconds of one held-out scene, whose prompt changes at 10 s. Videos are denoised many at a time and never
decoded as a whole: only three windows of two seconds are, each but the first after `WARM_UP` latent frames that fill the
decoder's memory. Per method:

- the numbers of `COLUMNS`;
- `fps`: frames per second of one stream without decoding, after a warm-up of five blocks, all methods in turns, the median;
  `kv_bytes`: of its cache.

Every batch of every method is a file of its own, so that a run that is stopped goes on where it was. With `--processes N`
batches are shared among processes of one thread each; `fps` is measured at the end, when they are done.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from streamvid.decoding import decode, decoder_state
from streamvid.evaluation.curves import look
from streamvid.evaluation.stored import fingerprint, release_of, stored
from streamvid.io.files import replace_atomically
from streamvid.methods import load_method, method_names
from streamvid.models import DEFAULT_MODEL, load_pipeline, load_probe
from streamvid.pipelines.pipeline_streamvid import StreamVidPipeline
from streamvid.world.probe import WINDOW_FRAMES, AttributeProbe
from streamvid.world.prompts import describe
from streamvid.world.scene import ATTRIBUTES, change_scene, sample_scene

LATENT_FRAMES, CHANGE = 240, 39  # 60 s and about 10 s at 16 frames per second, four to a latent frame
OPENING, WINDOW = 1 + WINDOW_FRAMES // 4, WINDOW_FRAMES // 4  # the first latent frame gives one pixel frame
AFTER = 2 * WINDOW  # latent frames from the change to the end of the window after it
WARM_UP = 6  # latent frames decoded and dropped before a window: what is missing then is below one grey level
LAG, LOOKED_AT = 24, 60  # latent frames: the least distance of a repetition, the frames that are looked at
SPEED_BLOCKS, SPEED_WARM_UP = 15, 5
# number -> which way is better, its unit, what it is
COLUMNS: dict[str, tuple[str, str, str]] = {
    "start": ("up", "share", "attributes that the probe finds right in the first two seconds"),
    "after": ("up", "share", "attributes found right 2 to 4 s after the change of prompt"),
    "end": ("up", "share", "attributes found right at 60 s"),
    "changed": (
        "up",
        "share",
        "of `after`, the attributes that the change named: whether the switch is taken",
    ),
    "kept": ("up", "share", "of `after`, the attributes that the change did not name"),
    "drift": ("down", "grey levels", "distance of the look at 60 s from that after the change"),
    "motion": ("", "ratio", "motion at 60 s over motion after the change: 1 keeps it"),
    "repetition": (
        "down",
        "cosine",
        "how much of the last 15 s was seen before: mean over latent frames of the largest similarity with any frame 6 s or "
        "more before it, back to the change (of what differs from the mean; rendered worlds repeat too)",
    ),
}

Job = tuple[dict[str, Any], int]  # a case and a seed


def cases(prompts: int, seed: int = 2025) -> list[dict[str, Any]]:
    """Held-out scenes and what they change to, one or two attributes, with their prompts."""
    chosen = []
    for index in range(prompts):
        rng = np.random.default_rng([seed, index])  # the first cases are the same for any number of them
        scene = sample_scene(rng, held_out=True)
        changed = change_scene(rng, scene, 1 + index % 2, held_out=None)
        texts = describe(scene, rng), describe(changed, rng)
        chosen.append({"labels": (scene.labels(), changed.labels()), "texts": texts})
    return chosen


def all_jobs(prompts: int, seeds: Sequence[int]) -> list[Job]:
    """Every case with every seed, seed by seed."""
    chosen = cases(prompts)
    return [(case, 1000 * index + seed) for seed in seeds for index, case in enumerate(chosen)]


# --- windows of videos ----------------------------------------------------------------------------------------------


class Seen(NamedTuple):
    """A window of one video: the probe's answer per attribute, the look, mean difference of neighbouring frames."""

    labels: torch.Tensor
    look: np.ndarray
    motion: float


def see(pipe: StreamVidPipeline, probe: AttributeProbe, latents_BCFHW: torch.Tensor) -> list[Seen]:
    """The last two seconds of videos that begin with the given latents, a few videos at a time."""
    seen = []
    for videos in latents_BCFHW.split(4):
        pixels = decode(pipe.vae, videos.to(pipe.vae.dtype), decoder_state(pipe.vae))
        frames = pixels[:, :, -WINDOW_FRAMES:].float().add(1).mul(127.5).round().byte()
        frames = frames.permute(0, 2, 3, 4, 1)
        told = probe.classify(frames)
        labels = torch.stack([told[attribute] for attribute in ATTRIBUTES], -1)
        motion = (frames[:, 1:].int() - frames[:, :-1].int()).abs().float().mean((1, 2, 3, 4))
        seen += [Seen(labels[i], look(video.numpy()), float(motion[i])) for i, video in enumerate(frames)]
    return seen


class Openings:
    """`see`, for first windows: many methods make the same one, bit for bit, and share its answer."""

    def __init__(self) -> None:
        self.known: dict[bytes, Seen] = {}

    def see(self, pipe: StreamVidPipeline, probe: AttributeProbe, latents_BCFHW: torch.Tensor) -> list[Seen]:
        keys = [
            hashlib.sha256(video.contiguous().view(torch.uint8).numpy()).digest() for video in latents_BCFHW
        ]
        new = [index for index, key in enumerate(keys) if key not in self.known]
        if new:
            answers = see(pipe, probe, latents_BCFHW[new])
            self.known |= {keys[index]: answer for index, answer in zip(new, answers, strict=True)}
        return [self.known[key] for key in keys]


@torch.no_grad()
def run(
    pipe: StreamVidPipeline,
    probe: AttributeProbe,
    method: str,
    jobs: Sequence[Job],
    openings: Openings | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """One batch of videos, each with its case and seed: what is measured of each; `overrides` are the method's."""
    block = load_method(method, overrides).frames_per_block
    before, after = ([case["texts"][part] for case, _ in jobs] for part in (0, 1))
    stream = pipe.stream(
        before,
        method=method,
        overrides=overrides,
        seed=[s for _, s in jobs],
        blocks=-(-LATENT_FRAMES // block),
        decode_pixels=False,
    )
    parts, change_block = [], -(-CHANGE // block)
    for chunk in stream:
        parts.append(chunk.latents)
        if chunk.index + 1 == change_block:
            stream.prompt(after)
    latents, changed_at = torch.cat(parts, 2), change_block * block
    seen = {
        "start": (openings or Openings()).see(pipe, probe, latents[:, :, :OPENING]),
        "after": see(pipe, probe, _window(latents, changed_at + AFTER)),
        "end": see(pipe, probe, _window(latents, LATENT_FRAMES)),
    }
    return [
        _measured(case, {name: videos[index] for name, videos in seen.items()})
        | {"repetition": repetition(latents[index, :, changed_at:LATENT_FRAMES])}
        for index, (case, _) in enumerate(jobs)
    ]


def _window(latents_BCFHW: torch.Tensor, stop: int) -> torch.Tensor:
    return latents_BCFHW[:, :, max(0, stop - WARM_UP - WINDOW) : stop]


def _measured(case: dict[str, Any], seen: dict[str, Seen]) -> dict[str, float]:
    """Of one video, but for the repetition."""
    old, new = (torch.tensor(labels) for labels in case["labels"])
    right = {name: (seen[name].labels == (old if name == "start" else new)).float() for name in seen}
    return {
        **{name: float(value.mean()) for name, value in right.items()},
        "changed": float(right["after"][old != new].mean()),
        "kept": float(right["after"][old == new].mean()),
        "drift": float(np.linalg.norm(seen["end"].look - seen["after"].look)),
        "motion": seen["end"].motion / max(seen["after"].motion, 1e-3),
    }


def repetition(latents_CFHW: torch.Tensor) -> float:
    """Mean over the last frames of the largest similarity with a frame at least `LAG` before."""
    frames = latents_CFHW.float().transpose(0, 1).flatten(1)
    frames = torch.nn.functional.normalize(frames - frames.mean(0), dim=1)
    nearest = [
        float((frames[: f - LAG + 1] @ frames[f]).max()) for f in range(len(frames) - LOOKED_AT, len(frames))
    ]
    return float(np.mean(nearest))


def speeds(pipe: StreamVidPipeline, methods: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Streams of all methods in turns, a block each, so that what else the machine does slows all of them; medians."""
    prompt = "a large red ball bounces on the sand by day"
    streams = {name: pipe.stream(prompt, method=name, decode_pixels=False) for name in methods}
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(SPEED_WARM_UP + SPEED_BLOCKS):
        for name, stream in streams.items():
            began = time.perf_counter()
            frames = 4 * next(stream).latents.shape[2]
            seconds[name].append((time.perf_counter() - began) / frames)
    return {
        name: {
            "fps": round(1 / float(np.median(seconds[name][SPEED_WARM_UP:])), 1),
            "kv_bytes": stream.cache.bytes,
        }
        for name, stream in streams.items()
    }


def summary(rows: Sequence[dict[str, float]], prompts: int | None = None) -> dict[str, Any]:
    """Mean and half-width of the 95% interval of every number, over prompts; and the means of the prompts.

    Rows are videos, `prompts` of them for every seed (default: each is one of its own), in the order of the prompts.
    """
    found: dict[str, Any] = {"by_prompt": {}}
    for name in rows[0]:
        values = np.array([row[name] for row in rows]).reshape(-1, prompts or len(rows)).mean(0)
        half = 1.96 * values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else 0.0
        found[name] = {"mean": round(float(values.mean()), 4), "interval": round(float(half), 4)}
        found["by_prompt"][name] = [round(float(value), 4) for value in values]
    return found


# --- all of them ----------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """What is measured; a stored part of a run with other settings is made anew."""

    model: str
    methods: tuple[str, ...]
    prompts: int
    seeds: tuple[int, ...]
    batch: int
    folder: Path
    weights: str  # `weights_of` the model

    @property
    def settings(self) -> dict[str, Any]:
        return {"model": self.model, "prompts": self.prompts, "seeds": list(self.seeds)}

    @property
    def jobs(self) -> list[Job]:
        return all_jobs(self.prompts, self.seeds)

    @property
    def batches(self) -> range:
        return range(-(-self.prompts * len(self.seeds) // self.batch))

    def stored(self, method: str, part: str, make: Callable[[], Any]) -> Any:
        """What `make()` gives, from its file where that is there already."""
        known = {**self.settings, "batch": self.batch, "weights": self.weights}
        return stored(self.folder / method / f"{part}.json", known, make)


def weights_of(model: str) -> str:
    """Fingerprint of all that makes and judges a model's videos."""
    pipe = load_pipeline(model)
    probe = load_probe(model) or load_probe(DEFAULT_MODEL)
    assert probe is not None
    return fingerprint(pipe.transformer, pipe.text_encoder, pipe.vae, probe)


class Worker:
    """A copy of the model, and what it has seen."""

    def __init__(self, plan: Plan):
        self.plan, self.openings = plan, Openings()
        self.pipe, probe = load_pipeline(plan.model), load_probe(plan.model)
        if probe is None:
            raise SystemExit(f"model = {plan.model!r} has no probe: give the embedded model")
        self.probe = probe

    def measure(self, number: int) -> dict[str, list[dict[str, float]]]:
        """A batch of videos with every method."""
        size = self.plan.batch
        jobs = self.plan.jobs[number * size : (number + 1) * size]
        rows = {}
        for method in self.plan.methods:
            began = time.monotonic()
            make = partial(run, self.pipe, self.probe, method, jobs, self.openings)
            rows[method] = self.plan.stored(method, str(number), make)
            print(
                f"{method}, batch {number + 1} of {len(self.plan.batches)}: {len(jobs)} videos, "
                f"{time.monotonic() - began:.0f} s",
                flush=True,
            )
        return rows


_worker: Worker | None = None  # of a process


def _load(plan: Plan) -> None:
    global _worker
    torch.set_num_threads(1)
    _worker = Worker(plan)


def _measure(number: int) -> dict[str, list[dict[str, float]]]:
    assert _worker is not None
    return _worker.measure(number)


def measure(plan: Plan, processes: int = 1) -> dict[str, Any]:
    """All methods; what is stored in `plan.folder` with the same settings is not run again."""
    if processes > 1:
        with get_context("spawn").Pool(processes, _load, (plan,)) as pool:
            batches = list(pool.imap(_measure, plan.batches, chunksize=1))
        here = Worker(plan)
    else:
        here = Worker(plan)
        batches = [here.measure(number) for number in plan.batches]
    measured = {"model": plan.model, "methods": list(plan.methods)}
    alone = stored(plan.folder / "speeds.json", measured, partial(speeds, here.pipe, plan.methods))
    results = []
    for method in plan.methods:
        rows = [row for batch in batches for row in batch[method]]
        results.append({"method": method, **alone[method], **summary(rows, plan.prompts)})
    return {**plan.settings, "release": release_of(plan.model), "methods": results}


def table(result: dict[str, Any]) -> str:
    """The measurement as a Markdown table."""
    lines = [
        "| method | " + " | ".join(COLUMNS) + " | fps | KV MB |",
        "|---" * (3 + len(COLUMNS)) + "|",
    ]
    for row in result["methods"]:
        digits = {"drift": 1, "motion": 2}
        cells = [
            f"{row[name]['mean']:.{digits.get(name, 3)}f} ± {row[name]['interval']:.{digits.get(name, 3)}f}"
            for name in COLUMNS
        ]
        lines.append(
            f"| {row['method']} | {' | '.join(cells)} | {row['fps']:.0f} | {row['kv_bytes'] / 1e6:.2f} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--methods", nargs="+", default=method_names())
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--batch", type=int, default=25, help="videos denoised together")
    parser.add_argument("--processes", type=int, default=1, help="of one thread each")
    parser.add_argument("--parts", default="out/method_table", help="folder of a file per method and batch")
    parser.add_argument("--output", default="out/method_table.json")
    options = parser.parse_args(arguments)
    plan = Plan(
        options.model,
        tuple(options.methods),
        options.prompts,
        tuple(options.seeds),
        options.batch,
        Path(options.parts),
        weights_of(options.model),
    )
    result = measure(plan, options.processes)
    Path(options.output).parent.mkdir(parents=True, exist_ok=True)
    with replace_atomically(Path(options.output)) as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()
