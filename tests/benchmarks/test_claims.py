"""The table of methods and the verdicts on published claims, from small made tables."""

import json

import pytest

from benchmarks import readme
from benchmarks.claims import CLAIMS, Claim, claims_table, leaders_table, verdict
from streamvid.evaluation.method_table import COLUMNS
from streamvid.methods import method_names


def row(method: str, **means: float) -> dict:
    values = {name: {"mean": means.get(name, 0.5), "interval": 0.03} for name in COLUMNS}
    return {"method": method, "fps": 80.0, "kv_bytes": 1_500_000, **values}


def made(*rows: dict) -> dict:
    return {"model": "diorama", "prompts": 7, "seeds": [0, 1], "methods": list(rows)}


@pytest.mark.parametrize(
    ("one", "other", "column", "expected"),
    [
        (0.9, 0.8, "end", (0.1, "holds")),
        (0.8, 0.9, "end", (-0.1, "does not hold")),
        (0.8, 0.84, "end", (-0.04, "no difference seen")),  # 0.042 is the half-width of the difference
        (4.0, 6.0, "drift", (2.0, "holds")),  # less is better
        (0.9, 0.8, "repetition", (-0.1, "does not hold")),
    ],
)
def test_a_verdict_is_the_difference_against_its_interval(one, other, column, expected):
    rows = {"a": row("a", **{column: one}), "b": row("b", **{column: other})}
    better, half, says = verdict(Claim("", "", "a", "b", column), rows)
    assert (better, says) == (pytest.approx(expected[0]), expected[1])
    assert half == pytest.approx(0.03 * 2**0.5)


def test_claims_name_methods_and_columns_that_exist():
    assert {claim.column for claim in CLAIMS} <= set(COLUMNS)
    assert {name for claim in CLAIMS for name in (claim.method, claim.against)} <= set(method_names())


def test_claims_of_methods_that_were_not_measured_are_left_out():
    text = claims_table(made(row("longlive", drift=3.0), row("self_forcing", drift=4.0)))
    assert len(text.splitlines()) == 2 + 3
    assert "| LongLive | `longlive`, `self_forcing` | drift | +1.000 ± 0.042 | holds |" in text
    assert "Reward Forcing" not in text


def test_leaders_and_who_cannot_be_told_from_them():
    rows = row("a", end=0.9, drift=4.0), row("b", end=0.87, drift=2.0), row("c", end=0.8, drift=4.0)
    table = leaders_table(made(*rows)).splitlines()
    assert "| end | `a` (0.900) | `b` |" in table  # 0.042 is the half-width of a difference
    assert "| drift | `b` (2.000) | - |" in table
    assert "| kept | `a` (0.500) | `b`, `c` |" in table


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
    assert "stale" not in text and text.endswith("<!-- methods:end -->\nafter\n")
