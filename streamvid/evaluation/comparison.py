"""`streamvid eval compare`: runs against a first one, on the same prompts, with paired statistics by prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from streamvid.errors import UserError
from streamvid.evaluation import stats
from streamvid.evaluation.charts import STYLE, dot
from streamvid.evaluation.manifest import MANIFEST, read_manifest
from streamvid.evaluation.results import read_results, to_json, write_text
from streamvid.io.files import prepare_output_folder


def prompt_means(folder: Path, entry: Mapping[str, Any], groups: Mapping[str, str]) -> dict[str, float]:
    """Mean value of a metric for every prompt of a run."""
    found: dict[str, list[float]] = {}
    for name, told in entry["per_video"].items():
        if told["score"] is not None:
            found.setdefault(groups.get(name, name), []).append(told["score"])
    return {group: float(np.mean(values)) for group, values in found.items()}


def compare_pair(first: Path, second: Path, margin: float | None = None) -> dict[str, Any]:
    """How the second run differs from the first, metric by metric; prompts that only one has are left out."""
    runs = [read_results(folder) for folder in (first, second)]
    groups = [
        {video.id: video.group or video.id for video in read_manifest(folder / MANIFEST, [])}
        for folder in (first, second)
    ]
    seeds = [
        {video.id: video.seed for video in read_manifest(folder / MANIFEST, [])} for folder in (first, second)
    ]
    found: dict[str, Any] = {}
    everything = [{**run["metrics"], **run["timing"]} for run in runs]
    for name, entry in everything[0].items():
        other = everything[1].get(name)
        if other is None:
            continue
        means = [
            prompt_means(folder, e, g)
            for folder, e, g in zip((first, second), (entry, other), groups, strict=True)
        ]
        shared = sorted(means[0].keys() & means[1].keys())
        if not shared:
            continue
        a, b = (np.array([table[group] for group in shared]) for table in means)
        row = {
            "first": float(a.mean()),
            "second": float(b.mean()),
            "better": entry["better"],
            "unit": entry["unit"],
        }
        row |= asdict(stats.paired(a, b, entry["better"]))
        if margin is not None and len(shared) > 1:
            row["equivalence_p"] = stats.equivalent(b - a, margin)
        found[name] = row
    primary = [n for n in runs[0].get("primary", ()) if n in found]
    for name, p in zip(primary, stats.holm([found[n]["p"] for n in primary]), strict=True):
        found[name]["holm_p"] = p
    same = all(seeds[1].get(name) == seed for name, seed in seeds[0].items() if name in seeds[1])
    return {
        "first": _name(runs[0], first),
        "second": _name(runs[1], second),
        "primary": primary,
        "same_seeds": same,
        "metrics": found,
    }


def _name(results: Mapping[str, Any], folder: Path) -> str:
    return results.get("method") or folder.name


def compare_runs(runs: Sequence[str], output: str | None = None, margin: float | None = None) -> str:
    """Compare all with the first; the text of a terminal, and comparison.json and .html under `output`."""
    if len(runs) < 2:
        raise UserError(f"runs = {', '.join(runs)}: give at least two folders to compare")
    pairs = [compare_pair(Path(runs[0]), Path(run), margin) for run in runs[1:]]
    if output:
        folder = prepare_output_folder(output)
        write_text(folder / "comparison.json", to_json(pairs))
        write_text(folder / "comparison.html", page(pairs))
    return "\n\n".join(table(pair) for pair in pairs)


def verdict(row: Mapping[str, Any]) -> str:
    """better, worse or no difference that can be told, for the second run."""
    p = row.get("holm_p", row["p"])
    if p >= 0.05 or not row["better"] or row["difference"] == 0:
        return "-"
    return "better" if (row["difference"] > 0) == (row["better"] == "up") else "worse"


def table(pair: Mapping[str, Any]) -> str:
    """A comparison as lines of text."""
    head = f"{pair['second']} against {pair['first']}" + ("" if pair["same_seeds"] else " (seeds differ)")
    lines = [head, f"{'metric':34} {'first':>9} {'second':>9} {'difference, 95%':>28} {'p':>7} w/t/l"]
    for name, row in pair["metrics"].items():
        star = "*" if name in pair["primary"] else " "
        bounds = f"{row['difference']:+.4f} [{row['low']:+.4f}, {row['high']:+.4f}]"
        p = row.get("holm_p", row["p"])
        counts = f"{row['wins']}/{row['ties']}/{row['losses']}"
        lines.append(
            f"{name + star:34} {row['first']:9.4f} {row['second']:9.4f} {bounds:>28} {p:7.4f} {counts} {verdict(row)}"
        )
    lines.append("* primary, p adjusted by Holm; the others are exploratory")
    return "\n".join(lines)


def page(pairs: Sequence[Mapping[str, Any]]) -> str:
    """All comparisons as one HTML page."""
    text = ""
    for pair in pairs:
        rows = ""
        for name, row in pair["metrics"].items():
            widest = max(abs(row["low"]), abs(row["high"]), abs(row["difference"])) or 1.0
            rows += (
                f"<tr><td>{escape(name)}{' *' if name in pair['primary'] else ''}</td><td>{row['first']:.4f}</td>"
                f"<td>{row['second']:.4f}</td><td>{row['difference']:+.4f}</td>"
                f"<td>{dot(row['difference'], row['low'], row['high'], -widest, widest)}</td>"
                f"<td>{row.get('holm_p', row['p']):.4f}</td><td>{row['wilcoxon']:.4f}</td>"
                f"<td>{row['wins']}/{row['ties']}/{row['losses']}</td><td>{row['effect']:+.2f}</td>"
                f"<td>{row['detectable']:.4f}</td><td>{verdict(row)}</td></tr>"
            )
        head = "".join(
            f"<th>{escape(t)}</th>"
            for t in (
                *("metric", pair["first"], pair["second"], "difference", "95%, around 0", "p", "Wilcoxon"),
                *("win/tie/loss", "d_z", "detectable", ""),
            )
        )
        note = "" if pair["same_seeds"] else " The seeds differ."
        text += (
            f"<h2>{escape(pair['second'])} against {escape(pair['first'])}</h2>"
            f'<p class="soft">By prompt.{note} *: primary, p adjusted by Holm.</p><table><tr>{head}</tr>{rows}</table>'
        )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Comparison</title>'
        f"<style>{STYLE}</style></head><body><h1>Comparison</h1>{text}</body></html>\n"
    )
