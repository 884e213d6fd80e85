"""All methods on the embedded model, with the same prompts and seeds: `python -m streamvid.evaluation.method_table`.

Every video is 60 seconds of one held-out scene whose prompt changes in the middle. Only the windows that are looked at are
decoded. Per method:

- `start`, `before`, `after`, `end`: share of attributes that the probe finds right at 5 s, at 30 s (before the change), 2 to
  4 s after it and at 60 s; `changed`, `kept`: of `after`, the attributes that the change named and the others;
- `drift`: distance of the look at 30 s from that at 5 s, in grey levels; `motion`: motion at 30 s over motion at 5 s;
- `repetition`: how much of the last 15 s before the change was seen before: mean over latent frames of the largest cosine
  similarity with any frame 6 s or more before it (of what differs from the video's mean; rendered worlds repeat too);
- `fps`: frames per second of one stream without decoding, after a warm-up of five blocks; `kv_bytes`: of its cache.

A method's result is a file of its own, so that a run that is stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from streamvid.decoding import decode, decoder_state
from streamvid.evaluation.appearance import look
from streamvid.io.files import replace_atomically
from streamvid.methods import load_method, method_names
from streamvid.models import DEFAULT_MODEL, load_pipeline, load_probe
from streamvid.pipelines.pipeline_streamvid import StreamVidPipeline
from streamvid.world.probe import WINDOW_FRAMES, AttributeProbe
from streamvid.world.prompts import describe
from streamvid.world.scene import ATTRIBUTES, change_scene, sample_scene

LATENT_FRAMES, CHANGE = 240, 120  # of 60 s at 16 frames per second, four to a latent frame
WINDOWS = {"start": 20, "before": CHANGE, "after": CHANGE + 16, "end": LATENT_FRAMES}  # where they end
WARM_UP = 9  # latent frames decoded and dropped before a window
LAG, LOOKED_AT = 24, 60  # latent frames: the least distance of a repetition, the frames that are looked at
SPEED_BLOCKS, SPEED_WARM_UP = 15, 5


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


@torch.no_grad()
def run(
    pipe: StreamVidPipeline, probe: AttributeProbe, method: str, jobs: Sequence[tuple[dict[str, Any], int]]
) -> list[dict[str, Any]]:
    """One batch of videos, each with its case and seed: what is measured of each."""
    block = load_method(method).frames_per_block
    before, after = ([case["texts"][part] for case, _ in jobs] for part in (0, 1))
    stream = pipe.stream(
        before,
        method=method,
        seed=[s for _, s in jobs],
        blocks=-(-LATENT_FRAMES // block),
        decode_pixels=False,
    )
    parts = []
    for chunk in stream:
        parts.append(chunk.latents)
        if chunk.index + 1 == -(-CHANGE // block):
            stream.prompt(after)
    latents = torch.cat(parts, 2)
    seen, looks, motion = {}, {}, {}
    for name, stop in WINDOWS.items():
        pixels = _window(pipe, latents[:, :, max(0, stop - WARM_UP - WINDOW_FRAMES // 4) : stop])
        told = probe.classify(pixels)
        seen[name] = torch.stack([told[attribute] for attribute in ATTRIBUTES], -1)
        looks[name] = [look(video.numpy()) for video in pixels]
        motion[name] = (pixels[:, 1:].int() - pixels[:, :-1].int()).abs().float().mean((1, 2, 3, 4))
    rows = []
    for index, (case, _) in enumerate(jobs):
        old, new = (torch.tensor(labels) for labels in case["labels"])
        right = {
            name: (seen[name][index] == (old if name in ("start", "before") else new)).float()
            for name in seen
        }
        rows.append(
            {
                **{name: float(value.mean()) for name, value in right.items()},
                "changed": float(right["after"][old != new].mean()),
                "kept": float(right["after"][old == new].mean()),
                "drift": float(np.linalg.norm(looks["before"][index] - looks["start"][index])),
                "motion": float(motion["before"][index] / motion["start"][index].clamp_min(1e-3)),
                "repetition": repetition(latents[index, :, :CHANGE]),
            }
        )
    return rows


def _window(pipe: StreamVidPipeline, latents_BCFHW: torch.Tensor) -> torch.Tensor:
    """The last two seconds as uint8 `[B, T, H, W, 3]`, a few videos at a time."""
    shown = []
    for videos in latents_BCFHW.split(8):
        pixels = decode(pipe.vae, videos.to(pipe.vae.dtype), decoder_state(pipe.vae), None)
        frames = pixels[:, :, -WINDOW_FRAMES:].float().add(1).mul(127.5).round().clamp(0, 255).byte()
        shown.append(frames.permute(0, 2, 3, 4, 1))
    return torch.cat(shown)


def repetition(latents_CFHW: torch.Tensor) -> float:
    """Mean over the last frames of the largest similarity with a frame at least `LAG` before."""
    frames = latents_CFHW.float().transpose(0, 1).flatten(1)
    frames = torch.nn.functional.normalize(frames - frames.mean(0), dim=1)
    nearest = [
        float((frames[: f - LAG + 1] @ frames[f]).max()) for f in range(len(frames) - LOOKED_AT, len(frames))
    ]
    return float(np.mean(nearest))


def speed(pipe: StreamVidPipeline, method: str) -> dict[str, Any]:
    """One stream alone."""
    stream = pipe.stream("a large red ball bounces on the sand by day", method=method, decode_pixels=False)
    for _ in islice(stream, SPEED_WARM_UP):
        pass
    began = time.perf_counter()
    frames = sum(4 * chunk.latents.shape[2] for chunk in islice(stream, SPEED_BLOCKS))
    return {"fps": round(frames / (time.perf_counter() - began), 1), "kv_bytes": stream.cache.bytes}


def summary(rows: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Mean and half-width of the 95% interval of every number, over videos."""
    found = {}
    for name in rows[0]:
        values = np.array([row[name] for row in rows])
        half = 1.96 * values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else 0.0
        found[name] = {"mean": round(float(values.mean()), 4), "interval": round(float(half), 4)}
    return found


