"""How much the embedded model's videos move, and for how long: `python -m streamvid.evaluation.liveliness`.

Every prompt names a held-out scene; all motions come equally often. A stream is looked at where MOMENTS end, and its motion
is compared with that of a clip that the world renders of the same scene: the mean length of the optical flow (DIS, in pixels
per frame) between neighbouring frames over two blocks, in which every motion of the world comes round. The same windows
tell which attributes still show, of the same stream at its beginning and at its end. Rain and snow flow whatever the subject
does, so clear weather is told apart.

Every group of videos (one of each motion) is a file; a run that is stopped goes on.
"""

from __future__ import annotations

import argparse
import json
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats

from streamvid.decoding import decode_to_bytes, decoder_state
from streamvid.evaluation.adherence import (
    WARM_UP_BLOCKS,
    add_method_options,
    in_processes,
    method_options,
    shipped_probe,
)
from streamvid.evaluation.flow import DisFlow, magnitudes
from streamvid.evaluation.stats import RESAMPLES, SEED, by_group, interval
from streamvid.evaluation.stored import fingerprint, read_stored, release_of, write_stored
from streamvid.io.files import replace_atomically
from streamvid.models import load_pipeline
from streamvid.pipelines.pipeline_streamvid import StreamVidPipeline
from streamvid.world.motion import FRAMES_PER_BLOCK
from streamvid.world.probe import WINDOW_FRAMES, AttributeProbe
from streamvid.world.prompts import describe
from streamvid.world.render import render_clip
from streamvid.world.sampling import block_start
from streamvid.world.scene import ATTRIBUTES, Scene, sample_scene, sample_scenery

MOMENTS = {"start": 7, "minute": 81, "ten_minutes": 801}  # moment -> blocks of the stream before it
MOTIONS = ATTRIBUTES["motion"]
PERIOD = 2 * FRAMES_PER_BLOCK  # frames in which every motion comes round
TOLERANCE = 0.15  # of rendered motion: the bar

Video = dict[str, Any]  # of one video: `generated` and `right` by moment, and `rendered`


def questions(prompts: int) -> list[tuple[Scene, str]]:
    """Held-out scenes and their words; the motions take turns."""
    asked = []
    for index in range(prompts):
        rng = np.random.default_rng([2026, index])
        scene = replace(sample_scene(rng, held_out=True), motion=MOTIONS[index % len(MOTIONS)])
        asked.append((scene, describe(scene, rng)))
    return asked


def mean_flow(frames_THWC: np.ndarray) -> float:
    """Mean length of the flow from each frame to the next, in pixels per frame; uint8 frames."""
    search = DisFlow("fast")
    return float(
        np.mean([magnitudes(search(first, second)).mean() for first, second in pairwise(frames_THWC)])
    )


def rendered_flow(scene: Scene, seed: int) -> float:
    """Of a clip of the scene in a scenery of that seed, over the window of `start`."""
    scenery = sample_scenery(np.random.default_rng(seed))
    first = block_start(MOMENTS["start"]) - PERIOD - 1
    return mean_flow(render_clip([(0, scene)], scenery, PERIOD + 1, first_frame=first))


