"""A small version of the committed table: every metric sees its own failure in real renders."""

import json
from pathlib import Path

import numpy as np

from streamvid.evaluation.sensitivity import (
    ALSO,
    DEAR,
    FAILURES,
    PASS,
    clips_of,
    judge,
    measure_sensitivity,
    reactions,
    roc_auc,
    sees,
    table,
)

COMMITTED = Path(__file__).parents[2] / "docs" / "sensitivity.json"


def test_area_under_the_curve():
    assert roc_auc(np.array([2.0, 3.0]), np.array([0.0, 1.0])) == 1.0
    assert roc_auc(np.array([1.0]), np.array([1.0])) == 0.5
    assert roc_auc(np.array([0.0, 2.0]), np.array([1.0])) == 0.5


def test_injected_failures_change_the_clip():
    clips = clips_of(1)
    assert set(clips) == {"clean", *FAILURES}
    for name, frames in clips.items():
        assert frames.dtype == np.uint8 and frames.shape == clips["clean"].shape
        assert name == "clean" or not np.array_equal(frames, clips["clean"])


def test_flow_looks_at_its_own_failure_and_at_one_other():
    looked = [[kind for kind in ("clean", *FAILURES) if sees(DEAR, kind, number)] for number in range(8)]
    assert all(len(kinds) == 3 and {"clean", "flickering"} < set(kinds) for kinds in looked)
    assert {kind for kinds in looked for kind in kinds} == {"clean", *FAILURES}
    assert all(sees("drift.look", kind, 0) for kind in FAILURES)


def test_small_table(tmp_path):
    result = measure_sensitivity(5, tmp_path / "s.json", quiet=True)
    assert result["clips"] == 5 and result["videos"] == 50 and set(result["own"]) == set(FAILURES)
    assert result["failing_clips"] == dict.fromkeys(FAILURES, 5)
    assert min(result["own"].values()) >= 0.85, result["own"]  # of five failing and five clean clips
    assert table(result).count("**") == 2 * len(FAILURES) and not list(tmp_path.glob("*.rows.jsonl"))
    told = reactions(result).splitlines()
    assert "`interactive.switch_latency` reacts to ignored prompt" in "\n".join(told) and len(told) <= len(
        ALSO
    )


def test_a_reaction_that_is_not_stated_fails():
    """A row that looks exactly like another failure's."""
    metrics = [metric for _, metric in FAILURES.values()]
    rows = [{"number": 0, "kind": "clean", "scores": dict.fromkeys(metrics, 0.0)}]
    for kind, (_, own) in FAILURES.items():
        rows.append({"number": 0, "kind": kind, "scores": {m: float(m == own) for m in metrics}})
    assert judge(rows)["passed"]
    rows[1]["scores"]["long.seam"] = 1.0
    told = judge(rows)
    assert told["unstated"] == [["long.seam", "frozen"]] and not told["passed"]


def test_the_committed_table_passes():
    result = json.loads(COMMITTED.read_text())
    assert result["clips"] >= 200 and set(result["own"]) == set(FAILURES)
    assert min(result["failing_clips"].values()) >= 200
    assert all(value >= PASS for value in result["own"].values())
    assert result["unstated"] == [] and result["passed"]
