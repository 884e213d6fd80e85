"""The benchmark of the offline metrics, in small; and what was measured with it, if it was."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MEASURED = ROOT / "benchmarks" / "results" / "evaluation_speed.json"


def test_every_offline_metric_is_measured_in_bounded_memory(tmp_path):
    module = [sys.executable, "-m", "benchmarks.evaluation_speed"]  # alone: the peak is of a whole process
    options = ["--frames", "40", "--folder", tmp_path, "--output", tmp_path / "speed.json"]
    subprocess.run([*module, *options], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    told = json.loads((tmp_path / "speed.json").read_text())
    assert told["failed"] == [] and told["metrics"] == len(told["seconds_by_metric"]) > 20
    assert told["frames_per_second"] > 0 and told["peak_memory_mb"] < 1500


@pytest.mark.skipif(not MEASURED.is_file(), reason="made by python -m benchmarks.evaluation_speed")
def test_the_stored_measurement_holds_what_is_promised():
    told = json.loads(MEASURED.read_text())
    assert told["frames"] >= 957 and told["size"] == [480, 832] and told["failed"] == []
    assert told["peak_memory_mb"] < 1500 and told["frames_per_second"] >= 10
