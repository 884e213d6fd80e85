"""Pictures of pages that need no network: line charts, bands, dots with intervals, matrices and histograms as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

COLOURS = ("#d1495b", "#2e6f95", "#3d8361", "#c77d0a", "#7b4fa3", "#4f5d75", "#a8763e", "#1b998b")
WIDTH, HEIGHT, BOTTOM, TOP = 640, 200, 24, 8  # of a chart, in px
ARROWS = {"up": " ↑", "down": " ↓", "": ""}  # which way is better
GLYPH = 6.2  # px that a letter of an axis takes
STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #6b7280; --card: #8881; --accent: #2e6f95; }
@media (prefers-color-scheme: dark) { :root { --soft: #9ca3af; --accent: #6fb1d9; } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: 0; } h2 { font-size: 1.1rem; margin-top: 2rem; }
video { width: 100%; background: #121216; image-rendering: auto; }
table { border-collapse: collapse; width: 100%; display: block; overflow-x: auto; }
td, th { padding: .3rem .8rem .3rem 0; text-align: left; border-bottom: 1px solid var(--line); white-space: nowrap; }
td:not(:first-child), th:not(:first-child) { text-align: right; font-variant-numeric: tabular-nums; }
td.prompt { white-space: normal; text-align: left; } svg { width: 100%; height: auto; } .soft { color: var(--soft); }
.key { display: inline-block; width: .8em; height: .8em; margin-right: .4em; border-radius: 2px; }
"""
Curve = Sequence[float | None]


def _frame(inside: Sequence[str], width: int = WIDTH) -> str:
    return (
        f'<svg viewBox="0 0 {width} {HEIGHT}" font-size="11" fill="currentColor" role="img">'
        f"{''.join(inside)}</svg>"
    )


def tick_texts(values: Sequence[float]) -> list[str]:
    """Numbers of an axis, all with as many digits as tell them apart."""
    spread, largest = max(values) - min(values), max(map(abs, values))
    if largest >= 1e5 or 0 < largest < 0.01:
        return [f"{value:.1e}" if value else "0" for value in values]
    digits = min(max(0, 1 - math.floor(math.log10(spread))), 6) if spread else 2
    return [f"{value:.{digits}f}" for value in values]


def _rows(low: float, top: float, left: float, width: int) -> list[str]:
    """Horizontal lines at both ends and in the middle, with their numbers."""
    drawn = []
    values = [low, low + top / 2, low + top]
    for value, text in zip(values, tick_texts(values), strict=True):
        y = _height(value, low, top)
        drawn.append(
            f'<line x1="{left:.1f}" x2="{width}" y1="{y:.1f}" y2="{y:.1f}" stroke="#8884"/>'
            f'<text x="{left - 6:.1f}" y="{y + 4:.1f}" text-anchor="end">{text}</text>'
        )
    return drawn


def _margin(low: float, top: float) -> float:
    """Left of the lines: as wide as the widest number of the axis."""
    return 10 + GLYPH * max(map(len, tick_texts([low, low + top / 2, low + top])))


def _height(value: float, low: float, top: float) -> float:
    return TOP + (HEIGHT - BOTTOM - TOP) * (1 - (value - low) / top)


def chart(
    curves: Sequence[Curve],
    seconds: float = 2.0,
    *,
    bands: Sequence[tuple[Curve, Curve]] = (),
    marks: Sequence[float] = (),
    from_zero: bool = True,
    width: int = WIDTH,
    unit: str = " s",
) -> str:
    """Lines over time as an SVG; where a curve has None it is interrupted.

    Args:
        curves: one line each, a value per `seconds`; bands: lower and upper curve of an area behind the lines;
        marks: seconds at which a vertical line is drawn; from_zero: the axis starts at 0; width: in px; unit: of the x axis.
    """
    length = max(map(len, curves))
    areas = [edge for band in bands for edge in band]
    known = [value for curve in [*curves, *areas] for value in curve if value is not None]
    low = 0.0 if from_zero else min(known, default=0.0)
    top = max(known, default=0.0) - low or 1.0
    left = _margin(low, top)

    def place(index: float, value: float) -> str:
        x = left + (width - left) * (index + 0.5) / length
        return f"{x:.1f},{_height(value, low, top):.1f}"

    drawn = []
    for (lower, upper), colour in zip(bands, COLOURS, strict=False):
        for run in _runs([None if a is None or b is None else a for a, b in zip(lower, upper, strict=True)]):
            indices = [index for index, _ in run]
            edge = [place(i, upper[i] or 0.0) for i in indices] + [
                place(i, lower[i] or 0.0) for i in reversed(indices)
            ]
            drawn.append(f'<polygon points="{" ".join(edge)}" fill="{colour}" opacity="0.18"/>')
    for curve, colour in zip(curves, COLOURS, strict=False):
        for run in _runs(curve):
            points = " ".join(place(index, value) for index, value in run)
            if len(run) == 1:
                across, up = points.split(",")
                drawn.append(f'<circle cx="{across}" cy="{up}" r="2.5" fill="{colour}"/>')
            else:
                drawn.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
    axes = _rows(low, top, left, width)
    for share in (0.25, 0.5, 0.75, 1.0):
        x = left + (width - left) * share
        axes.append(
            f'<text x="{x:.0f}" y="{HEIGHT - 6}" text-anchor="end">{share * length * seconds:.3g}{unit}</text>'
        )
    for mark in marks:
        x = left + (width - left) * mark / (length * seconds)
        axes.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" stroke="#8888" stroke-dasharray="3"/>'
        )
    return _frame([*axes, *drawn], width)


