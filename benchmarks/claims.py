"""What was published about methods against what the table of methods says of them on the embedded model.

A claim names the method, the one that it is to beat, and the column of `streamvid.evaluation.method_table` that would show
it. The verdict is arithmetic: all methods got the same prompts, so the difference is taken prompt by prompt, and one is seen
where the 95% interval of its mean does not hold 0. Compositions of our own are held against every published preset by the
same arithmetic, in all columns of `QUALITY` at once (`standing`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

LOWER_IS_BETTER = ("drift", "repetition")
OWN = "streamvid_"  # how the names of our compositions begin
# What a composition must not be worse in to beat another, and how a prompt's value becomes more is better. Repetition is
# left out: it is least where a video leaves its prompt or drifts, and rendered worlds repeat too.
QUALITY: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    **dict.fromkeys(("start", "after", "changed", "kept", "end"), np.positive),
    "drift": np.negative,
    "motion": lambda ratio: -np.abs(ratio - 1),
}


class Claim(NamedTuple):
    """`method` is better than `against` in `column`; `what` is the sentence of the paper or release, in our words."""

    what: str
    source: str
    method: str
    against: str
    column: str


CLAIMS = (
    Claim("a sink keeps a long video from drifting", "LongLive", "longlive", "self_forcing", "drift"),
    Claim("... and on its prompt", "LongLive", "longlive", "self_forcing", "end"),
    Claim("a recache makes the video follow a new prompt", "LongLive", "longlive", "self_forcing", "changed"),
    Claim(
        "a moving sink keeps more motion than a static one",
        "Reward Forcing",
        "reward_forcing",
        "longlive",
        "motion",
    ),
    Claim(
        "a deep sink keeps a long video from drifting",
        "Deep Forcing",
        "deep_forcing",
        "self_forcing",
        "drift",
    ),
    Claim("... and on its prompt", "Deep Forcing", "deep_forcing", "self_forcing", "end"),
    Claim("... already by itself", "Deep Forcing", "deep_sink", "self_forcing", "drift"),
    Claim(
        "compression keeps more than a deep sink alone", "Deep Forcing", "deep_forcing", "deep_sink", "end"
    ),
    Claim("joint denoising suppresses drift", "Rolling Forcing", "rolling_forcing", "self_forcing", "drift"),
    Claim(
        "a flush makes the video follow a new prompt",
        "Infinity-RoPE",
        "infinity_rope",
        "streamingllm",
        "changed",
    ),
    Claim("memories keep more than a static sink does", "MemRoPE", "memrope", "longlive_infinite", "end"),
    Claim("modulated frequencies reach further", "FLEX", "flex", "self_forcing", "end"),
    Claim("scaled scores let a longer window be used", "UltraViCo", "ultravico", "self_forcing", "end"),
    Claim(
        "temporal bases by head keep a video from falling back to its sink",
        "LoL",
        "lol",
        "longlive",
        "repetition",
    ),
    Claim(
        "a refreshed sink follows a new prompt",
        "StreamDiffusionV2",
        "streamdiffusionv2",
        "longlive_infinite",
        "changed",
    ),
    Claim("a past written anew accumulates no errors", "Krea", "krea", "self_forcing", "drift"),
    Claim("an averaged sink drifts less", "Reward Forcing", "reward_forcing", "streamvid_lean", "drift"),
    Claim("a shorter window drifts less", "ours", "streamvid_recache", "longlive_infinite", "drift"),
    Claim(
        "a sink under the new prompt follows it better",
        "ours",
        "streamvid_recache",
        "streamvid_lean",
        "changed",
    ),
)


class Difference(NamedTuple):
    """How much better (negative: worse) one method is than another, mean over prompts, and half of its 95% interval."""

    mean: float
    half: float

    @property
    def seen(self) -> int:
        """1 where better, -1 where worse, 0 where neither can be told."""
        return (self.mean > self.half) - (self.mean < -self.half)


def difference(
    one: Mapping[str, Any],
    other: Mapping[str, Any],
    column: str,
    good: Callable[[np.ndarray], np.ndarray] | None = None,
) -> Difference:
    """The first method against the other on the same prompts; `good` turns a column's values into more is better."""
    good = good or (np.negative if column in LOWER_IS_BETTER else np.positive)
    first, second = (good(np.array(row["by_prompt"][column], float)) for row in (one, other))
    by_prompt = first - second
    return Difference(float(by_prompt.mean()), float(1.96 * by_prompt.std(ddof=1) / len(by_prompt) ** 0.5))


