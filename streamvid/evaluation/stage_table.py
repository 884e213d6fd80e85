"""What every stage of a chain gains: `python -m streamvid.evaluation.stage_table configs/stages/diorama_chain.yaml`.

Every stage answers the same held-out prompts with the same seeds (streamvid.evaluation.adherence). A gain is over the stage
before that has the part: mean over prompts of the difference, with its 95% interval. A stage with `clip_steps` is a
bidirectional teacher: it makes whole clips of the length of `start` by so many Euler steps with guidance.

Every group of videos is a file; a run that is stopped goes on, and a stage that is not trained yet is left out.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from streamvid.errors import UserError
from streamvid.evaluation.adherence import (
    BLOCKS,
    ENDS,
    Group,
    Kept,
    answers_of,
    in_processes,
    probe_tail,
    right_answers,
    settings,
    shipped_probe,
    summary,
)
from streamvid.evaluation.stats import by_group, paired
from streamvid.evaluation.stored import release_of
from streamvid.io.files import replace_atomically
from streamvid.models import DEFAULT_MODEL, cpu_multiplies_bfloat16, embedded_models, load_pipeline
from streamvid.training.model_stage import options as read_options


@dataclass(frozen=True)
class StageRow:
    """A row of the table.

    Args:
        name: of the stage; model: its folder, or an embedded model.
        parts: what is measured of it.
        method, overrides: how it is run.
        clip_steps, guidance: of a bidirectional teacher.
    """

    name: str
    model: str
    parts: tuple[str, ...] = ("start", "minute", "switch")
    method: str | None = None
    overrides: dict[str, Any] = field(default_factory=dict)
    clip_steps: int = 0
    guidance: float = 1.0

    def __post_init__(self) -> None:
        for part in self.parts:
            if part not in BLOCKS or (self.clip_steps and part != "start"):
                known = ["start"] if self.clip_steps else BLOCKS
                raise UserError(
                    f"stages: {self.name}: part {part!r} is not known: choose from {', '.join(known)}"
                )

    @property
    def stream_options(self) -> dict[str, Any]:
        return {k: v for k, v in (("method", self.method), ("overrides", self.overrides)) if v}

    def answerer(self) -> Callable[[], Callable[[Group], torch.Tensor]]:
        """What loads the stage in a process."""
        if self.clip_steps:
            return partial(clip_answers, self.model, self.clip_steps, self.guidance)
        return partial(answers_of, self.model, self.stream_options)


def read_rows(path: str | Path) -> list[StageRow]:
    """The stages of a YAML file.

    Raises:
        UserError: the file or a field is wrong.
    """
    try:
        given = yaml.safe_load(Path(path).read_text())["stages"]
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise UserError(
            f"stages = {str(path)!r} cannot be read ({type(error).__name__}): give a YAML file with a list `stages`"
        ) from None
    return [read_options(StageRow, row, "stages") for row in given]


def clip_answers(model: str, steps: int, guidance: float) -> Callable[[Group], torch.Tensor]:
    """Whole clips of a bidirectional model."""
    from streamvid.training.ode_pairs import PathMaker

    maker = PathMaker({"folder": model}, guidance, "", steps, levels=(1000,))
    pipe, probe = maker.pipeline(), shipped_probe()
    frames = BLOCKS["start"] * maker.method.frames_per_block

    def answer(group: Group) -> torch.Tensor:
        shape = (maker.latent_shape[0], frames, *maker.latent_shape[1:])
        draws = [np.random.default_rng(seed).standard_normal(shape, np.float32) for seed in group.seeds]
        with torch.autocast("cpu", torch.bfloat16, enabled=cpu_multiplies_bfloat16()):
            latents = maker.states(torch.from_numpy(np.stack(draws)), group.texts)[:, -2]
            return probe_tail(pipe, probe, latents, ENDS[group.part])

    return answer


def measure(
    rows: Sequence[StageRow],
    prompts: int,
    seeds: Sequence[int],
    folder: Path,
    processes: int = 1,
    batch: int = 32,
    write: Callable[[dict[str, Any]], None] = lambda result: None,
) -> dict[str, Any]:
    """All stages that are there; `write` is called with the result so far after every part."""
    result: dict[str, Any] = {
        "release": release_of(DEFAULT_MODEL),
        "prompts": prompts,
        "seeds": list(seeds),
        "stages": [],
    }
    before: dict[
        str, tuple[str, np.ndarray]
    ] = {}  # part -> the latest stage that has it, and its share per prompt
    for row in rows:
        if not is_there(row.model):
            print(f"{row.name}: {row.model} is not there yet, left out", flush=True)
            continue
        found: dict[str, Any] = {"name": row.name, "model": row.model, "options": _options(row)}
        result["stages"].append(found)
        known = settings(load_pipeline(row.model), shipped_probe(), _options(row))
        kept = Kept(folder / row.name.replace(" ", "_"), known)
        with in_processes(processes, row.answerer()) as answer:
            for part in row.parts:
                right, changed = right_answers(part, prompts, seeds, answer, batch, kept)
                found[part] = summary(part, right, changed)
                share = by_prompt(right, prompts, len(seeds))
                if part in before:
                    name, other = before[part]
                    found[part]["gain"] = {"over": name, **gain(other, share)}
                before[part] = row.name, share
                write(result)
    return result


def is_there(model: str) -> bool:
    """Whether a model has been trained."""
    return model in embedded_models() or (Path(model) / "model_index.json").is_file()


def _options(row: StageRow) -> dict[str, Any]:
    clip = {"clip_steps": row.clip_steps, "guidance": row.guidance} if row.clip_steps else {}
    return {**row.stream_options, **clip}


def by_prompt(right: torch.Tensor, prompts: int, seeds: int) -> np.ndarray:
    """Share of attributes that are right at the end of a prompt's videos, `[prompts]`."""
    shares = right[:, -1].float().mean(-1).tolist()
    return by_group(shares, [f"{i:06d}" for _ in range(seeds) for i in range(prompts)])


