"""What was published about methods against what the table of methods says of them on the embedded model.

A claim names the method, the one that it is to beat, and the column of `streamvid.evaluation.method_table` that would show
it. The verdict is arithmetic: the difference of the means against the half-width of its 95% interval, taken as if the two
methods had been run on different prompts. They share them, so what is called a difference is one all the more.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

LOWER_IS_BETTER = ("drift", "repetition")


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
    Claim("a past written anew accumulates no errors", "Krea", "krea", "self_forcing", "drift"),
    Claim(
        "a sink under the new prompt follows it better",
        "ours",
        "streamvid_recache",
        "longlive_infinite",
        "changed",
    ),
    Claim(
        "a sink that follows the video follows it too",
        "ours",
        "streamvid_living_sink",
        "longlive_infinite",
        "changed",
    ),
    Claim(
        "a fast memory keeps the video on its prompt", "ours", "streamvid_memory", "longlive_infinite", "end"
    ),
)


def difference(one: Mapping[str, Any], other: Mapping[str, Any], column: str) -> tuple[float, float]:
    """How much better (negative: worse) the first method is than the other, and half of the interval of that."""
    better = (one[column]["mean"] - other[column]["mean"]) * (-1 if column in LOWER_IS_BETTER else 1)
    return better, (one[column]["interval"] ** 2 + other[column]["interval"] ** 2) ** 0.5


def verdict(claim: Claim, rows: Mapping[str, Mapping[str, Any]]) -> tuple[float, float, str]:
    """The difference, half of its interval, and what it says of the claim."""
    better, half = difference(rows[claim.method], rows[claim.against], claim.column)
    if abs(better) <= half:
        return better, half, "no difference seen"
    return better, half, "holds" if better > 0 else "does not hold"


def claims_table(result: Mapping[str, Any]) -> str:
    """The claims whose methods are both in the result, as a Markdown table."""
    rows = {row["method"]: row for row in result["methods"]}
    lines = ["| claim | source | compared | column | better by | here it |", "|---|---|---|---|---|---|"]
    for claim in CLAIMS:
        if claim.method in rows and claim.against in rows:
            better, half, says = verdict(claim, rows)
            lines.append(
                f"| {claim.what} | {claim.source} | `{claim.method}`, `{claim.against}` | {claim.column} | "
                f"{better:+.3f} ± {half:.3f} | {says} |"
            )
    return "\n".join(lines)


def leaders_table(result: Mapping[str, Any]) -> str:
    """The best method of every column that has a best, and those that cannot be told from it, as a Markdown table."""
    rows = result["methods"]
    lines = ["| column | best | cannot be told from it |", "|---|---|---|"]
    for column in ("after", "changed", "kept", "end", "drift", "repetition"):
        best = max(rows, key=lambda row: difference(row, rows[0], column)[0])
        others = [row for row in rows if row is not best]
        close = [f"`{row['method']}`" for row in others if -(d := difference(row, best, column))[0] <= d[1]]
        mean = best[column]["mean"]
        lines.append(f"| {column} | `{best['method']}` ({mean:.3f}) | {', '.join(close) or '-'} |")
    return "\n".join(lines)