@torch.no_grad()
def watch(
    pipe: StreamVidPipeline,
    probe: AttributeProbe,
    moments: Sequence[str],
    jobs: Sequence[tuple[Scene, str, int]],
    **options: Any,
) -> list[Video]:
    """Make videos together, each of its scene, prompt and seed, and look at them at every moment."""
    blocks = {MOMENTS[moment]: moment for moment in moments}
    seeds = [seed for _, _, seed in jobs]
    stream = pipe.stream(
        [text for _, text, _ in jobs], seed=seeds, blocks=max(blocks), decode_pixels=False, **options
    )
    needed = -(-WINDOW_FRAMES // FRAMES_PER_BLOCK) + WARM_UP_BLOCKS
    recent: deque[torch.Tensor] = deque(maxlen=needed)
    videos: list[Video] = [
        {"generated": {}, "right": {}, "rendered": rendered_flow(scene, seed)} for scene, _, seed in jobs
    ]
    for chunk in stream:
        recent.append(chunk.latents)
        moment = blocks.get(chunk.index + 1)
        if moment is None:
            continue
        for video, (scene, _, _), latents in zip(videos, jobs, torch.cat(list(recent), 2), strict=True):
            frames = decode_to_bytes(pipe.vae, latents[None], decoder_state(pipe.vae))[0, -WINDOW_FRAMES:]
            told = probe.classify(frames[None])
            seen = [int(told[name]) for name in ATTRIBUTES]
            video["generated"][moment] = mean_flow(frames[-PERIOD - 1 :])
            video["right"][moment] = [int(a == b) for a, b in zip(seen, scene.labels(), strict=True)]
    return videos


def watcher(model: str, moments: Sequence[str], options: Mapping[str, Any]) -> Callable[[Any], list[Video]]:
    """`watch` with a model that is loaded here."""
    return partial(watch, load_pipeline(model), shipped_probe(), moments, **options)


def ratio(one: np.ndarray, other: np.ndarray) -> dict[str, float]:
    """Mean of `one` over mean of `other`, paired, with the 95% bootstrap interval."""

    def of(one: np.ndarray, other: np.ndarray, axis: int = -1) -> np.ndarray:
        return one.mean(axis) / np.maximum(other.mean(axis), 1e-9)

    value = float(of(one, other))
    low = high = value
    if len(one) > 1 and (np.ptp(one) or np.ptp(other)):
        rng = np.random.default_rng(SEED)
        found = stats.bootstrap(
            (one, other),
            of,
            paired=True,
            vectorized=True,
            n_resamples=RESAMPLES,
            method="percentile",
            rng=rng,
        ).confidence_interval
        low, high = float(found.low), float(found.high)
    return {"ratio": round(value, 4), "low": round(low, 4), "high": round(high, 4)}


def summary(videos: Sequence[Video], prompts: Sequence[int], moments: Sequence[str]) -> dict[str, Any]:
    """By moment: flow against rendered flow, of all and for each motion, flow against `start`, attributes that show."""
    groups = [f"{index:06d}" for index in prompts]

    def per_prompt(values: Sequence[float]) -> np.ndarray:
        return by_group(values, groups)

    scenes = [scene for scene, _ in questions(max(prompts) + 1)]
    scenes = [scenes[index] for index in sorted(set(prompts))]
    rendered = per_prompt([video["rendered"] for video in videos])
    found: dict[str, Any] = {}
    for moment in moments:
        flow = per_prompt([video["generated"][moment] for video in videos])
        right = np.array([video["right"][moment] for video in videos], float)
        share = per_prompt(right.mean(1).tolist())
        bounds = interval(share)
        found[moment] = {
            "generated": round(float(flow.mean()), 4),
            "rendered": round(float(rendered.mean()), 4),
            "against_rendered": ratio(flow, rendered),
            "by_motion": _split(flow, rendered, [scene.motion for scene in scenes], MOTIONS),
            "by_weather": _split(flow, rendered, [scene.weather for scene in scenes], ATTRIBUTES["weather"]),
            "right": {
                "mean": round(float(right.mean()), 4),
                "low": round(bounds.low, 4),
                "high": round(bounds.high, 4),
                "attributes": dict(zip(ATTRIBUTES, right.mean(0).round(4).tolist(), strict=True)),
            },
            "by_prompt": {"generated": flow.round(4).tolist(), "right": share.round(4).tolist()},
        }
        if moment != moments[0]:
            first = per_prompt([video["generated"][moments[0]] for video in videos])
            found[moment]["against_" + moments[0]] = ratio(flow, first)
    return found


def _split(
    flow: np.ndarray, rendered: np.ndarray, kinds: Sequence[str], names: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Flow against rendered flow of the prompts of every kind that occurs."""
    found = {}
    for name in names:
        chosen = np.array([kind == name for kind in kinds])
        if chosen.any():
            means = {"generated": flow[chosen].mean(), "rendered": rendered[chosen].mean()}
            found[name] = {
                "prompts": int(chosen.sum()),
                **{key: round(float(value), 4) for key, value in means.items()},
                **ratio(flow[chosen], rendered[chosen]),
            }
    return found


def measure(
    prompts: int,
    seeds: Sequence[int],
    moments: Sequence[str],
    known: Mapping[str, Any],
    folder: Path,
    answer: Callable[[Sequence[Any]], Any],
) -> dict[str, Any]:
    """All videos; groups that are kept in `folder` with the settings `known` are not made again."""
    asked = questions(prompts)
    order = [(index, seed) for seed in seeds for index in range(prompts)]
    size = len(MOTIONS)
    groups = [order[first : first + size] for first in range(0, len(order), size)]
    jobs = [[(*asked[index], 1000 * index + seed) for index, seed in group] for group in groups]
    paths = [folder / f"{group[0][0]}_{group[0][1]}.json" for group in groups]
    settings = [{**known, "moments": list(moments), "group": group} for group in groups]
    told: list[Any] = [read_stored(path, own) for path, own in zip(paths, settings, strict=True)]
    missing = [number for number, videos in enumerate(told) if videos is None]
    for number, videos in zip(missing, answer([jobs[n] for n in missing]), strict=True):
        told[number] = write_stored(paths[number], settings[number], videos)
        print(f"{sum(videos is not None for videos in told)}/{len(groups)} groups of videos", flush=True)
    every = [video for videos in told for video in videos]
    return {
        "prompts": prompts,
        "seeds": list(seeds),
        "moments": summary(every, [index for index, _ in order], moments),
    }


def table(result: Mapping[str, Any]) -> str:
    """The measurement as a Markdown table, in pixels per frame."""
    moments = result["moments"]
    first = next(iter(moments.values()))
    clear = "clear" in first["by_weather"]
    titles = ["", "all, against rendered", "clear weather", *MOTIONS, "attributes right"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    cells = [f"{first['rendered']:.2f}", f"{first['by_weather']['clear']['rendered']:.2f}" if clear else ""]
    cells += [_cell(first, name, "rendered") for name in MOTIONS]
    lines.append(f"| rendered | {' | '.join(cells)} | |")
    for moment, row in moments.items():
        right = row["right"]
        cells = [_against(row["generated"], row["against_rendered"])]
        dry = row["by_weather"].get("clear")
        cells += [_against(dry["generated"], dry) if dry else ""]
        cells += [_cell(row, name, "generated") for name in MOTIONS]
        cells += [f"{right['mean']:.3f} [{right['low']:.3f}, {right['high']:.3f}]"]
        lines.append(f"| {moment} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(row: Mapping[str, Any], motion: str, which: str) -> str:
    return f"{row['by_motion'][motion][which]:.2f}" if motion in row["by_motion"] else ""


def _against(flow: float, whole: Mapping[str, float]) -> str:
    return f"{flow:.2f}, x {whole['ratio']:.2f} [{whole['low']:.2f}, {whole['high']:.2f}]"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="diorama")
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--moments", nargs="+", default=["start"], choices=tuple(MOMENTS))
    add_method_options(parser)
    parser.add_argument("--processes", type=int, default=1, help="of one thread each")
    parser.add_argument(
        "--parts", type=Path, default=Path("out/liveliness"), help="folder of a file per group"
    )
    parser.add_argument("--output", type=Path, default=Path("out/liveliness.json"))
    options = parser.parse_args(arguments)
    pipe, probe = load_pipeline(options.model), shipped_probe()
    weights = fingerprint(pipe.transformer, pipe.text_encoder, pipe.vae, probe)
    extra = method_options(options)
    make = partial(watcher, options.model, options.moments, extra)
    with in_processes(options.processes, make) as answer:
        result = measure(
            options.prompts,
            options.seeds,
            options.moments,
            {"weights": weights, **extra},
            options.parts,
            answer,
        )
    seeds, moments = (" ".join(map(str, values)) for values in (options.seeds, options.moments))
    command = f"python -m streamvid.evaluation.liveliness --prompts {options.prompts} --seeds {seeds} --moments {moments}"
    command += f" --method {options.method}" if options.method else ""
    command += f" --set {' '.join(options.set)}" if options.set else ""
    about = {"command": command, "model": options.model, "release": release_of(options.model)}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with replace_atomically(options.output) as temporary:
        temporary.write_text(json.dumps({**about, **extra, **result}, indent=1) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()
