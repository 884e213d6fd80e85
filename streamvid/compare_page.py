"""The HTML page of a comparison: one file, no network, no scripts."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

COLOURS = ("#d1495b", "#2e6f95", "#3d8361", "#c77d0a", "#7b4fa3", "#4f5d75", "#a8763e", "#1b998b")
WIDTH, HEIGHT, LEFT, BOTTOM = 640, 200, 44, 24  # of a chart, in px
STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8888; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: 0; } h2 { font-size: 1.1rem; margin-top: 2rem; }
video { width: 100%; background: #121216; image-rendering: auto; }
table { border-collapse: collapse; width: 100%; display: block; overflow-x: auto; }
td, th { padding: .3rem .8rem .3rem 0; text-align: left; border-bottom: 1px solid var(--line); white-space: nowrap; }
td:not(:first-child), th:not(:first-child) { text-align: right; font-variant-numeric: tabular-nums; }
td.prompt { white-space: normal; text-align: left; } svg { width: 100%; height: auto; } .soft { color: var(--soft); }
.key { display: inline-block; width: .8em; height: .8em; margin-right: .4em; border-radius: 2px; }
"""
# column of the table -> key of a method's result, and how it is written
COLUMNS: dict[str, tuple[str, str]] = {
    "adherence": ("mean_adherence", "{:.3f}"),
    "drift at the end": ("last_drift", "{:.1f}"),
    "motion": ("mean_motion", "{:.2f}"),
    "fps": ("fps", "{:.1f}"),
    "fps without decoding": ("denoising_fps", "{:.1f}"),
    "chunk p50 s": ("chunk_p50", "{:.3f}"),
    "chunk p95 s": ("chunk_p95", "{:.3f}"),
    "KV MB": ("kv_bytes", "{:.2f}"),
}
CHARTS = {
    "adherence": "Adherence: share of the prompt's attributes that the probe finds, per two seconds",
    "drift": "Drift: distance of the look from the first two seconds of the prompt, in grey levels",
    "motion": "Motion: mean difference of neighbouring frames, in grey levels",
}


def page(result: Mapping[str, Any], video: bytes) -> str:
    """The page of a `compare.json`, with the side-by-side video (MP4) inside."""
    methods = result["methods"]
    names = ", ".join(method["method"] for method in methods)
    title = escape(result["title"] or "Comparison")
    charts = "".join(
        f"<h2>{escape(text)}</h2>{chart([m[name] for m in methods])}"
        for name, text in CHARTS.items()
        if any(value is not None for m in methods for value in m[name])
    )
    data = base64.b64encode(video).decode()
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}: {escape(names)}</title><style>{STYLE}</style></head><body>
<h1>{title}</h1>
<p class="soft">{escape(names)}. Model {escape(result["model"])}, seed {result["seed"]}, {result["fps"]:g} frames/s.</p>
<video controls autoplay loop muted playsinline src="data:video/mp4;base64,{data}"></video>
{table(methods)}
<p class="soft">Times: {escape(result["warm_up"])}; the methods ran in turns on one machine
({escape(result["machine"]["platform"])}, {escape(str(result["machine"]["device"]))}).</p>
{charts}
<h2>Shots</h2>
{shots(methods[0]["timeline"])}
</body></html>
"""


def table(methods: Sequence[Mapping[str, Any]]) -> str:
    """One row per method, with the colour of its lines."""
    rows = []
    for method, colour in zip(methods, COLOURS, strict=False):
        cells = []
        for key, form in COLUMNS.values():
            value = method[key] if key != "kv_bytes" else method[key] / 1e6
            cells.append(f"<td>{form.format(value) if value is not None else '-'}</td>")
        key = f'<span class="key" style="background:{colour}"></span>'
        rows.append(f"<tr><td>{key}{escape(method['method'])}</td>{''.join(cells)}</tr>")
    head = "".join(f"<th>{name}</th>" for name in ("method", *COLUMNS))
    return f"<table><tr>{head}</tr>{''.join(rows)}</table>"


def chart(curves: Sequence[Sequence[float | None]], seconds: float = 2.0) -> str:
    """Lines over time as an SVG; where a curve has None it is interrupted."""
    length = max(map(len, curves))
    top = max((value for curve in curves for value in curve if value is not None), default=0.0) or 1.0

    def place(index: int, value: float) -> str:
        x = LEFT + (WIDTH - LEFT) * (index + 0.5) / length
        return f"{x:.1f},{(HEIGHT - BOTTOM) * (1 - value / (1.05 * top)):.1f}"

    lines = []
    for curve, colour in zip(curves, COLOURS, strict=False):
        for run in _runs(curve):
            points = " ".join(place(index, value) for index, value in run)
            if len(run) == 1:
                left, up = points.split(",")
                lines.append(f'<circle cx="{left}" cy="{up}" r="2.5" fill="{colour}"/>')
            else:
                lines.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
    marks = []
    for share in (0.0, 0.5, 1.0):
        y = (HEIGHT - BOTTOM) * (1 - share / 1.05)
        marks.append(
            f'<line x1="{LEFT}" x2="{WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="#8884"/>'
            f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{share * top:.3g}</text>'
        )
    for share in (0.25, 0.5, 0.75, 1.0):
        x = LEFT + (WIDTH - LEFT) * share
        marks.append(
            f'<text x="{x:.0f}" y="{HEIGHT - 6}" text-anchor="end">{share * length * seconds:.0f} s</text>'
        )
    inside = "".join([*marks, *lines])
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" font-size="11" fill="currentColor" role="img">{inside}</svg>'


def _runs(curve: Sequence[float | None]) -> list[list[tuple[int, float]]]:
    """Stretches of a curve without None."""
    runs: list[list[tuple[int, float]]] = [[]]
    for index, value in enumerate(curve):
        if value is None:
            runs.append([])
        else:
            runs[-1].append((index, value))
    return [run for run in runs if run]


def shots(timeline: Sequence[Mapping[str, Any]]) -> str:
    """When each shot starts, and its prompt."""
    rows = "".join(
        f"<tr><td>{shot['start']:.2f} s</td><td>{escape(str(shot['transition'] or ''))}</td>"
        f'<td class="prompt">{escape(shot["prompt"])}</td></tr>'
        for shot in timeline
    )
    return f"<table><tr><th>start</th><th>transition</th><th>prompt</th></tr>{rows}</table>"
