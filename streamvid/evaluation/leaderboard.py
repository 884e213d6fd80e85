"""`streamvid eval leaderboard`: one page over all methods, from the table of methods or from runs of a protocol."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from streamvid.errors import UserError
from streamvid.evaluation.board import Board, Cell, Column, html, markdown, marks
from streamvid.evaluation.comparison import prompt_means
from streamvid.evaluation.manifest import MANIFEST, read_manifest
from streamvid.evaluation.results import read_results, write_text
from streamvid.evaluation.stored import of_other_weights
from streamvid.io.files import prepare_output_file
from streamvid.methods import load_method, method_names
from streamvid.models import model_method

RUN_COLUMNS = (
    "interactive.probe_adherence",
    "interactive.switch_latency",
    "drift.look",
    "drift.sharpness",
    "long.warp_flicker",
    "long.stagnation",
    "long.loop",
    "long.motion",
    "timing.real_time_factor",
    "timing.chunk_p95",
)


def write_leaderboard(options: Any) -> str:
    """Write the page as Markdown and as HTML beside it; the names of both.

    `--table` takes the table of methods; else folders of runs are compared, and with `--methods` what is not there is run
    first, one folder per method.
    """
    path = prepare_output_file(options.output)
    if options.table:
        board = board_of_table(Path(options.table))
    else:
        folders = [Path(run) for run in options.runs]
        if options.methods:
            names = method_names() if options.methods == "all" else options.methods.split(",")
            for name in names:
                load_method(name)
            folders += [_run(name, options) for name in names]
        if not folders:
            raise UserError("runs = none: give folders of runs, or --methods, or --table")
        board = board_of_runs(folders)
    places = [path.with_suffix(suffix) for suffix in (".md", ".html")]
    for place, text in zip(places, (markdown(board), html(board)), strict=True):
        write_text(place, text)
    return " and ".join(map(str, places))


def _run(method: str, options: Any) -> Path:
    """Run the protocol with a method in a process of its own; what is done already is not done again."""
    folder = Path(options.folder) / method
    command = [sys.executable, "-m", "streamvid.cli", "eval", "run", options.protocol, "--method", method]
    command += ["-o", str(folder), "--processes", str(options.processes)]
    command += ["--model", options.model] if options.model else []
    command += ["--limit", str(options.limit)] if options.limit else []
    print(f"{method} …", file=sys.stderr, flush=True)
    code = subprocess.run(
        command, env={"OMP_NUM_THREADS": "1", **os.environ}, stdout=subprocess.DEVNULL
    ).returncode
    if code:
        raise UserError(f"method {method}: its run ended with code {code}: its messages are above")
    return folder


# --- from the table of methods ----------------------------------------------------------------------------------------


def board_of_table(path: Path) -> Board:
    """The page of a file that `streamvid.evaluation.method_table` wrote."""
    from streamvid.evaluation.method_table import COLUMNS  # with the pipeline, which runs do not need

    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        methods, prompts, seeds = result["methods"], result["prompts"], result["seeds"]
        cells = {row["method"]: [_cell(row, name) for name in COLUMNS] for row in methods}
        speeds = {row["method"]: (row["fps"], row["kv_bytes"]) for row in methods}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"table = {str(path)!r} is no table of methods ({error!r}): "
            "give what python -m streamvid.evaluation.method_table wrote"
        ) from error
    if not methods:
        raise UserError(f"table = {str(path)!r} has no methods: give one with some")
    columns = [
        Column(name, name, better, definition, unit) for name, (better, unit, definition) in COLUMNS.items()
    ]
    for index, column in enumerate(columns):
        by_prompt = [dict(enumerate(row.get("by_prompt", {}).get(column.name, ()))) for row in methods]
        told = marks([{str(k): v for k, v in table.items()} for table in by_prompt], column.better)
        for row, mark in zip(methods, told, strict=True):
            cell = cells[row["method"]][index]
            cells[row["method"]][index] = Cell(cell.value, cell.half, mark)
    columns += [
        Column("fps", "fps", "up", "frames per second of one stream, without decoding", "1/s"),
        Column("kv_bytes", "KV MB", "down", "size of the context cache", "MB"),
    ]
    rows = [
        (name, _source(name), [*cells[name], Cell(speeds[name][0]), Cell(round(speeds[name][1] / 1e6, 2))])
        for name in cells
    ]
    rows.sort(key=lambda row: -(row[2][2].value if row[2][2] else 0.0))  # by what is right after a minute
    about = (
        f"{len(rows)} methods on {result['model']}: {prompts} held-out prompts, seeds {', '.join(map(str, seeds))}, one "
        "minute each, a change of prompt at 10 s; every method gets the same prompts, seeds and noise. "
        + _note(result)
    )
    command = (
        f"python -m streamvid.evaluation.method_table --prompts {prompts} --seeds {' '.join(map(str, seeds))} "
        f"--output {path.name} && streamvid eval leaderboard --table {path.name}"
    )
    return Board("Leaderboard", about, command, columns, rows)


def _note(result: Mapping[str, Any]) -> str:
    try:
        made_for, other = model_method(result["model"]), of_other_weights(result, result["model"])
    except UserError:  # a model that is not on this machine
        made_for, other = None, []
    whom = f"was made for {made_for}" if made_for else "was made for one of them"
    told = (
        f"The model {whom}: the table says what each method does to it, not how the papers' own models rank."
    )
    return " ".join([told, *other[:1]])


def _cell(row: Mapping[str, Any], name: str) -> Cell:
    return Cell(float(row[name]["mean"]), float(row[name]["interval"]))


def _source(name: str) -> str:
    """The paper of a method; nothing for one that this version does not have."""
    return load_method(name).source if name in method_names() else ""


# --- from runs of a protocol ------------------------------------------------------------------------------------------


def board_of_runs(folders: Sequence[Path]) -> Board:
    """The page of runs of one protocol with one model."""
    runs = [(folder, read_results(folder)) for folder in folders]
    settings = {(run["protocol"], run["model"], run["videos"]) for _, run in runs}
    if len(settings) > 1:
        raise UserError(
            f"runs differ in protocol, model or number of videos ({sorted(map(str, settings))}): give equal ones"
        )
    protocol, model, videos = settings.pop()
    entries = [{**run["metrics"], **run["timing"]} for _, run in runs]
    names = [c for c in RUN_COLUMNS if any(e.get(c, {}).get("value") is not None for e in entries)]
    columns, table = [], []
    for name in names:
        entry = next(e[name] for e in entries if name in e)
        columns.append(Column(name, name.split(".")[1], entry["better"], entry["definition"], entry["unit"]))
        means = [
            prompt_means(folder, e[name], _groups(folder)) if name in e else {}
            for folder, e in zip(folders, entries, strict=True)
        ]
        told = marks(means, entry["better"])
        table.append([_run_cell(e.get(name), mark) for e, mark in zip(entries, told, strict=True)])
    rows = [
        (run["method"] or folder.name, _source(run["method"] or ""), [column[i] for column in table])
        for i, (folder, run) in enumerate(runs)
    ]
    about = f"All methods on {model}, protocol {protocol}, {videos} videos each, same prompts and seeds."
    command = f"streamvid eval leaderboard --methods all --protocol {protocol}"
    return Board("Leaderboard", about, command, columns, rows)


def _groups(folder: Path) -> dict[str, str]:
    return {video.id: video.group or video.id for video in read_manifest(folder / MANIFEST, [])}


def _run_cell(entry: Mapping[str, Any] | None, mark: str) -> Cell | None:
    if not entry or entry["value"] is None:
        return None
    low, high = entry["interval"] or (entry["value"],) * 2
    return Cell(entry["value"], (high - low) / 2, mark)
