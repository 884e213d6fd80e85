"""The HTML page of a comparison: one file, no network, no scripts."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from streamvid.evaluation.charts import COLOURS, STYLE, chart

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


def shots(timeline: Sequence[Mapping[str, Any]]) -> str:
    """When each shot starts, and its prompt."""
    rows = "".join(
        f"<tr><td>{shot['start']:.2f} s</td><td>{escape(str(shot['transition'] or ''))}</td>"
        f'<td class="prompt">{escape(shot["prompt"])}</td></tr>'
        for shot in timeline
    )
    return f"<table><tr><th>start</th><th>transition</th><th>prompt</th></tr>{rows}</table>"
