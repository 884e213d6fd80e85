"""What seeds change in the embedded model's videos: `python -m streamvid.evaluation.diversity`.

No prompt names the scenery: where the subject stands, hills, clouds, sun, the phase of the motion
(streamvid.world.scene.SCENERY). It takes few places, so a video's scenery can be read off: it is that of the render of the
same scene that comes closest to the video in the first block. A variable counts where renders show it: what stands still has
no phase. Over many seeds of a prompt the measures are

- `differs`: how often two seeds differ in a variable. Scenery that is drawn as worlds are rendered, each of its k places
  alike, differs with probability 1 - 1/k; a model that gives all seeds one picture has 0;
- `between`: how often a video shows a variable between two places (a quarter of the way or more from the closer one to
  another), a subject twice and half transparent, say;
- `spread`: root mean square difference of the pictures of two seeds, over that of two renders.

`control` is the same of renders in drawn sceneries that went through the VAE, and how often their scenery is read right.
Every prompt is a file; a run that is stopped goes on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from streamvid.decoding import decode_to_bytes, decoder_state, encode, encoder_state
from streamvid.evaluation.adherence import in_processes
from streamvid.evaluation.liveliness import questions
from streamvid.evaluation.stats import interval
from streamvid.evaluation.stored import fingerprint, read_stored, release_of, write_stored
from streamvid.io.files import replace_atomically
from streamvid.models import load_pipeline
from streamvid.pipelines.pipeline_streamvid import StreamVidPipeline
from streamvid.training.vae_stage import to_pixels
from streamvid.world.render import render_clip, render_frame
from streamvid.world.scene import SCENERY, Scene, Scenery

FRAMES = 9  # pixel frames of the first block
LOOKED_AT = (0, 4, 8)  # of them
SHOWN = 1.0  # root mean square difference of two renders (of 255), below which they show no difference
BETWEEN = 0.25  # of the way from one place to another
VARIABLES = tuple(name for name, places in SCENERY.items() if len(places) > 1)
CELLS = tuple(product(*(range(len(places)) for places in SCENERY.values())))  # every scenery of the world

Reading = tuple[
    tuple[int, ...], list[float]
]  # the scenery's cells, and how far every variable is on its way elsewhere


def expected(variable: str) -> float:
    """How often two drawn sceneries differ in a variable."""
    return 1 - 1 / len(SCENERY[variable])


def renders(scene: Scene) -> np.ndarray:
    """The frames that are looked at, in every scenery: float32 `[cells, frames, H, W, 3]` in 0..255."""
    worlds = [Scenery.from_cells(cells) for cells in CELLS]
    clips = [[render_frame([(0, scene)], scenery, frame) for frame in LOOKED_AT] for scenery in worlds]
    return np.array(clips, np.float32)


def _others(cells: tuple[int, ...], variable: str) -> list[int]:
    """Numbers of the sceneries that differ from one in that variable alone."""
    axis = tuple(SCENERY).index(variable)
    places = range(len(SCENERY[variable]))
    return [
        CELLS.index((*cells[:axis], place, *cells[axis + 1 :])) for place in places if place != cells[axis]
    ]


def shown_by(rendered: np.ndarray) -> list[str]:
    """The variables whose every change is seen in the renders of a scene."""
    found = []
    for variable in VARIABLES:
        pairs = [(number, other) for number, cells in enumerate(CELLS) for other in _others(cells, variable)]
        if min(_distance(rendered[list(pair)]) for pair in pairs) > SHOWN:
            found.append(variable)
    return found


def _looked_at(frames_THWC: np.ndarray) -> np.ndarray:
    return frames_THWC[list(LOOKED_AT)].astype(np.float32)


def read(picture: np.ndarray, rendered: np.ndarray) -> Reading:
    """The scenery of the render that is closest to the picture, and for each of VARIABLES the way to its next place.

    A way is the projection of what the picture has beyond the closest render on the line to the render that differs from
    it in that variable alone: 0 there, 0.5 half way.
    """
    best = int(((rendered - picture) ** 2).mean((1, 2, 3, 4)).argmin())
    ways = []
    for variable in VARIABLES:
        lines = [rendered[number] - rendered[best] for number in _others(CELLS[best], variable)]
        beyond = picture - rendered[best]
        ways.append(max(float((beyond * line).sum() / max((line**2).sum(), 1e-6)) for line in lines))
    return CELLS[best], ways


def of_prompt(pictures: np.ndarray, rendered: np.ndarray) -> dict[str, Any]:
    """Of the pictures of a prompt's seeds, `[seeds, frames, H, W, 3]`: scenery, ways, spread over that of all renders, and
    which variables the scene shows."""
    readings = [read(picture, rendered) for picture in pictures]
    return {
        "shown": shown_by(rendered),
        "cells": [list(cells) for cells, _ in readings],
        "ways": [ways for _, ways in readings],
        "spread": _distance(pictures) / max(_distance_of_drawn(rendered), 1e-6),
    }


def _distance(pictures: np.ndarray) -> float:
    """Root of the mean square difference of two of the pictures."""
    squares = [float(((a - b) ** 2).mean()) for a, b in combinations(pictures, 2)]
    return float(np.mean(squares)) ** 0.5


def _distance_of_drawn(rendered: np.ndarray) -> float:
    """The same of two renders in drawn sceneries, which may be alike."""
    count = len(rendered)
    return _distance(rendered) * ((count - 1) / count) ** 0.5


@torch.no_grad()
def pictures_of(pipe: StreamVidPipeline, text: str, seeds: Sequence[int]) -> np.ndarray:
    """What is looked at of the first block of a prompt, seed by seed."""
    (chunk,) = pipe.stream([text] * len(seeds), seed=list(seeds), blocks=1, decode_pixels=False)
    return np.stack([_first_block(pipe, latents[None]) for latents in chunk.latents])


def _first_block(pipe: StreamVidPipeline, latents_BCFHW: torch.Tensor) -> np.ndarray:
    return _looked_at(decode_to_bytes(pipe.vae, latents_BCFHW, decoder_state(pipe.vae))[0])


@torch.no_grad()
def control_pictures(pipe: StreamVidPipeline, scene: Scene, drawn: Sequence[int]) -> np.ndarray:
    """Renders in sceneries CELLS[drawn] after the VAE."""
    pictures = []
    for number in drawn:
        clip = render_clip([(0, scene)], Scenery.from_cells(CELLS[number]), FRAMES)
        latents = encode(pipe.vae, to_pixels(clip)[None].to(pipe.vae.dtype), encoder_state(pipe.vae), None)
        pictures.append(_first_block(pipe, latents))
    return np.stack(pictures)


Job = tuple[int, Scene, str, int, bool]  # number of the prompt, scene, prompt, seeds, with control


def look(pipe: StreamVidPipeline, job: Job) -> dict[str, Any]:
    """`of_prompt` of the model's videos, and of the control."""
    index, scene, text, seeds, with_control = job
    rendered = renders(scene)
    found = {"model": of_prompt(pictures_of(pipe, text, [1000 * index + s for s in range(seeds)]), rendered)}
    if with_control:
        drawn = np.random.default_rng([2027, index]).integers(len(CELLS), size=seeds).tolist()
        found["control"] = of_prompt(control_pictures(pipe, scene, drawn), rendered)
        found["control"]["drawn"] = [list(CELLS[number]) for number in drawn]
    return found


