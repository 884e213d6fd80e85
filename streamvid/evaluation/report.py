"""A run's report: one HTML file that opens without a network and without scripts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from streamvid.evaluation.charts import ARROWS, STYLE, chart, dot, histogram, matrix, xy_chart
from streamvid.evaluation.manifest import MANIFEST, read_manifest
from streamvid.evaluation.results import read_results, write_text
from streamvid.evaluation.thumbnails import frame_count, pictures_of
from streamvid.evaluation.types import FIDELITIES, Video

GALLERY, GALLERY_METRICS = 10, 4  # worst videos, and of how many metrics
STRIPS, STRIP_FRAMES = 3, 8  # videos at the head of the page, and pictures of each
CURVE_WIDTH = 460  # px of a curve's chart: two beside each other
HEADLINES = ("timing.real_time_factor", "timing.first_chunk")  # on cards, after the primary metrics
PAGE_STYLE = (
    STYLE
    + """
td.wide { white-space: normal; text-align: left; } details { margin: .5rem 0; } .bad { color: #d1495b; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .8rem; margin: 1.2rem 0; }
.cards div { background: var(--card); border-radius: 8px; padding: .7rem .9rem; }
.cards b { display: block; font-size: 1.5rem; line-height: 1.3; font-variant-numeric: tabular-nums; }
.cards b small { font-size: .9rem; font-weight: 400; }
.cards small, .strip small { color: var(--soft); overflow-wrap: anywhere; }
.strip { margin: 1rem 0; } .strip .frames { display: flex; gap: 2px; } .strip img { width: 12.5%; border-radius: 3px; }
.strip .shots { display: flex; gap: 2px; } .strip .shots small {
  border-top: 3px solid var(--accent); padding: .2rem .6rem 0 0; font-size: .75rem; line-height: 1.3; }
.strip .shots small:nth-child(even) { border-color: #d1495b; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(20rem, 1fr)); gap: 1rem 1.5rem; }
.charts figure { margin: 0; } .charts figcaption { font-weight: 600; }
.charts figcaption small { font-weight: 400; display: block; color: var(--soft); }
.worst { display: grid; grid-template-columns: repeat(auto-fill, minmax(22rem, 1fr)); gap: .8rem; }
.worst figure { margin: 0; } .worst img { width: 32%; image-rendering: pixelated; } .worst figcaption { font-size: .85em; }
.matrix td { text-align: center; padding: .3rem .6rem; }
"""
)


def shown(value: float | None, interval: Sequence[float] | None = None) -> str:
    """A number, rounded to what its interval can tell."""
    if value is None:
        return "-"
    width = interval[1] - interval[0] if interval else 0.0
    digits = 4 if not width else int(np.clip(2 - np.floor(np.log10(width)), 0, 5))
    return f"{value:.{digits}f}"


def summary(results: Mapping[str, Any]) -> str:
    """A run in a few lines for the terminal."""
    lines = []
    for name, entry in {**results["metrics"], **results.get("timing", {})}.items():
        if entry["value"] is None:
            reason = next(iter(entry["without_value"]), "no video")
            lines.append(f"{name:34} -           {reason}")
        else:
            bounds = entry["interval"]
            between = f"[{shown(bounds[0], bounds)}, {shown(bounds[1], bounds)}]" if bounds else ""
            used = f"{entry['used']}/{entry['of']} {entry['fidelity']}"
            lines.append(f"{name:34} {shown(entry['value'], bounds):10} {between:22} {used}")
    for family, scores in results["scores"].items():
        totals = ", ".join(f"{key} {shown(scores[key]['value'])}" for key in ("quality", "semantic", "total"))
        missing = f" ({len(scores['missing'])} dimensions missing)" if scores["missing"] else ""
        lines.append(f"{family}: {totals}{missing}")
    return "\n".join(lines)


def write_report(folder: Path) -> Path:
    """Write `report.html` from a run's results, series, manifest and videos."""
    results = read_results(folder)
    series = _json(folder / "series.json")
    about = _json(folder / "run.json")
    videos = {video.id: video for video in read_manifest(folder / MANIFEST, [])}
    title = f"{about.get('protocol') or 'Videos'}" + (f", {about['method']}" if about.get("method") else "")
    parts = [
        f"<h1>{escape(title)}</h1>",
        _header(results, about),
        _cards(results),
        _strips(list(videos.values())[:STRIPS]),
        _problems(results["problems"]),
        _totals(results["scores"]),
        _scores(results["metrics"]),
        _drift(series, videos, results["metrics"]),
        _segments(series),
        _lags(series),
        _latencies(series),
        _timing(results["timing"], videos),
        _gallery(results, videos),
        _definitions(results["metrics"]),
    ]
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{PAGE_STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )
    write_text(folder / "report.html", page)
    return folder / "report.html"


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _header(results: Mapping[str, Any], about: Mapping[str, Any]) -> str:
    facts = [f"{results['videos']} videos"]
    facts += [f"{name} {about[name]}" for name in ("model", "method") if about.get(name)]
    if about.get("overrides"):
        facts.append(", ".join(f"{k} = {v}" for k, v in about["overrides"].items()))
    versions = ", ".join(f"{k} {v}" for k, v in about.get("versions", {}).items())
    deviations = "".join(f"<li>{escape(text)}</li>" for text in about.get("deviations", ()))
    licences = ", ".join(f"{name}: {text}" for name, text in about.get("licences", {}).items())
    legend = "; ".join(f"<b>{name}</b>: {escape(text)}" for name, text in FIDELITIES.items())
    return (
        f'<p class="soft">{escape("; ".join(facts))}. {escape(versions)}. {escape(licences)}</p>'
        + (f"<p>What differs from the publication:</p><ul>{deviations}</ul>" if deviations else "")
        + f'<details><summary>Fidelity of the numbers</summary><p class="soft">{legend}.</p></details>'
    )


def _cards(results: Mapping[str, Any]) -> str:
    """The numbers that a reader looks for first."""
    entries = {**results["metrics"], **results["timing"]}
    cards = ""
    for name in (*results.get("primary", ()), *HEADLINES):
        entry = entries.get(name)
        if not entry or entry["value"] is None:
            continue
        bounds = entry["interval"]
        unit = f" <small>{escape(entry['unit'])}</small>" if entry["unit"] else ""
        varies = bounds and bounds[1] > bounds[0]
        between = f"{shown(bounds[0], bounds)} … {shown(bounds[1], bounds)}" if varies else "in all videos"
        cards += (
            f"<div><small>{escape(name.split('.')[1].replace('_', ' '))}{ARROWS[entry['better']]}</small>"
            f"<b>{shown(entry['value'], bounds)}{unit}</b><small>{between}</small></div>"
        )
    return f'<div class="cards" id="cards">{cards}</div>' if cards else ""


def _strips(videos: Sequence[Video]) -> str:
    """A few videos from left to right, each above the prompts that it was made under."""
    text = ""
    for video in videos:
        path = Path(video.path)
        frames = frame_count(path)
        pictures = pictures_of(
            path, [round(i * (frames - 1) / (STRIP_FRAMES - 1)) for i in range(STRIP_FRAMES)]
        )
        if not pictures:
            continue
        segments = [(part.stop - part.start, part.prompt) for part in video.segments] or [(1, video.prompt)]
        shots = "".join(
            f'<small style="flex: {length} 0 0">{escape(prompt)}</small>' for length, prompt in segments
        )
        text += (
            f'<div class="strip"><div class="frames">{pictures}</div><div class="shots">{shots}</div></div>'
        )
    return f'<div id="strips">{text}</div>' if text else ""


def _problems(problems: Sequence[str]) -> str:
    if not problems:
        return ""
    lines = "".join(f"<li>{escape(text)}</li>" for text in problems)
    return f'<h2 class="bad">Problems ({len(problems)})</h2><ul id="problems">{lines}</ul>'


def _totals(scores: Mapping[str, Any]) -> str:
    text = ""
    for family, told in scores.items():
        title = "VBench" if family == "vbench" else "VBench-Long"
        if all(told[key]["value"] is None for key in ("quality", "semantic")):
            text += (
                f'<p class="soft">{title} has no totals here: {len(told["missing"])} of its dimensions have no value '
                "(<code>streamvid eval doctor</code> says what they need).</p>"
            )
            continue
        cells = "".join(
            f"<td>{shown(told[key]['value'], told[key]['interval'])}</td>"
            for key in ("quality", "semantic", "total")
        )
        rows = "".join(
            f"<tr><td>{name}</td><td>{shown(entry['raw']) if entry else '-'}</td>"
            f"<td>{shown(entry['normalised']) if entry else '-'}</td><td></td></tr>"
            for name, entry in told["dimensions"].items()
        )
        missing = (
            f"missing, so that there is no total: {', '.join(told['missing'])}" if told["missing"] else ""
        )
        text += (
            f"<h2>{title}</h2><table><tr><th></th><th>quality</th>"
            f"<th>semantic</th><th>total</th></tr><tr><td>all</td>{cells}</tr></table>"
            f'<p class="soft">{escape(missing)}</p><details><summary>Dimensions</summary><table><tr><th>dimension</th>'
            f"<th>raw</th><th>normalised</th><th></th></tr>{rows}</table></details>"
        )
    return text


def _scores(metrics: Mapping[str, Any]) -> str:
    rows = []
    for name, entry in metrics.items():
        label = f"<td>{escape(name)}{ARROWS[entry['better']]}</td>"
        if entry["value"] is None:
            reasons = "; ".join(f"{reason} ({count})" for reason, count in entry["without_value"].items())
            rows.append(f'<tr>{label}<td>-</td><td class="wide" colspan="5">{escape(reasons)}</td></tr>')
            continue
        bounds = entry["interval"] or [entry["value"]] * 2
        values = [v["score"] for v in entry["per_video"].values() if v["score"] is not None]
        picture = dot(
            entry["value"], bounds[0], bounds[1], min([*values, bounds[0]]), max([*values, bounds[1]])
        )
        seeds = entry["seed_deviation"]
        rows.append(
            f"<tr>{label}<td>{shown(entry['value'], entry['interval'])}</td>"
            f"<td>{shown(bounds[0], bounds)} … {shown(bounds[1], bounds)}</td><td>{picture}</td>"
            f"<td>{entry['used']}/{entry['of']}</td><td>{'unknown' if seeds is None else f'{seeds:.2g}'}</td>"
            f"<td>{entry['fidelity']}</td></tr>"
        )
    head = "".join(
        f"<th>{text}</th>"
        for text in (
            "metric",
            "value",
            "95% over prompts",
            "among the videos",
            "used",
            "seed deviation",
            "fidelity",
        )
    )
    return f'<h2>Scores</h2><table id="scores"><tr>{head}</tr>{"".join(rows)}</table>'


def _quantiles(curves: Sequence[Sequence[float | None]]) -> tuple[list, list, list]:
    """Lower quartile, median and upper quartile at every place that any curve reaches."""
    told = []
    for index in range(max(map(len, curves))):
        values = np.array([c[index] for c in curves if index < len(c) and c[index] is not None], float)
        told.append(np.percentile(values, [25, 50, 75]).tolist() if len(values) else [None] * 3)
    low, middle, high = zip(*told, strict=True)
    return list(low), list(middle), list(high)


def _drift(series: Mapping[str, Any], videos: Mapping[str, Video], metrics: Mapping[str, Any]) -> str:
    text = ""
    starts = [
        tuple(round(part.start / (video.fps or 16), 2) for part in video.segments[1:])
        for video in videos.values()
    ]
    marks = starts[0] if starts and all(s == starts[0] for s in starts) else ()
    for metric, table in series.items():
        curves = [entry["per_second"] for entry in table.values() if entry.get("per_second")]
        if not curves or not metric.startswith(("drift.", "long.motion", "long.warp_flicker")):
            continue
        low, middle, high = _quantiles(curves)
        picture = chart([middle], 1.0, bands=[(low, high)], marks=marks, from_zero=False, width=CURVE_WIDTH)
        text += _figure(metric, metrics.get(metric, {}).get("unit", ""), picture)
    probe = series.get("interactive.probe_adherence", {})
    curves = [_by_window(entry["curve"]) for entry in probe.values() if len(entry.get("curve", ())) > 1]
    if curves:
        low, middle, high = _quantiles(curves)
        picture = chart([middle], bands=[(low, high)], marks=marks, width=CURVE_WIDTH)
        text = _figure("interactive.probe_adherence", "share, every two seconds", picture) + text
    if not text:
        return ""
    return (
        "<h2>Curves over time</h2><p class='soft'>Median over videos and the middle half; dashed: prompt switches.</p>"
        + f'<div id="curves" class="charts">{text}</div>'
    )


def _by_window(curve: Sequence[Sequence[float]], seconds: float = 2.0) -> list[float | None]:
    """Values at the seconds at which their windows end, one per window; None where a prompt was changing."""
    found: list[float | None] = [None] * (int((curve[-1][0] - 1e-6) // seconds) + 1)
    for second, value in curve:
        found[int((second - 1e-6) // seconds)] = value
    return found


def _figure(name: str, unit: str, picture: str) -> str:
    return f"<figure><figcaption>{escape(name)}<small>{escape(unit)}&nbsp;</small></figcaption>{picture}</figure>"


def _segments(series: Mapping[str, Any]) -> str:
    text = ""
    for metric in ("interactive.probe_adherence", "interactive.clip_segment"):
        tables = [e["matrix"] for e in series.get(metric, {}).values() if len(e.get("matrix", ())) > 1]
        sizes = {(len(table), len(table[0])) for table in tables}
        if len(sizes) != 1:
            continue
        rows, columns = sizes.pop()
        mean = [[_mean([table[i][j] for table in tables]) for j in range(columns)] for i in range(rows)]
        names = [f"segment {i + 1}" for i in range(rows)]
        text += f"<h3>{metric}</h3>{matrix(mean, names, [f'prompt {j + 1}' for j in range(columns)])}"
    if not text:
        return ""
    note = "How well each segment fits each prompt, mean over videos: the diagonal should win."
    return f'<h2>Segments and prompts</h2><p class="soft">{note}</p><div id="segments">{text}</div>'


def _mean(values: Sequence[float | None]) -> float | None:
    told = [value for value in values if value is not None]
    return float(np.mean(told)) if told else None


def _lags(series: Mapping[str, Any]) -> str:
    table = series.get("long.coherence", {})
    curves = [entry for entry in table.values() if len(entry.get("lags", ())) > 1]
    if not curves:
        return ""
    length = min(len(entry["lags"]) for entry in curves)
    ys = np.mean([entry["similarity"][:length] for entry in curves], axis=0).tolist()
    picture = xy_chart(curves[0]["lags"][:length], ys, "s")
    note = "Mean similarity of two frames by the time between them: a loop shows as peaks, drift as a fall."
    return f'<h2>Similarity over lags</h2><p class="soft">{note}</p><div id="lags">{picture}</div>'


def _latencies(series: Mapping[str, Any]) -> str:
    table = series.get("interactive.switch_latency", {})
    values = [v for entry in table.values() for v in entry["per_switch"] if v is not None]
    ignored = sum(v is None for entry in table.values() for v in entry["per_switch"])
    if not values:
        return ""
    return (
        f'<h2>Switch latency</h2><p class="soft">Frames until a new prompt shows; {ignored} of {ignored + len(values)} '
        f'switches were ignored or hardly show.</p><div id="latency">{histogram(values, unit="frames")}</div>'
    )


def _timing(timing: Mapping[str, Any], videos: Mapping[str, Video]) -> str:
    told = {name: entry for name, entry in timing.items() if entry["value"] is not None}
    if not told:
        return ""
    rows = "".join(
        f"<tr><td>{name}</td><td>{entry['value']:.4g} {escape(entry['unit'])}</td>"
        f"<td class='wide'>{escape(entry['definition'])}</td></tr>"
        for name, entry in told.items()
    )
    curves = [list(video.timings.get("chunk_seconds", ())) for video in videos.values()]
    curves = [curve for curve in curves if curve]
    picture = ""
    if curves:
        low, middle, high = _quantiles(curves)
        picture = f"<h3>Seconds per chunk, by chunk</h3>{chart([middle], 1.0, bands=[(low, high)], unit='')}"
    return f'<h2>Speed</h2><table id="timing"><tr><th>metric</th><th>mean</th><th></th></tr>{rows}</table>{picture}'


def _gallery(results: Mapping[str, Any], videos: Mapping[str, Video]) -> str:
    metrics = results["metrics"]
    names = [n for n in results.get("primary", ()) if n in metrics]
    names += [n for n, entry in metrics.items() if entry["better"] and n not in names]
    pictures: dict[str, str] = {}
    text = ""
    chosen = [n for n in names if _worst(metrics[n])][:GALLERY_METRICS]
    for name in chosen:
        figures = ""
        for video, score in _worst(metrics[name]):
            if video not in videos:
                continue
            if video not in pictures:
                path = Path(videos[video].path)
                last = frame_count(path) - 1
                pictures[video] = pictures_of(path, [0, (last + 1) // 2, last])
            prompt = videos[video].prompt_at(0)
            figures += (
                f"<figure>{pictures[video]}<figcaption>{escape(video)}: {score:.4g}<br>"
                f'<span class="soft">{escape(prompt[:120])}</span></figcaption></figure>'
            )
        text += f'<h3>{escape(name)}</h3><div class="worst">{figures}</div>'
    return f'<h2>Worst ten</h2><div id="gallery">{text}</div>' if text else ""


def _worst(entry: Mapping[str, Any]) -> list[tuple[str, float]]:
    """The worst videos of a metric, if they differ at all."""
    told = [(name, v["score"]) for name, v in entry["per_video"].items() if v["score"] is not None]
    if len({score for _, score in told}) < 2:
        return []
    return sorted(told, key=lambda pair: pair[1], reverse=entry["better"] == "down")[:GALLERY]


def _definitions(metrics: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{name}</td><td class='wide'>{escape(entry['definition'])}"
        f"{' (' + escape(str(entry['options'])) + ')' if entry['options'] else ''}</td></tr>"
        for name, entry in metrics.items()
    )
    return f"<h2>Definitions</h2><details><summary>{len(metrics)} metrics</summary><table>{rows}</table></details>"