def verdict(claim: Claim, rows: Mapping[str, Mapping[str, Any]]) -> tuple[Difference, str]:
    """The difference, and what it says of the claim."""
    found = difference(rows[claim.method], rows[claim.against], claim.column)
    return found, ("does not hold", "no difference seen", "holds")[found.seen + 1]


def claims_table(result: Mapping[str, Any]) -> str:
    """The claims whose methods are both in the result, as a Markdown table."""
    rows = {row["method"]: row for row in result["methods"]}
    lines = ["| claim | source | compared | column | better by | here it |", "|---|---|---|---|---|---|"]
    for claim in CLAIMS:
        if claim.method in rows and claim.against in rows:
            found, says = verdict(claim, rows)
            lines.append(
                f"| {claim.what} | {claim.source} | `{claim.method}`, `{claim.against}` | {claim.column} | "
                f"{found.mean:+.3f} ± {found.half:.3f} | {says} |"
            )
    return "\n".join(lines)


def leaders_table(result: Mapping[str, Any]) -> str:
    """The best method of every column that has a best, and those that cannot be told from it, as a Markdown table."""
    rows = result["methods"]
    lines = ["| column | best | cannot be told from it |", "|---|---|---|"]
    for column in ("after", "changed", "kept", "end", "drift", "repetition"):
        sign = -1 if column in LOWER_IS_BETTER else 1
        best = max(rows, key=lambda row: sign * row[column]["mean"])
        others = [row for row in rows if row is not best]
        close = [f"`{row['method']}`" for row in others if difference(row, best, column).seen >= 0]
        mean = best[column]["mean"]
        lines.append(f"| {column} | `{best['method']}` ({mean:.3f}) | {', '.join(close) or '-'} |")
    return "\n".join(lines)


class Standing(NamedTuple):
    """One method against another: columns of `QUALITY` in which it is better and worse, its share of the other's bytes."""

    better: tuple[str, ...]
    worse: tuple[str, ...]
    bytes: float

    @property
    def beats(self) -> bool:
        """Nowhere worse, and better somewhere or as good with fewer bytes of keys and values."""
        return not self.worse and bool(self.better or self.bytes < 1)


def standing(one: Mapping[str, Any], other: Mapping[str, Any]) -> Standing:
    """The first method against the other."""
    seen = {column: difference(one, other, column, good).seen for column, good in QUALITY.items()}
    better, worse = (tuple(column for column in seen if seen[column] == sign) for sign in (1, -1))
    return Standing(better, worse, one["kv_bytes"] / other["kv_bytes"])


def own_table(result: Mapping[str, Any]) -> str:
    """Compositions of our own against every other preset of the result, as a Markdown table; nothing without any."""
    rows = result["methods"]
    own = [row for row in rows if row["method"].startswith(OWN)]
    if not own:
        return ""
    titles = [f"`{row['method']}`" for row in own]
    lines = [f"| against | {' | '.join(titles)} |", "|---" * (1 + len(own)) + "|"]
    for other in rows:
        if other not in own:
            cells = [_told(standing(row, other)) for row in own]
            lines.append(f"| `{other['method']}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def _told(found: Standing) -> str:
    parts = [
        f"{word} in {', '.join(columns)}"
        for word, columns in (("better", found.better), ("worse", found.worse))
        if columns
    ]
    size = f"{found.bytes:.2f} of its bytes"
    return f"{'beats it' if found.beats else 'does not beat it'}: {'; '.join([*parts, size])}"