def measure(
    model: str, methods: Sequence[str], prompts: int, seeds: Sequence[int], folder: Path, batch: int = 16
) -> dict[str, Any]:
    """All methods, each into `folder/<method>.json`; those that are there with the same settings are not run again."""
    pipe, probe = load_pipeline(model), load_probe(model)
    if probe is None:
        raise SystemExit(f"model = {model!r} has no probe: give the embedded model")
    chosen = cases(prompts)
    jobs = [(case, 1000 * index + seed) for seed in seeds for index, case in enumerate(chosen)]
    settings = {"model": model, "prompts": prompts, "seeds": list(seeds)}
    folder.mkdir(parents=True, exist_ok=True)
    results = []
    for method in methods:
        path = folder / f"{method}.json"
        stored = json.loads(path.read_text()) if path.is_file() else {}
        if {name: stored.get(name) for name in settings} != settings:
            rows = []
            for first in range(0, len(jobs), batch):
                rows += run(pipe, probe, method, jobs[first : first + batch])
                print(f"{method}: {len(rows)}/{len(jobs)}", flush=True)
            stored = {"method": method, **settings, **speed(pipe, method), **summary(rows)}
            with replace_atomically(path) as temporary:
                temporary.write_text(json.dumps(stored, indent=1) + "\n")
        results.append(stored)
    return {**settings, "methods": results}


COLUMNS = ("start", "before", "end", "changed", "kept", "drift", "motion", "repetition")


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
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--parts", default="out/method_table", help="folder of one file per method")
    parser.add_argument("--output", default="out/method_table.json")
    options = parser.parse_args(arguments)
    result = measure(
        options.model, options.methods, options.prompts, options.seeds, Path(options.parts), options.batch
    )
    Path(options.output).parent.mkdir(parents=True, exist_ok=True)
    with replace_atomically(Path(options.output)) as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()
