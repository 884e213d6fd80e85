"""Draw docs/pictures/training_curves.svg from the logs of the trainings: `python -m benchmarks.training_curves`.

`--check` only compares. The student's parts follow each other; a part begins where the one before it ended.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from streamvid.evaluation.charts import HEIGHT, WIDTH, xy_chart

ROOT = Path(__file__).parent.parent
LOGS = ROOT / "docs/training_logs"
PICTURE = ROOT / "docs/pictures/training_curves.svg"
TITLE = 26  # px above a chart
PANELS = (  # log, column, what it is
    ("vae_log", "psnr", "VAE: PSNR of reconstructed crops, dB"),
    ("text_log", "accuracy", "text encoder: attributes told right by every token"),
    ("probe_log", "loss", "probe: loss"),
    ("student_log", "error_rollout", "student, its last parts: squared error of rollouts in training"),
    ("student_log", "gradient_norm", "student, its last parts: norm of the gradient"),
    ("tiny_decoder_log", "psnr", "tiny decoder: PSNR, dB"),
)


def curve(rows: Sequence[Mapping[str, Any]], column: str) -> tuple[list[float], list[float]]:
    """Steps and values of the rows that have the column; the steps of a next part go on from the last."""
    steps, values = [], []
    before, latest, part = 0, 0, None
    for row in rows:
        if row.get("part") != part:
            before, part = latest, row.get("part")
        latest = before + row["step"]
        if column in row:
            steps.append(float(latest))
            values.append(float(row[column]))
    return steps, values


def picture(logs: Path = LOGS) -> str:
    """All panels below each other."""
    drawn = []
    for number, (log, column, title) in enumerate(PANELS):
        rows = [json.loads(line) for line in (logs / f"{log}.jsonl").read_text().splitlines()]
        top = number * (HEIGHT + TITLE)
        chart = xy_chart(*curve(rows, column), "step")
        place = f'<svg x="0" y="{top + TITLE}" width="{WIDTH}" height="{HEIGHT}" '
        drawn.append(f'<text x="4" y="{top + 18}">{escape(title)}</text>{chart.replace("<svg ", place, 1)}')
    height = len(PANELS) * (HEIGHT + TITLE) + 8
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-8 0 {WIDTH + 16} {height}" width="{WIDTH + 16}" '
        f'font-family="system-ui, sans-serif" font-size="14" color="#1f2937" fill="currentColor">'
        f'<rect x="-8" width="{WIDTH + 16}" height="{height}" fill="#ffffff"/>{"".join(drawn)}</svg>\n'
    )


def main() -> int:
    drawn = picture()
    if "--check" in sys.argv:
        fresh = PICTURE.is_file() and PICTURE.read_text() == drawn
        if not fresh:
            print(f"{PICTURE.name} is not what the logs say: run python -m benchmarks.training_curves")
        return 0 if fresh else 1
    PICTURE.write_text(drawn)
    return 0


if __name__ == "__main__":
    sys.exit(main())