def gain(before: np.ndarray, after: np.ndarray) -> dict[str, float]:
    """Mean difference over prompts with its 95% interval, and p of no difference."""
    found = asdict(paired(before, after))
    return {name: round(found[name], 4) for name in ("difference", "low", "high", "p")}


def table(result: Mapping[str, Any]) -> str:
    """The measurement as a Markdown table."""
    lines = [
        "| stage | start | gain | worst | all right | minute | gain | changed within 1.5 s | kept | gain after a switch |",
        "|---" * 10 + "|",
    ]
    for row in result["stages"]:
        start, minute, switch = (row.get(part, {}) for part in ("start", "minute", "switch"))
        soon = switch.get("soon", {})
        cells = [
            _mean(start),
            _change(start),
            *(f"{start[name]:.3f}" if start else "" for name in ("worst", "all_right")),
            *(_mean(minute), _change(minute)),
            *(f"{soon[name]['accuracy']:.3f}" if soon else "" for name in ("changed", "kept")),
            _change(switch),
        ]
        lines.append(f"| {row['name']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _mean(part: Mapping[str, Any]) -> str:
    return f"{part['mean']:.3f} ± {part['interval']:.3f}" if part else ""


def _change(part: Mapping[str, Any]) -> str:
    gain = part.get("gain")
    return f"{gain['difference']:+.3f} [{gain['low']:+.3f}, {gain['high']:+.3f}]" if gain else ""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stages", help="a YAML file of stages, e.g. configs/stages/diorama_chain.yaml")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--batch", type=int, default=32, help="videos made together")
    parser.add_argument("--processes", type=int, default=1, help="of one thread each")
    parser.add_argument("--parts-folder", type=Path, default=Path("out/stages"), help="of a file per group")
    parser.add_argument("--output", type=Path, default=Path("out/stages.json"))
    options = parser.parse_args(arguments)
    options.output.parent.mkdir(parents=True, exist_ok=True)

    def write(result: dict[str, Any]) -> None:
        with replace_atomically(options.output) as temporary:
            temporary.write_text(json.dumps(result, indent=1) + "\n")

    rows = read_rows(options.stages)
    result = measure(
        rows, options.prompts, options.seeds, options.parts_folder, options.processes, options.batch, write
    )
    write(result)
    print(table(result))


if __name__ == "__main__":
    main()