def _runs(curve: Curve) -> list[list[tuple[int, float]]]:
    """Stretches of a curve without None."""
    runs: list[list[tuple[int, float]]] = [[]]
    for index, value in enumerate(curve):
        if value is None:
            runs.append([])
        else:
            runs[-1].append((index, value))
    return [run for run in runs if run]


def xy_chart(xs: Sequence[float], ys: Sequence[float], x_name: str) -> str:
    """One line over numbers that rise."""
    least, length = min(ys), xs[-1] - xs[0] or 1.0
    spread = max(ys) - least or 1.0
    left = _margin(least, spread)
    places = [
        f"{left + (WIDTH - left) * (x - xs[0]) / length:.1f},{_height(y, least, spread):.1f}"
        for x, y in zip(xs, ys, strict=True)
    ]
    texts = _rows(least, spread, left, WIDTH)
    for share in (0.0, 0.5, 1.0):
        x = left + (WIDTH - left) * share
        anchor = "start" if share == 0 else "end"
        value = xs[0] + share * length
        texts.append(
            f'<text x="{x:.0f}" y="{HEIGHT - 6}" text-anchor="{anchor}">{value:.3g} {escape(x_name)}</text>'
        )
    line = f'<polyline points="{" ".join(places)}" fill="none" stroke="{COLOURS[0]}" stroke-width="2"/>'
    return _frame([*texts, line])


def dot(value: float, low: float, high: float, least: float, most: float, width: int = 160) -> str:
    """A value with its interval on the scale from `least` to `most`, small enough for a cell of a table."""
    height, spread = 14, (most - least) or 1.0

    def x(number: float) -> float:
        return 6 + (width - 12) * (number - least) / spread

    return (
        f'<svg viewBox="0 0 {width} {height}" style="width:{width}px;height:{height}px" role="img">'
        f'<line x1="6" x2="{width - 6}" y1="7" y2="7" stroke="#8884"/>'
        f'<line x1="{x(low):.1f}" x2="{x(high):.1f}" y1="7" y2="7" stroke="{COLOURS[0]}" stroke-width="3"/>'
        f'<circle cx="{x(value):.1f}" cy="7" r="4" fill="{COLOURS[0]}"/></svg>'
    )


def matrix(table: Sequence[Curve], rows: Sequence[str], columns: Sequence[str]) -> str:
    """Numbers as a table whose cells are the darker the greater."""
    known = [value for row in table for value in row if value is not None]
    least, spread = min(known, default=0.0), (max(known, default=1.0) - min(known, default=0.0)) or 1.0
    head = "".join(f"<th>{escape(name)}</th>" for name in ("", *columns))
    body = []
    for name, row in zip(rows, table, strict=True):
        cells = "".join(
            "<td>-</td>"
            if value is None
            else f'<td style="background:rgba(46,111,149,{0.6 * (value - least) / spread:.2f})">{value:.3f}</td>'
            for value in row
        )
        body.append(f"<tr><td>{escape(name)}</td>{cells}</tr>")
    return f'<table class="matrix"><tr>{head}</tr>{"".join(body)}</table>'


def histogram(values: Sequence[float], bins: int = 12, unit: str = "") -> str:
    """How often values occur."""
    most = max(values) or 1.0
    counts = [0] * bins
    for value in values:
        counts[min(bins - 1, int(bins * value / most))] += 1
    left = 10 + GLYPH * len(str(max(counts)))
    step = (WIDTH - left) / bins
    bars = [
        f'<rect x="{left + i * step + 1:.1f}" width="{step - 2:.1f}" fill="{COLOURS[0]}" '
        f'y="{_height(count, 0, max(counts)):.1f}" height="{HEIGHT - BOTTOM - _height(count, 0, max(counts)):.1f}"/>'
        for i, count in enumerate(counts)
        if count
    ]
    texts = [
        f'<text x="{left}" y="{HEIGHT - 6}">0</text>',
        f'<text x="{WIDTH}" y="{HEIGHT - 6}" text-anchor="end">{most:.3g} {escape(unit)}</text>',
        f'<text x="{left - 6}" y="{TOP + 8}" text-anchor="end">{max(counts)}</text>',
    ]
    return _frame([*texts, *bars])
