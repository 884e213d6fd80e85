"""One page over runs of several methods: a table in Markdown with intervals, and what may be told apart from the best."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from streamvid.errors import UserError
from streamvid.evaluation import stats
from streamvid.evaluation.comparison import prompt_means
from streamvid.evaluation.manifest import MANIFEST, read_manifest
from streamvid.evaluation.report import shown
from streamvid.evaluation.results import read_results, write_text
from streamvid.io.files import prepare_output_file
from streamvid.methods import load_method, method_names

COLUMNS = (
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


def write_leaderboard(options: Any) -> Path:
    """The page of `streamvid eval leaderboard`; with `--methods`, what is not there is run first, one folder per method."""
    folders = [Path(run) for run in options.runs]
    if options.methods:
        names = method_names() if options.methods == "all" else options.methods.split(",")
        for name in names:
            load_method(name)
        folders += [_run(name, options) for name in names]
    if not folders:
        raise UserError("runs = none: give folders of runs, or --methods")
    path = prepare_output_file(options.output)
    write_text(path, page(folders))
    return path


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


def page(folders: Sequence[Path]) -> str:
    """Markdown: a row per run, the best in bold, what cannot be told from the best (paired by prompt, Holm) with a dot."""
    runs = [(folder, read_results(folder)) for folder in folders]
    settings = {(run["protocol"], run["model"], run["videos"]) for _, run in runs}
    if len(settings) > 1:
        raise UserError(
            f"runs differ in protocol, model or number of videos ({sorted(map(str, settings))}): give equal ones"
        )
    protocol, model, videos = settings.pop()
    entries = [{**run["metrics"], **run["timing"]} for _, run in runs]
    columns = [c for c in COLUMNS if any(e.get(c, {}).get("value") is not None for e in entries)]
    arrows = {"up": " ↑", "down": " ↓", "": ""}
    titles = [f"{c.split('.')[1]}{arrows[next(e[c]['better'] for e in entries if c in e)]}" for c in columns]
    lines = ["| method | " + " | ".join(titles) + " |", "|---" * (len(columns) + 1) + "|"]
    marks = {column: _marks(column, folders, entries) for column in columns}
    for index, (folder, run) in enumerate(runs):
        cells = []
        for column in columns:
            entry = entries[index].get(column)
            if not entry or entry["value"] is None:
                cells.append("-")
                continue
            bounds = entry["interval"]
            half = (
                f" ± {shown((bounds[1] - bounds[0]) / 2, bounds)}" if bounds and bounds[1] > bounds[0] else ""
            )
            text = f"{shown(entry['value'], bounds)}{half}"
            cells.append({"best": f"**{text}**", "equal": f"{text} ·"}.get(marks[column][index], text))
        lines.append(f"| {run['method'] or folder.name} | {' | '.join(cells)} |")
    command = f"`streamvid eval leaderboard --methods all --protocol {protocol}`"
    return (
        f"# Leaderboard\n\nAll methods on {model}, protocol `{protocol}`, {videos} videos each, same prompts and seeds "
        f"({command}). Mean ± half the 95% interval over prompts. Bold: best. ·: not told apart from the best (paired by "
        f"prompt, sign-flip test, Holm over the methods, 5%).\n\n"
        + "\n".join(lines)
        + "\n\n"
        + _legend(columns, entries)
    )


def _marks(column: str, folders: Sequence[Path], entries: Sequence[dict[str, Any]]) -> list[str]:
    """best, equal or nothing, for every run."""
    means = []
    for folder, entry in zip(folders, entries, strict=True):
        groups = {video.id: video.group or video.id for video in read_manifest(folder / MANIFEST, [])}
        means.append(prompt_means(folder, entry[column], groups) if column in entry else {})
    better = next(e[column]["better"] for e in entries if column in e)
    values = [float(np.mean(list(m.values()))) if m else None for m in means]
    if not better or all(value is None for value in values):
        return [""] * len(folders)
    sign = -1 if better == "down" else 1
    best = max((i for i, v in enumerate(values) if v is not None), key=lambda i: sign * (values[i] or 0.0))
    others = [i for i, m in enumerate(means) if i != best and len(m.keys() & means[best].keys()) > 1]
    tests = []
    for i in others:
        shared = sorted(means[i].keys() & means[best].keys())
        pair = [np.array([means[j][g] for g in shared]) for j in (best, i)]
        tests.append(stats.paired(pair[0], pair[1], better).p)
    adjusted = dict(zip(others, stats.holm(tests), strict=True))
    return [
        "best" if i == best else "equal" if adjusted.get(i, 0.0) >= 0.05 else "" for i in range(len(folders))
    ]


def _legend(columns: Sequence[str], entries: Sequence[dict[str, Any]]) -> str:
    lines = []
    for column in columns:
        entry = next(e[column] for e in entries if column in e)
        unit = f" ({entry['unit']})" if entry["unit"] else ""
        lines.append(f"- `{column}`{unit}: {entry['definition']}")
    return "\n".join(lines) + "\n"
