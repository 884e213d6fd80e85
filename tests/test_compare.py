"""Comparisons with the embedded model: the same videos as alone, the numbers, the page."""

import json
import re

import numpy as np
import pytest

from streamvid.cli import main
from streamvid.compare import BAND, compare, grid, labelled
from streamvid.compare_page import page
from streamvid.errors import UserError
from streamvid.evaluation.charts import chart
from streamvid.generate import generate
from streamvid.io.video import read_video
from streamvid.script import load_script

LINE = "a large green ball bounces on a meadow by day [3s] | a large green ball bounces on a meadow at night [1.5s]"
METHODS = ["longlive_infinite", "self_forcing"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    script = load_script(LINE)
    compare(script, METHODS, folder, seed=3, quiet=True)
    return folder


def frames(path) -> np.ndarray:
    return np.stack(list(read_video(path)))


def test_each_video_is_the_one_that_the_method_makes_alone(folder, tmp_path):
    for method in METHODS:
        alone = generate(load_script(LINE), tmp_path / "alone.mp4", method=method, seed=3, quiet=True)
        assert np.array_equal(frames(folder / f"{method}.mp4"), frames(alone))


def test_the_videos_are_side_by_side_in_order(folder):
    together = frames(folder / "side_by_side.mp4")
    each = [frames(folder / f"{method}.mp4") for method in METHODS]
    assert together.shape == (len(each[0]), 128 + BAND, 256, 3)
    for index, video in enumerate(each):
        shown = together[:, BAND:, 128 * index : 128 * (index + 1)].astype(int)
        assert np.abs(shown - video).mean() < 4  # encoded twice
    assert together[0, :BAND].max() > 150  # names


def test_the_numbers_are_those_of_the_run(folder):
    result = json.loads((folder / "compare.json").read_text())
    assert (result["seed"], result["model"], result["fps"]) == (3, "diorama", 16)
    assert [row["method"] for row in result["methods"]] == METHODS
    for row in result["methods"]:
        assert row["frames"] == len(frames(folder / f"{row['method']}.mp4"))
        assert 0 < row["fps"] < row["denoising_fps"] and 0 < row["chunk_p50"] <= row["chunk_p95"]
        assert len(row["drift"]) == len(row["adherence"]) == row["frames"] // 32
    small, large = (row["kv_bytes"] for row in result["methods"])
    assert small < large  # windows of 12 and of 21 frames
    assert result["methods"][0]["options"]["window"] == 12


def test_the_page_needs_no_network(folder):
    text = (folder / "compare.html").read_text()
    assert not re.search(r"https?:|<script|<link|@import|src=\"(?!data:)", text)
    for method in METHODS:
        assert method in text
    assert text.count("<svg") >= 2 and "data:video/mp4;base64," in text
    assert "at night" in text


def test_text_on_the_page_is_escaped(folder):
    result = json.loads((folder / "compare.json").read_text())
    result["title"] = "<b>bold</b>"
    result["methods"][0]["timeline"][0]["prompt"] = "<i>a fox</i>"
    text = page(result, b"")
    assert "<b>" not in text and "<i>" not in text and "&lt;i&gt;a fox" in text


def test_a_chart_is_interrupted_where_there_is_no_value():
    drawn = chart([[0.0, 1.0, None, 0.5, 0.25], [None, 0.5]])
    assert drawn.count("<polyline") == 2 and drawn.count("<circle") == 1
    points = re.findall(r'points="([^"]+)"', drawn)
    first = [tuple(map(float, pair.split(","))) for pair in points[0].split()]
    assert first[0][0] < first[1][0] and first[0][1] > first[1][1]  # later is right, more is up
    assert chart([[None]]).count("<polyline") == 0


def test_names_are_above_the_pictures_and_rows_are_filled():
    video = np.full((2, 30, 40, 3), 77, np.uint8)
    named = labelled(video, "longlive")
    assert named.shape == (2, 30 + BAND, 40, 3) and np.array_equal(named[:, BAND:], video)
    five = grid([np.full((1, 2, 2, 3), value, np.uint8) for value in range(1, 6)])
    assert five.shape == (1, 4, 8, 3)
    assert five[0, ::2, ::2, 0].tolist() == [[1, 2, 3, 4], [5, 0, 0, 0]]


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        (["longlive"], "has 1 names"),
        (["longlive", "longlive"], "names longlive twice"),
        (["longlive", "long_live"], "did you mean longlive"),
    ],
)
def test_impossible_comparisons_are_refused_before_anything_is_made(tmp_path, methods, message):
    with pytest.raises(UserError, match=message):
        compare(load_script(LINE), methods, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command(tmp_path, capsys):
    line = "a large green ball bounces on a meadow by day [0.5s]"
    command = [
        "compare",
        line,
        "--methods",
        "longlive, deep_sink",
        "-o",
        str(tmp_path / "out"),
        "--set",
        "sink=2",
    ]
    assert main(command) == 0
    assert "wrote" in capsys.readouterr().out
    result = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert [row["options"]["sink"] for row in result["methods"]] == [2, 2]
    assert main(["compare", line, "--methods", "longlive", "-o", str(tmp_path / "no")]) == 2
    assert "give 2 to 8" in capsys.readouterr().err