def looker(model: str) -> Callable[[Job], dict[str, Any]]:
    """`look` with a model that is loaded here."""
    return partial(look, load_pipeline(model))


def differs(cells: Sequence[Sequence[int]], variable: str) -> float:
    """Share of the pairs of seeds that differ in a variable."""
    axis = tuple(SCENERY).index(variable)
    return float(np.mean([a[axis] != b[axis] for a, b in combinations(cells, 2)]))


def summary(prompts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over prompts of `of_prompt`, with 95% intervals; of a variable, over the prompts that show it."""

    def told(values: Sequence[float]) -> dict[str, float]:
        bounds = interval(np.array(values))
        numbers = {"mean": float(np.mean(values)), "low": bounds.low, "high": bounds.high}
        return {name: round(value, 4) for name, value in numbers.items()}

    found: dict[str, Any] = {"variables": {}, "spread": told([prompt["spread"] for prompt in prompts])}
    for place, variable in enumerate(VARIABLES):
        showing = [prompt for prompt in prompts if variable in prompt["shown"]]
        if not showing:
            continue
        between = [float(np.mean([ways[place] > BETWEEN for ways in p["ways"]])) for p in showing]
        found["variables"][variable] = {
            "prompts": len(showing),
            "differs": told([differs(prompt["cells"], variable) for prompt in showing]),
            "expected": round(expected(variable), 4),
            "between": told(between),
        }
    if all("drawn" in prompt for prompt in prompts):
        found["read_right"] = round(float(np.mean([right for p in prompts for right in _read_right(p)])), 4)
    return found


def _read_right(prompt: Mapping[str, Any]) -> list[bool]:
    """Of renders in drawn sceneries: whether all that they show was read as it was drawn."""
    columns = [tuple(SCENERY).index(variable) for variable in prompt["shown"]]
    pairs = zip(prompt["cells"], prompt["drawn"], strict=True)
    return [all(read[c] == drawn[c] for c in columns) for read, drawn in pairs]


def measure(
    prompts: int,
    seeds: int,
    controls: int,
    known: Mapping[str, Any],
    folder: Path,
    answer: Callable[[Sequence[Job]], Any],
) -> dict[str, Any]:
    """All prompts, `controls` of them with a control; those that are kept with the settings `known` are not made again."""
    jobs = [(i, scene, text, seeds, i < controls) for i, (scene, text) in enumerate(questions(prompts))]
    settings = [{**known, "seeds": seeds, "control": job[-1], "prompt": job[2]} for job in jobs]
    paths = [folder / f"{index}.json" for index in range(prompts)]
    told: list[Any] = [read_stored(path, own) for path, own in zip(paths, settings, strict=True)]
    missing = [number for number, found in enumerate(told) if found is None]
    for number, found in zip(missing, answer([jobs[n] for n in missing]), strict=True):
        told[number] = write_stored(paths[number], settings[number], found)
        print(f"{sum(found is not None for found in told)}/{prompts} prompts", flush=True)
    result = {"prompts": prompts, "seeds": seeds, "model": summary([found["model"] for found in told])}
    if controls:
        result["control"] = summary([found["control"] for found in told if "control" in found])
    return result


def table(result: Mapping[str, Any]) -> str:
    """The measurement as a Markdown table."""
    lines = [
        "| | prompts that show it | two seeds differ | drawn sceneries | renders, read | between two places |",
        "|---" * 6 + "|",
    ]
    control = result.get("control", {"variables": {}})["variables"]
    for name, row in result["model"]["variables"].items():
        seen, between = row["differs"], row["between"]["mean"]
        read = f"{control[name]['differs']['mean']:.2f}" if name in control else ""
        chances = f"{seen['mean']:.2f} [{seen['low']:.2f}, {seen['high']:.2f}] | {row['expected']:.2f}"
        lines.append(f"| {name} | {row['prompts']} | {chances} | {read} | {between:.2f} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="diorama")
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--seeds", type=int, default=8, help="of every prompt")
    parser.add_argument("--controls", type=int, default=12, help="prompts with a control")
    parser.add_argument("--processes", type=int, default=1, help="of one thread each")
    parser.add_argument(
        "--parts", type=Path, default=Path("out/diversity"), help="folder of a file per prompt"
    )
    parser.add_argument("--output", type=Path, default=Path("out/diversity.json"))
    options = parser.parse_args(arguments)
    pipe = load_pipeline(options.model)
    known = {"weights": fingerprint(pipe.transformer, pipe.text_encoder, pipe.vae)}
    controls = min(options.controls, options.prompts)
    with in_processes(options.processes, partial(looker, options.model)) as answer:
        result = measure(options.prompts, options.seeds, controls, known, options.parts, answer)
    command = (
        f"python -m streamvid.evaluation.diversity --prompts {options.prompts} --seeds {options.seeds} "
        f"--controls {controls}"
    )
    options.output.parent.mkdir(parents=True, exist_ok=True)
    about = {"model_name": options.model, "release": release_of(options.model)}
    written = {"command": command, **result, **about}
    with replace_atomically(options.output) as temporary:
        temporary.write_text(json.dumps(written, indent=1) + "\n")
    print(table(result))
    print(f"spread: {result['model']['spread']}")


if __name__ == "__main__":
    main()
