"""Normalisation and totals against the official script."""

import pytest
from reference import SCORING

from streamvid.evaluation.score import DIMENSIONS, QUALITY, SEMANTIC, totals

CASES = SCORING["cal_final_score"]


@pytest.mark.parametrize("name", [name for name in CASES if name != "quality_only"])
def test_totals(name):
    found = totals(CASES[name]["input"])
    for key, value in CASES[name]["output"].items():
        assert found[key.split()[0]] == pytest.approx(value, abs=1e-12)


def test_totals_need_every_dimension():
    case = CASES["quality_only"]
    found = totals(case["input"])
    assert found["quality"] == pytest.approx(case["output"]["quality score"], abs=1e-12)
    assert found["semantic"] is None and found["total"] is None
    full = CASES["all_ones"]["input"]
    for name in DIMENSIONS:
        found = totals({**full, name: None})
        assert found["total"] is None
        assert (found["quality"] is None) == (name in QUALITY)
        assert (found["semantic"] is None) == (name in SEMANTIC)
