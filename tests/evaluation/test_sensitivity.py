"""A small version of the committed table: every metric sees its own failure in real renders."""

import json
from pathlib import Path

import numpy as np
import pytest

from streamvid.evaluation.sensitivity import FAILURES, PASS, clips_of, measure_sensitivity, roc_auc, table

COMMITTED = Path(__file__).parents[2] / "docs" / "sensitivity.json"


def test_area_under_the_curve():
    assert roc_auc(np.array([2.0, 3.0]), np.array([0.0, 1.0])) == 1.0
    assert roc_auc(np.array([1.0]), np.array([1.0])) == 0.5
    assert roc_auc(np.array([0.0, 2.0]), np.array([1.0])) == 0.5


def test_injected_failures_change_the_clip():
    clips = {kind: frames for number in range(5) for kind, frames in clips_of(number).items()}
    assert set(clips) == {"clean", *FAILURES}
    for name, frames in clips_of(1).items():
        assert frames.dtype == np.uint8 and frames.shape == clips["clean"].shape
        assert name == "clean" or not np.array_equal(frames, clips_of(1)["clean"])


def test_small_table(tmp_path):
    result = measure_sensitivity(9, tmp_path / "s.json", quiet=True)
    assert result["clips"] == 9 and result["videos"] == 27 and set(result["own"]) == set(FAILURES)
    assert min(result["own"].values()) >= 0.85, result["own"]  # of two failing and nine clean clips
    assert "**" in table(result) and not list(tmp_path.glob("*.rows.jsonl"))


@pytest.mark.skipif(not COMMITTED.is_file(), reason="made by streamvid eval sensitivity")
def test_the_committed_table_passes():
    result = json.loads(COMMITTED.read_text())
    assert result["clips"] >= 200 and set(result["own"]) == set(FAILURES)
    assert all(value >= PASS for value in result["own"].values())
    assert result["passed"]
