"""The field's published questions, asked of the embedded model: `python -m streamvid.evaluation.findings`.

A question compares arms: a model and how it is run. Every arm makes the videos of the method table (a minute of a held-out
scene whose prompt changes at 10 s, streamvid.evaluation.method_table) for the same prompts and seeds; an answer is the mean
difference from the question's first arm over prompts, with its 95% interval and a p adjusted for all comparisons (Holm).

Arms that are presets of the embedded model are taken from the stored table of methods (`--table`), where it has the same
prompts and seeds. Every batch of other videos is a file, so that a run that is stopped goes on; with `--stored` nothing is
made, and an arm whose files are gone is taken from an earlier `--output` with the same settings and weights. Arms whose
model is not trained yet are left out. `--page` writes the answers into a page, between its marks.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from streamvid.errors import UserError
from streamvid.evaluation.adherence import in_processes, shipped_probe
from streamvid.evaluation.method_table import COLUMNS, Job, Openings, all_jobs, run, summary, weights_of
from streamvid.evaluation.stage_table import gain, is_there
from streamvid.evaluation.stats import holm
from streamvid.evaluation.stored import of_other_weights, read_stored, release_of, write_stored
from streamvid.io.files import replace_atomically
from streamvid.models import DEFAULT_MODEL, load_pipeline, model_method
from streamvid.training.model_stage import options as read_options

Measures = Mapping[str, Any]  # as `method_table.summary` has them
MARKS = "<!-- findings:start -->", "<!-- findings:end -->"


@dataclass(frozen=True)
class Arm:
    """A model and how it is run.

    Args:
        method: None: the model's own.
        prompts: it is measured on so many of the first prompts; 0: on all. Comparisons are over the prompts of both arms.
        needs: the command that trains its model.
    """

    name: str
    model: str
    method: str | None = None
    overrides: dict[str, Any] = field(default_factory=dict)
    prompts: int = 0
    needs: str = ""


@dataclass(frozen=True)
class Question:
    """Arms, each compared with the first by the measures that tell."""

    ask: str
    arms: tuple[str, ...]
    measures: tuple[str, ...]


def read_questions(path: str | Path) -> tuple[list[Arm], list[Question]]:
    """Arms and questions of a YAML file.

    Raises:
        UserError: the file is wrong, or a question names an arm or a measure that does not exist.
    """
    try:
        given = yaml.safe_load(Path(path).read_text())
        arms = [read_options(Arm, row, "arms") for row in given["arms"]]
        questions = [read_options(Question, row, "questions") for row in given["questions"]]
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise UserError(
            f"questions = {str(path)!r} cannot be read ({type(error).__name__}): give a YAML file with arms and questions"
        ) from None
    known = {arm.name for arm in arms}
    for question in questions:
        for name, choices in ((question.arms, known), (question.measures, COLUMNS)):
            for wrong in [n for n in name if n not in choices]:
                raise UserError(
                    f"question {question.ask!r}: {wrong!r} is not known: choose from {', '.join(sorted(choices))}"
                )
    return arms, questions


def rows_of(arm: Arm) -> Callable[[Sequence[Job]], list[dict[str, float]]]:
    """What measures batches of videos of an arm, loaded here."""
    method = arm.method or model_method(arm.model)
    assert method is not None
    pipe, probe = load_pipeline(arm.model), shipped_probe()
    return partial(run, pipe, probe, method, openings=Openings(), overrides=arm.overrides)


def in_table(arm: Arm, table: Mapping[str, Any], prompts: int, seeds: Sequence[int]) -> Measures | None:
    """What a stored table of methods (streamvid.evaluation.method_table) has of an arm with these prompts and seeds."""
    asked = {"model": arm.model, "prompts": prompts, "seeds": list(seeds)}
    if arm.overrides or any(table.get(name) != value for name, value in asked.items()):
        return None
    method = arm.method or model_method(arm.model)
    return next((row for row in table["methods"] if row["method"] == method), None)


def settings_of(arm: Arm, prompts: int, seeds: Sequence[int], batch: int) -> dict[str, Any]:
    """All that the videos of an arm depend on."""
    known = {"prompts": prompts, "seeds": list(seeds), "batch": batch, "weights": weights_of(arm.model)}
    return known | {"method": arm.method, "overrides": arm.overrides}


def measure_arm(
    arm: Arm, known: Mapping[str, Any], folder: Path, processes: int, stored_only: bool = False
) -> Measures | None:
    """`method_table.summary` of an arm; None where only stored videos count and some are missing.

    Args:
        known: `settings_of` the arm.
    """
    jobs, batch = all_jobs(known["prompts"], known["seeds"]), known["batch"]
    batches = [jobs[first : first + batch] for first in range(0, len(jobs), batch)]
    paths = [folder / arm.name.replace(" ", "_") / f"{number}.json" for number in range(len(batches))]
    found: list[Any] = [read_stored(path, known) for path in paths]
    missing = [number for number, rows in enumerate(found) if rows is None]
    if missing and stored_only:
        return None
    with in_processes(processes, partial(rows_of, arm)) as answer:
        for number, rows in zip(missing, answer([batches[n] for n in missing]), strict=True):
            found[number] = write_stored(paths[number], known, rows)
            print(
                f"{arm.name}: {sum(r is not None for r in found)}/{len(batches)} batches of videos",
                flush=True,
            )
    return summary([row for rows in found for row in rows], known["prompts"])


def from_earlier(earlier: Sequence[Mapping[str, Any]], arm: Arm, known: Mapping[str, Any]) -> Measures | None:
    """An arm of an earlier output, if it was made with these settings."""
    rows = [row for row in earlier if row["name"] == arm.name and row.get("settings") == known]
    return {**rows[0]["measures"], "by_prompt": rows[0]["by_prompt"]} if rows else None


def answers(
    questions: Sequence[Question], measured: Mapping[str, Mapping[str, Sequence[float]]]
) -> list[dict[str, Any]]:
    """Every question's comparisons, from the means of every arm's prompts; arms that were not measured are left out."""

    found: list[dict[str, Any]] = []
    for question in questions:
        first, *others = question.arms
        comparisons = [
            {"arm": arm, "measure": name, **_compare(measured[first][name], measured[arm][name])}
            for arm in others
            for name in question.measures
            if first in measured and arm in measured
        ]
        missing = [arm for arm in question.arms if arm not in measured]
        found.append({"ask": question.ask, "first": first, "comparisons": comparisons, "missing": missing})
    every = [comparison for answer in found for comparison in answer["comparisons"]]
    for comparison, p in zip(every, holm([c["p"] for c in every]), strict=True):
        comparison["p_holm"] = round(p, 4)
    return found


def _compare(first: Sequence[float], other: Sequence[float]) -> dict[str, Any]:
    """The gain over the first arm, over the prompts that both have."""
    prompts = min(len(first), len(other))
    return {"prompts": prompts, **gain(np.array(first[:prompts]), np.array(other[:prompts]))}


def page_lines(result: Mapping[str, Any]) -> list[str]:
    """The answers as Markdown."""
    arms = {arm["name"]: arm for arm in result["arms"]}
    lines = [f"{result['prompts']} held-out prompts, seeds {result['seeds']} (`{result['command']}`).", ""]
    lines += of_other_weights(result, DEFAULT_MODEL)
    for answer in result["questions"]:
        lines += [f"### {answer['ask']}", ""]
        names = list(dict.fromkeys(c["arm"] for c in answer["comparisons"]))
        if names:
            measures = list(dict.fromkeys(c["measure"] for c in answer["comparisons"]))
            lines += ["| | " + " | ".join(measures) + " |", "|---" * (1 + len(measures)) + "|"]
            base = arms[answer["first"]]["measures"]
            cells = [f"{base[m]['mean']:.3f} ± {base[m]['interval']:.3f}" for m in measures]
            lines.append(f"| {answer['first']} | {' | '.join(cells)} |")
            lines += [_difference_line(name, answer, measures, result["prompts"]) for name in names]
            lines += ["", *_told(answer, names), ""]
        if answer["missing"]:
            needs = [
                f"{name} (`{result['needs'][name]}`)" if result["needs"].get(name) else name
                for name in answer["missing"]
            ]
            lines += [f"Not measured yet: {', '.join(needs)}.", ""]
    return lines


def _difference_line(name: str, answer: Mapping[str, Any], measures: Sequence[str], prompts: int) -> str:
    told = {c["measure"]: c for c in answer["comparisons"] if c["arm"] == name}
    cells = [
        f"{c['difference']:+.3f} [{c['low']:+.3f}, {c['high']:+.3f}]{'*' if c['p_holm'] < 0.05 else ''}"
        for c in (told[m] for m in measures)
    ]
    count = next(iter(told.values()))["prompts"]
    note = f" ({count} prompts)" if count < prompts else ""
    return f"| {name}, difference{note} | {' | '.join(cells)} |"


def _told(answer: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """In words, what can be told from the first arm."""
    lines = []
    for name in names:
        seen, equal = [], []
        for c in (c for c in answer["comparisons"] if c["arm"] == name):
            if c["p_holm"] < 0.05:
                seen.append(f"{'more' if c['difference'] > 0 else 'less'} {c['measure']}")
            else:
                equal.append(c["measure"])
        text = ", ".join(seen) or "no difference that can be told"
        rest = f"; not told apart: {', '.join(equal)}" if seen and equal else ""
        lines.append(f"- {name}, against {answer['first']}: {text}{rest}.")
    return lines


def write_page(path: Path, lines: Sequence[str]) -> None:
    """Put lines between the marks of a page.

    Raises:
        UserError: it has no marks.
    """
    text = path.read_text()
    start, end = MARKS
    if start not in text or end not in text:
        raise UserError(f"page = {str(path)!r} has no marks: add {start} and {end}")
    before, after = text.split(start)[0], text.split(end)[1]
    with replace_atomically(path) as temporary:
        temporary.write_text(f"{before}{start}\n" + "\n".join(lines).rstrip() + f"\n{end}{after}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("questions", nargs="?", default="configs/stages/diorama_findings.yaml")
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--batch", type=int, default=25, help="videos denoised together")
    parser.add_argument("--processes", type=int, default=1, help="of one thread each")
    parser.add_argument("--parts", type=Path, default=Path("out/findings"), help="folder of a file per batch")
    parser.add_argument("--output", type=Path, default=Path("out/findings.json"))
    parser.add_argument(
        "--table", type=Path, default=Path("docs/method_table.json"), help="the stored table of methods"
    )
    parser.add_argument("--stored", action="store_true", help="answer from what is stored, make no videos")
    parser.add_argument(
        "--page", type=Path, help="a page whose marks take the answers, e.g. docs/findings.md"
    )
    options = parser.parse_args(arguments)
    arms, questions = read_questions(options.questions)
    methods = json.loads(options.table.read_text()) if options.table.is_file() else {}
    earlier = json.loads(options.output.read_text())["arms"] if options.output.is_file() else []
    options.output.parent.mkdir(parents=True, exist_ok=True)
    seeds = " ".join(map(str, options.seeds))
    command = f"python -m streamvid.evaluation.findings --prompts {options.prompts} --seeds {seeds}"
    result: dict[str, Any] = {
        "command": command,
        "prompts": options.prompts,
        "seeds": options.seeds,
        "release": release_of(DEFAULT_MODEL),
        "needs": {arm.name: arm.needs for arm in arms if arm.needs},
        "arms": [],
    }
    measured: dict[str, Mapping[str, Sequence[float]]] = {}
    for arm in arms:
        found, made = in_table(arm, methods, options.prompts, options.seeds), {}
        if found is None and is_there(arm.model):
            prompts = min(arm.prompts or options.prompts, options.prompts)
            known = settings_of(arm, prompts, options.seeds, options.batch)
            found = measure_arm(arm, known, options.parts, options.processes, options.stored)
            if found is None:
                found = from_earlier(earlier, arm, known)
            if found is not None:
                made = {"settings": known, "by_prompt": found["by_prompt"]}
        if found is None:
            print(f"{arm.name}: not there yet, left out", flush=True)
            continue
        measured[arm.name] = found["by_prompt"]
        means = {name: found[name] for name in COLUMNS}
        result["arms"].append({"name": arm.name, "model": arm.model, "measures": means, **made})
        result["questions"] = answers(questions, measured)
        with replace_atomically(options.output) as temporary:
            temporary.write_text(json.dumps(result, indent=1) + "\n")
    lines = page_lines(result) if measured else []
    if options.page and lines:
        write_page(options.page, lines)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
