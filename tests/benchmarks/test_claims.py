"""The table of methods and the verdicts on published claims, from small made tables."""

import json

import pytest

from benchmarks import readme
from benchmarks.claims import (
    CLAIMS,
    QUALITY,
    Claim,
    claims_table,
    difference,
    leaders_table,
    own_table,
    standing,
    verdict,
)
from streamvid.evaluation.method_table import COLUMNS
from streamvid.methods import method_names


def row(method: str, kv_bytes: int = 1_500_000, **means: float) -> dict:
    """Two prompts, 0.02 to either side of a mean in every column."""
    values = {name: means.get(name, 0.5) for name in COLUMNS}
    return {
        "method": method,
        "fps": 80.0,
        "kv_bytes": kv_bytes,
        "by_prompt": {name: [value - 0.02, value + 0.02] for name, value in values.items()},
        **{name: {"mean": value, "interval": 0.03} for name, value in values.items()},
    }


def spread(row: dict, column: str, by: float) -> dict:
    """The same means, but prompt by prompt further from those of other methods."""
    low, high = row["by_prompt"][column]
    row["by_prompt"][column] = [low - by, high + by]
    return row


def made(*rows: dict) -> dict:
    return {"model": "diorama", "prompts": 7, "seeds": [0, 1], "methods": list(rows)}


@pytest.mark.parametrize(
    ("one", "other", "column", "expected"),
    [
        (0.9, 0.8, "end", (0.1, "holds")),
        (0.8, 0.9, "end", (-0.1, "does not hold")),
        (0.8, 0.84, "end", (-0.04, "does not hold")),
        (4.0, 6.0, "drift", (2.0, "holds")),  # less is better
        (0.9, 0.8, "repetition", (-0.1, "does not hold")),
    ],
)
def test_a_verdict_is_the_difference_of_the_same_prompts(one, other, column, expected):
    rows = {"a": row("a", **{column: one}), "b": row("b", **{column: other})}
    found, says = verdict(Claim("", "", "a", "b", column), rows)
    assert (found.mean, says) == (pytest.approx(expected[0]), expected[1])
    assert found.half == pytest.approx(0, abs=1e-9)  # prompts differ, by the same in both
    spread(rows["a"], column, 0.1)
    found, says = verdict(Claim("", "", "a", "b", column), rows)
    assert found.mean == pytest.approx(expected[0])
    assert found.half == pytest.approx(1.96 * 0.1)  # sd 0.1 * 2 ** 0.5 over 2 prompts
    assert says == ("holds" if expected[0] > 0.2 else "no difference seen")


def test_claims_name_methods_and_columns_that_exist():
    assert {claim.column for claim in CLAIMS} <= set(COLUMNS)
    assert {name for claim in CLAIMS for name in (claim.method, claim.against)} <= set(method_names())


def test_claims_of_methods_that_were_not_measured_are_left_out():
    text = claims_table(made(row("longlive", drift=3.0), row("self_forcing", drift=4.0)))
    assert len(text.splitlines()) == 2 + 3
    assert "| LongLive | `longlive`, `self_forcing` | drift | +1.000 ± 0.000 | holds |" in text
    assert "Reward Forcing" not in text


def test_leaders_and_who_cannot_be_told_from_them():
    rows = row("a", end=0.9, drift=4.0), row("b", end=0.87, drift=2.0), row("c", end=0.8, drift=4.0)
    spread(rows[1], "end", 0.02)
    table = leaders_table(made(*rows)).splitlines()
    assert "| end | `a` (0.900) | `b` |" in table  # 0.03 less, and 0.039 is half of the interval
    assert "| drift | `b` (2.000) | - |" in table
    assert "| kept | `a` (0.500) | `b`, `c` |" in table


def test_motion_is_judged_by_how_near_to_one_it_is():
    slow, fast = row("slow", motion=0.9), row("fast", motion=1.3)
    assert difference(slow, fast, "motion", QUALITY["motion"]).mean == pytest.approx(0.2)
    assert standing(slow, fast).better == ("motion",) and standing(fast, slow).worse == ("motion",)


@pytest.mark.parametrize(
    ("ours", "beats", "told"),
    [
        ({"drift": 3.0}, True, "beats it: better in drift; 1.00 of its bytes"),
        (
            {"end": 0.4, "drift": 3.0},
            False,
            "does not beat it: better in drift; worse in end; 1.00 of its bytes",
        ),
        ({}, False, "does not beat it: 1.00 of its bytes"),
        ({"kv_bytes": 750_000}, True, "beats it: 0.50 of its bytes"),  # as good with less
        ({"kv_bytes": 750_000, "kept": 0.4}, False, "does not beat it: worse in kept; 0.50 of its bytes"),
        (
            {"repetition": 0.9, "drift": 3.0},
            True,
            "beats it: better in drift; 1.00 of its bytes",
        ),  # not of QUALITY
    ],
)
def test_ours_beats_what_it_is_nowhere_worse_than(ours, beats, told):
    rows = row("streamvid_x", **ours), row("longlive", drift=4.0)
    if "drift" not in ours:
        rows = row("streamvid_x", drift=4.0, **ours), rows[1]
    assert standing(*rows).beats is beats
    assert own_table(made(*rows)).splitlines() == [
        "| against | `streamvid_x` |",
        "|---|---|",
        f"| `longlive` | {told} |",
    ]


def test_the_table_goes_into_the_documentation(tmp_path, monkeypatch):
    page, stored = tmp_path / "methods.md", tmp_path / "method_table.json"
    page.write_text("before\n<!-- methods:start -->\nstale\n<!-- methods:end -->\nafter\n")
    monkeypatch.setattr(readme, "METHODS", stored)
    assert "No table is stored yet" in readme.fill(page, "methods", readme.method_lines())
    stored.write_text(json.dumps(made(row("longlive", end=0.91), row("self_forcing"))))
    text = readme.fill(page, "methods", readme.method_lines())
    assert text.startswith(
        "before\n<!-- methods:start -->\ndiorama, 7 held-out prompts, seeds [0, 1]: 14 videos of 60 s"
    )
    assert "| longlive | 0.500 ± 0.030 | 0.500 ± 0.030 | 0.910 ± 0.030 |" in text and "| 80 | 1.50 |" in text
    assert "| end | `longlive` (0.910) | - |" in text
    assert "| against |" not in text  # no composition of ours was measured
    assert "stale" not in text and text.endswith("<!-- methods:end -->\nafter\n")
