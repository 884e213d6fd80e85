"""The picture of the embedded model's training."""

import json
import xml.etree.ElementTree as ElementTree

from benchmarks import training_curves
from benchmarks.training_curves import PANELS, curve, picture


def test_the_picture_is_what_the_logs_say(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["training_curves", "--check"])
    assert training_curves.main() == 0, capsys.readouterr().out


def test_another_log_is_another_picture(tmp_path):
    for log, _, _ in PANELS:
        columns = [column for name, column, _ in PANELS if name == log]
        rows = [{"step": step} | dict.fromkeys(columns, step / 7) for step in range(5)]
        (tmp_path / f"{log}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    drawn = picture(tmp_path)
    assert drawn != training_curves.PICTURE.read_text()
    root = ElementTree.fromstring(drawn)
    assert len(root.findall(".//{http://www.w3.org/2000/svg}polyline")) == len(PANELS)


def test_parts_follow_each_other_and_gaps_are_left_out():
    rows = [
        {"part": 1, "step": 0, "error": 3.0},
        {"part": 1, "step": 100, "loss": 9.0},
        {"part": 2, "step": 0, "error": 2.0},
        {"part": 2, "step": 50, "error": 1.0},
    ]
    assert curve(rows, "error") == ([0.0, 100.0, 150.0], [3.0, 2.0, 1.0])
