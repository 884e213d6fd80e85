"""A leaderboard: methods in rows, numbers with their intervals in columns; as Markdown and as one HTML file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from streamvid.evaluation import stats
from streamvid.evaluation.charts import ARROWS, STYLE, dot

LEGEND = (
    "Mean ± half the 95% interval over prompts. Bold: the best. ·: not told apart from the best (paired by prompt, "
    "sign-flip test, Holm over the methods, 5%)."
)
PAGE_STYLE = (
    STYLE
    + """
body { max-width: 100rem; } p, ul { max-width: 60rem; } #board { font-size: 14px; }
#board th { cursor: pointer; vertical-align: bottom; } #board th:hover { text-decoration: underline; }
#board td { vertical-align: top; } #board td small { display: block; width: 16rem; white-space: normal; line-height: 1.3; }
#board td.best { font-weight: 700; background: #3d836133; } #board td.equal { background: #3d836118; }
#board svg { display: block; margin-left: auto; }
"""
)
SORTING = """
document.querySelectorAll('#board th').forEach((head, column) => head.addEventListener('click', () => {
  const body = document.querySelector('#board tbody'), key = row => Number(row.cells[column].dataset.value);
  const text = column === 0, sign = head.dataset.better === 'up' ? -1 : 1;
  const rows = [...body.rows].sort((a, b) => text
    ? a.cells[0].textContent.localeCompare(b.cells[0].textContent)
    : (isNaN(key(a)) - isNaN(key(b))) || sign * (key(a) - key(b)));
  body.append(...rows);
}));
"""


@dataclass(frozen=True)
class Column:
    """A number that methods are compared by; `better`: up, down, or neither."""

    name: str
    title: str
    better: str
    definition: str
    unit: str = ""


@dataclass(frozen=True)
class Cell:
    """A value with half of its 95% interval; `mark`: best, equal (not told apart from the best), or nothing."""

    value: float
    half: float = 0.0
    mark: str = ""

    @property
    def text(self) -> str:
        if not self.half:
            return f"{self.value:.4g}"
        digits = int(np.clip(1 - np.floor(np.log10(self.half)), 0, 6))  # two of the interval
        return f"{self.value:.{digits}f} ± {self.half:.{digits}f}"


@dataclass(frozen=True)
class Board:
    """A page: `about` says what was run; `rows`: name, source and cells (None: no value) of every method."""

    title: str
    about: str
    command: str
    columns: Sequence[Column]
    rows: Sequence[tuple[str, str, Sequence[Cell | None]]]


def marks(means: Sequence[Mapping[str, float]], better: str) -> list[str]:
    """For every method `best`, `equal` or nothing, from its mean value by prompt."""
    values = [float(np.mean(list(table.values()))) if table else None for table in means]
    if not better or all(value is None for value in values):
        return [""] * len(means)
    sign = -1 if better == "down" else 1
    best = max((i for i, v in enumerate(values) if v is not None), key=lambda i: sign * (values[i] or 0.0))
    others = [i for i, m in enumerate(means) if i != best and len(m.keys() & means[best].keys()) > 1]
    tests = []
    for i in others:
        shared = sorted(means[i].keys() & means[best].keys())
        pair = [np.array([means[j][g] for g in shared]) for j in (best, i)]
        tests.append(stats.paired(pair[0], pair[1], better).p)
    adjusted = dict(zip(others, stats.holm(tests), strict=True))

    def mark(i: int) -> str:
        if values[i] is not None and values[i] == values[best]:
            return "best"
        return "equal" if adjusted.get(i, 0.0) >= 0.05 else ""

    return [mark(i) for i in range(len(means))]


def markdown(board: Board) -> str:
    """The page for a repository's documents."""
    titles = [f"{column.title}{ARROWS[column.better]}" for column in board.columns]
    lines = ["| method | " + " | ".join(titles) + " |", "|---" * (len(titles) + 1) + "|"]
    for name, _, cells in board.rows:
        texts = [
            "-"
            if cell is None
            else {"best": f"**{cell.text}**", "equal": f"{cell.text} ·"}.get(cell.mark, cell.text)
            for cell in cells
        ]
        lines.append(f"| {name} | {' | '.join(texts)} |")
    legend = "\n".join(
        f"- `{c.name}`{f' ({c.unit})' if c.unit else ''}: {c.definition}" for c in board.columns
    )
    return (
        f"# {board.title}\n\n{board.about} (`{board.command}`)\n\n{LEGEND}\n\n"
        + "\n".join(lines)
        + f"\n\n{legend}\n"
    )


def html(board: Board) -> str:
    """The page for a browser: the same table with its intervals drawn, a click on a head sorts. No network."""
    heads = "<th>method</th>" + "".join(
        f'<th data-better="{c.better}" title="{escape(c.definition)}">{escape(c.title)}{ARROWS[c.better]}</th>'
        for c in board.columns
    )
    scales = [_scale([cells[i] for _, _, cells in board.rows]) for i in range(len(board.columns))]
    body = ""
    for name, source, cells in board.rows:
        row = f'<td>{escape(name)}<small class="soft">{escape(source)}</small></td>'
        for cell, (least, most) in zip(cells, scales, strict=True):
            if cell is None:
                row += "<td>-</td>"
                continue
            picture = dot(cell.value, cell.value - cell.half, cell.value + cell.half, least, most, width=90)
            row += f'<td class="{cell.mark}" data-value="{cell.value}">{cell.text}{picture}</td>'
        body += f"<tr>{row}</tr>"
    legend = "".join(
        f"<li><b>{escape(c.title)}</b>{f' ({escape(c.unit)})' if c.unit else ''}: {escape(c.definition)}</li>"
        for c in board.columns
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(board.title)}</title><style>{PAGE_STYLE}</style></head><body><h1>{escape(board.title)}</h1>"
        f'<p>{escape(board.about)}</p><p class="soft">{escape(LEGEND)} A click on a head sorts.</p>'
        f'<table id="board"><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table><ul>{legend}</ul>'
        f'<p class="soft"><code>{escape(board.command)}</code></p><script>{SORTING}</script></body></html>\n'
    )


def _scale(cells: Sequence[Cell | None]) -> tuple[float, float]:
    """Ends of a column's axis."""
    told = [cell for cell in cells if cell is not None]
    ends = [end for cell in told for end in (cell.value - cell.half, cell.value + cell.half)]
    return min(ends, default=0.0), max(ends, default=1.0)
