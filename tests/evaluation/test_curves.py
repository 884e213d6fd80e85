"""Curves against closed forms on synthetic frames, and against the probe on renders."""

from dataclasses import replace

import numpy as np
import pytest

from streamvid.evaluation.appearance import look
from streamvid.evaluation.curves import Curves
from streamvid.models import load_probe
from streamvid.world.render import render_clip
from streamvid.world.scene import Scene, Scenery

SCENE = Scene("ball", "green", "large", "stands still", "meadow", "day", "clear")
SCENERY = Scenery(0.1, 0.0, 0.0, 0.0, 0.0, 0.0)
PROMPT = "a large green ball stands still on a meadow by day"


def flat(value: int, count: int) -> np.ndarray:
    return np.full((count, 8, 8, 3), value, np.uint8)


def test_look_in_closed_form():
    stripes = np.zeros((3, 8, 8, 3), np.uint8)
    stripes[:, :, ::2, 1] = 100  # green columns
    assert look(stripes).tolist() == pytest.approx([0, 50, 0, 0, 50, 0, 0, 100 / 3])
    assert look(flat(7, 2)).tolist() == [7, 7, 7, 0, 0, 0, 0, 0]


def test_drift_is_the_distance_from_the_first_window_of_the_prompt():
    curves = Curves(fps=2)  # windows of 4 frames
    for value in (10, 10, 13):
        curves.add(flat(value, 4), "a")
    curves.add(np.concatenate([flat(13, 2), flat(90, 1)]), "a")
    curves.add(flat(90, 1), "b")  # the window in which the prompt changes
    curves.add(flat(90, 4), "b")
    curves.add(flat(94, 4), "b")
    three, four = round(3 * 3**0.5, 3), round(4 * 3**0.5, 3)
    assert curves.drift == [0.0, 0.0, three, None, 0.0, four]
    assert curves.result()["last_drift"] == four
    assert curves.motion == [0, 0, 0, pytest.approx(77 / 3, abs=1e-3), 0, 0]
    assert curves.result()["mean_adherence"] is None


def test_motion_is_the_mean_step():
    curves = Curves(fps=2)
    curves.add(np.concatenate([flat(value, 1) for value in (0, 200, 190, 190)]), "a")
    assert curves.motion == [70.0]


@pytest.mark.parametrize("size", [1, 3, 5, 32])
def test_chunks_may_come_in_any_size(size):
    frames = np.random.default_rng(0).integers(0, 255, (40, 8, 8, 3), np.uint8)
    whole, pieces = Curves(fps=4), Curves(fps=4)
    whole.add(frames, "a")
    for start in range(0, 40, size):
        pieces.add(frames[start : start + size], "a")
    assert whole.result() == pieces.result() and len(whole.drift) == 5


def test_nothing_was_seen():
    assert Curves(16).result() == {
        "drift": [],
        "motion": [],
        "adherence": [],
        "last_drift": None,
        "mean_motion": None,
        "mean_adherence": None,
    }


def test_adherence_is_the_share_of_named_attributes_that_the_probe_finds():
    curves = Curves(16, load_probe("diorama"))
    frames = render_clip([(0, SCENE)], SCENERY, 32)
    curves.add(frames, PROMPT)
    curves.add(frames, PROMPT.replace("ball", "cube").replace("day", "night"))
    curves.add(frames, "a green ball")
    curves.add(frames, "nothing that it knows")
    night = render_clip([(0, replace(SCENE, sky="night"))], SCENERY, 32)
    curves.add(night, "at night")
    assert curves.adherence == [1.0, round(4 / 6, 4), 1.0, None, 1.0]
    assert curves.result()["mean_adherence"] == pytest.approx((3 + 4 / 6) / 4, abs=1e-4)


def test_other_sizes_have_no_adherence():
    curves = Curves(16, load_probe("diorama"))
    curves.add(flat(0, 32), PROMPT)
    assert curves.adherence == [None]
