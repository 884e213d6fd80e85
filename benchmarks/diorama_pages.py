"""The pages' numbers of the embedded model: motion, what seeds change, and the bars that it was built to reach."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from streamvid.evaluation import diversity, liveliness, stage_table
from streamvid.evaluation.stats import paired
from streamvid.evaluation.stored import of_other_weights
from streamvid.models import DEFAULT_MODEL
from streamvid.world.scene import ATTRIBUTES

DOCS = Path(__file__).parent.parent / "docs"


def stored(name: str) -> dict[str, Any] | None:
    """A stored result of docs/, or None where there is none."""
    path = DOCS / f"diorama_{name}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def _of_these_weights(name: str) -> dict[str, Any] | None:
    """A stored result, where it was made with the weights of the stored adherence: bars of two models say nothing."""
    adherence, result = stored("adherence"), stored(name)
    return result if adherence and result and result.get("release") == adherence["release"] else None


def motion_lines() -> str:
    """Motion against renders, as measured by `streamvid.evaluation.liveliness`."""
    lines = [
        "Mean length of the optical flow in pixels per frame (DIS, over two blocks, in which every motion of the world "
        "comes round), of generated videos and of clips that are rendered of the same scenes; `x`: generated over rendered, "
        "with the 95% bootstrap interval over prompts. Rain and snow flow whatever the subject does: `clear weather` is of "
        "the prompts without. `attributes right`: in the same windows.",
    ]
    titles = {
        "motion": "4 steps",
        "two_steps": "2 steps",
        "long": "4 steps, streams of ten minutes",
    }
    for name, title in titles.items():
        result = stored(name)
        if result:
            seeds = ", ".join(map(str, result["seeds"]))
            lines += [
                "",
                f"{title}: {result['prompts']} held-out prompts, seed {seeds} (`{result['command']}`):",
                "",
                *of_other_weights(result, result["model"]),
                liveliness.table(result),
            ]
    return "\n".join(lines)


def diversity_lines() -> str:
    """What seeds change, as measured by `streamvid.evaluation.diversity`."""
    result = stored("diversity")
    assert result is not None
    spread, control = result["model"]["spread"], result["control"]
    return "\n".join(
        [
            f"{result['prompts']} held-out prompts with {result['seeds']} seeds each (`{result['command']}`). The scenery "
            "of a video is that of the render of the same scene that is closest in the first block. `two seeds differ`: how "
            "often; `drawn sceneries`: how often two drawn ones do, 1 - 1/k of k places; `renders, read`: renders in drawn "
            f"sceneries that went through the VAE, whose scenery is read right in {control['read_right']:.3f}; `between two "
            "places`: a quarter of the way or more from one place to another, as a picture of both is (such renders: "
            f"{max(row['between']['mean'] for row in control['variables'].values()):.2f}). Position is `subject_x`; the "
            "phase of a motion is no difference where nothing moves, or where a ring rolls.",
            "",
            *of_other_weights(result, result["model_name"]),
            diversity.table(result),
            "",
            f"The pictures of two seeds differ by {spread['mean']:.2f} [{spread['low']:.2f}, {spread['high']:.2f}] of what "
            f"two renders do (renders through the VAE: {control['spread']['mean']:.2f}).",
        ]
    )


def stage_lines() -> str:
    """What every stage of the published chain gains, as measured by `streamvid.evaluation.stage_table`."""
    result = stored("stages")
    if result is None:
        return "What its stages gain at full size has not been measured."
    seeds = " ".join(map(str, result["seeds"]))
    return "\n".join(
        [
            f"Shares of attributes that the probe finds right, {result['prompts']} held-out prompts (`python -m "
            f"streamvid.evaluation.stage_table configs/stages/diorama_chain.yaml --prompts {result['prompts']} --seeds "
            f"{seeds} --processes 2 --output docs/diorama_stages.json`). `gain`: over the stage before that was measured "
            "the same way, mean over prompts with its 95% interval.",
            "",
            *of_other_weights(result, DEFAULT_MODEL),
            stage_table.table(result),
        ]
    )


class Bar(NamedTuple):
    """What is asked (`lowest` to `highest`), what was measured, with its 95% interval where it has one, and of how much."""

    asked: str
    value: float
    low: float
    high: float
    of: str
    lowest: float = -np.inf
    highest: float = np.inf

    @property
    def verdict(self) -> str:
        if self.lowest <= self.value <= self.highest:
            sure = self.lowest <= self.low and self.high <= self.highest
            return "met" if sure else "met, within chance"
        missed = self.high < self.lowest or self.low > self.highest
        return "not met" if missed else "not met, within chance"


def _plain(asked: str, value: float, of: str, **bounds: float) -> Bar:
    return Bar(asked, value, value, value, of, **bounds)


def bars() -> list[Bar]:
    """The bars of the embedded model that stored results answer."""
    adherence = stored("adherence")
    assert adherence is not None
    of = f"{adherence['prompts']} prompts x {len(adherence['seeds'])} seeds"
    start = adherence["start"]
    mean, half = start["mean"], start["interval"]
    found = [
        Bar("attributes right at 5 s: 0.97", mean, mean - half, mean + half, of, lowest=0.97),
        _plain("worst attribute: 0.92", start["worst"], of, lowest=0.92),
        _plain("all seven at once: 0.85", start["all_right"], of, lowest=0.85),
        *_minute_bars(adherence, of),
        _plain("VAE: 30 dB", adherence["vae"]["psnr"], "24 clips of 81 frames", lowest=30.0),
        *_switch_bars(start["mean"]),
        *_motion_bars(),
    ]
    result = _of_these_weights("diversity")
    if result:
        rows = result["model"]["variables"]
        for name, row in rows.items():
            of = f"{row['prompts']} prompts x {result['seeds']} seeds"
            shares = [row["differs"][bound] / row["expected"] for bound in ("mean", "low", "high")]
            found.append(Bar(f"{name} over seeds, of drawn sceneries: 0.9 to 1.1", *shares, of, 0.9, 1.1))
    return found


def _minute_bars(adherence: Mapping[str, Any], of: str) -> list[Bar]:
    """Of the end of a minute, where it was measured with these weights."""
    if "minute" not in adherence:
        return []
    start, minute = adherence["start"], adherence["minute"]
    late = (start["interval"] ** 2 + minute["interval"] ** 2) ** 0.5
    change = minute["mean"] - start["mean"]
    return [Bar("60 s against 5 s: -0.01", change, change - late, change + late, of, lowest=-0.01)]


def _switch_bars(start: float) -> list[Bar]:
    """Of what shows from 1.5 s after a switch; kept attributes against all attributes at 5 s."""
    result = _of_these_weights("switch")
    if not result:
        return []
    of = f"{result.get('first', result['prompts'])} prompts x {len(result['seeds'])} seeds"
    found = []
    asked = ("changed within 1.5 s: 0.95", "kept, against 5 s: -0.01")
    for words, name, less, lowest in zip(
        asked, ("changed", "kept"), (0.0, start), (0.95, -0.01), strict=True
    ):
        row = result["switch"]["soon"][name]
        value, half = row["accuracy"] - less, row["interval"]
        found.append(
            Bar(words, value, value - half, value + half, f"{of}, {row['count']} attributes", lowest=lowest)
        )
    return found


def _motion_bars() -> list[Bar]:
    found = []
    motion, two, long = (_of_these_weights(name) for name in ("motion", "two_steps", "long"))
    if motion:
        start = motion["moments"]["start"]
        found.append(_flow("flow of rendered flow", start["against_rendered"], motion["prompts"]))
        clear = start["by_weather"]["clear"]
        found.append(_flow("the same in clear weather", clear, clear["prompts"]))
    if motion and two:
        found.append(
            _paired("2 steps against 4: -0.02", _right(motion, "start"), _right(two, "start"), lowest=-0.02)
        )
    if long:
        row = long["moments"]["ten_minutes"]
        found.append(_flow("flow at 10 min of that at 5 s", row["against_start"], long["prompts"]))
        shares = _right(long, "start"), _right(long, "ten_minutes")
        found.append(_paired("10 min against 5 s: -0.01", *shares, lowest=-0.01))
    return found


def _flow(what: str, row: Mapping[str, float], prompts: int) -> Bar:
    asked = f"{what}: 0.85 to 1.15"
    return Bar(asked, row["ratio"], row["low"], row["high"], f"{prompts} prompts", 0.85, 1.15)


def _right(result: Mapping[str, Any], moment: str) -> np.ndarray:
    return np.array(result["moments"][moment]["by_prompt"]["right"])


def _paired(asked: str, first: np.ndarray, second: np.ndarray, lowest: float) -> Bar:
    count = min(len(first), len(second))
    told = paired(first[:count], second[:count])
    low, high = told.low, told.high
    if low == high:  # nothing differs, and a bootstrap knows no more: the rule of three, over attributes
        low, high = low - 3 / (len(ATTRIBUTES) * count), high + 3 / (len(ATTRIBUTES) * count)
    return Bar(asked, told.difference, low, high, f"{count} prompts", lowest=lowest)


def bars_lines() -> str:
    """The bars as a Markdown table; what chance could undo is said."""
    lines = ["| asked | measured | 95% interval | of | |", "|---|---|---|---|---|"]
    for bar in bars():
        interval = f"{bar.low:.3f} to {bar.high:.3f}" if bar.low < bar.high else ""
        digits = 2 if abs(bar.value) > 2 else 3
        lines.append(f"| {bar.asked} | {bar.value:.{digits}f} | {interval} | {bar.of} | {bar.verdict} |")
    switch = _of_these_weights("switch")
    if switch:
        first = f" --first {switch['first']}" if "first" in switch else ""
        seeds = " ".join(map(str, switch["seeds"]))
        lines += [
            "",
            "`changed`, `kept`: what the window from 1.5 to 3.5 s after a switch shows (`python -m "
            f"streamvid.evaluation.adherence --parts switch --prompts {switch['prompts']}{first} --seeds {seeds}`). Motion, "
            "2 steps, 10 min and seeds: below.",
        ]
    return "\n".join(lines)
