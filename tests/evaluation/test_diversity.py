"""What seeds change, with pictures of known scenery."""

import json

import numpy as np
import pytest

from streamvid.evaluation import diversity
from streamvid.evaluation.diversity import (
    CELLS,
    VARIABLES,
    differs,
    expected,
    of_prompt,
    read,
    renders,
    summary,
)
from streamvid.evaluation.liveliness import questions
from streamvid.world.scene import SCENERY


@pytest.fixture(scope="module")
def rendered():
    scene, _ = questions(6)[5]
    assert scene.motion == "circles"  # shows every variable
    return renders(scene)


def cell(**chosen: int) -> int:
    """Number of the scenery with these cells, 0 elsewhere."""
    return CELLS.index(tuple(chosen.get(name, 0) for name in SCENERY))


def test_every_scenery_of_the_world_is_read_right(rendered):
    assert len(rendered) == len(CELLS) == 48
    for number in range(len(CELLS)):
        noisy = rendered[number] + np.random.default_rng(number).normal(0, 12, rendered[number].shape)
        cells, ways = read(noisy.astype(np.float32), rendered)
        assert cells == CELLS[number] and max(ways) < 0.1


@pytest.mark.parametrize("variable", VARIABLES)
def test_a_mixture_of_two_places_is_between_them(variable, rendered):
    here, there = rendered[cell()], rendered[cell(**{variable: 1})]
    for share in (0.0, 0.1, 0.4):
        cells, ways = read((1 - share) * here + share * there, rendered)
        assert cells == CELLS[cell()]
        assert ways[VARIABLES.index(variable)] == pytest.approx(share, abs=1e-3)
        others = [way for name, way in zip(VARIABLES, ways, strict=True) if name != variable]
        assert max(np.abs(others)) < 0.6 * share + 1e-3  # other lines cross this one where things overlap


def test_one_picture_for_all_seeds_has_no_diversity(rendered):
    found = summary([of_prompt(rendered[[3] * 8], rendered)] * 2)
    for row in found["variables"].values():
        assert row["differs"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert found["spread"]["mean"] == 0.0


def test_drawn_renders_are_as_diverse_as_expected(rendered):
    rng = np.random.default_rng(0)
    prompts = [of_prompt(rendered[rng.integers(len(CELLS), size=8)], rendered) for _ in range(12)]
    found = summary(prompts)
    for name, row in found["variables"].items():
        assert row["expected"] == pytest.approx(1 - 1 / len(SCENERY[name]), abs=1e-4)
        assert row["differs"]["low"] < row["differs"]["mean"] < row["differs"]["high"]
        assert row["differs"]["mean"] == pytest.approx(expected(name), abs=0.12)
        assert row["between"]["mean"] == 0.0
    assert found["spread"]["mean"] == pytest.approx(1.0, abs=0.1)


def test_a_variable_that_never_varies_is_named(rendered):
    """All but the hills are drawn."""
    rng = np.random.default_rng(1)
    hills = tuple(SCENERY).index("hills")
    still = [number for number, cells in enumerate(CELLS) if cells[hills] == 0]
    found = summary([of_prompt(rendered[rng.choice(still, 8)], rendered) for _ in range(6)])
    low = {name for name, row in found["variables"].items() if row["differs"]["mean"] < 0.3}
    assert low == {"hills"}


def test_a_variable_counts_where_renders_show_it(rendered):
    assert diversity.shown_by(rendered) == list(VARIABLES)
    still, rolling_ring = questions(3)[0][0], questions(3)[2][0]
    assert still.motion == "stands still" and (rolling_ring.shape, rolling_ring.motion[:5]) == (
        "ring",
        "rolls",
    )
    for scene in (still, rolling_ring):
        others = renders(scene)
        assert diversity.shown_by(others) == [name for name in VARIABLES if name != "phase"]
    moving, silent = of_prompt(rendered[[0, 1]], rendered), of_prompt(others[[0, 1]], others)
    found = summary([moving, silent, silent])["variables"]
    assert found["phase"]["prompts"] == 1 and found["phase"]["differs"]["mean"] == 1.0
    assert found["hills"]["prompts"] == 3
    assert "phase" not in summary([silent])["variables"]


def test_what_is_not_shown_need_not_be_read_right(rendered):
    still = renders(questions(1)[0][0])
    for pictures, right in ((rendered, 0.0), (still, 1.0)):
        read_as = of_prompt(pictures[[0, 2]], pictures)
        other_phase = [[*CELLS[number][:-1], 1] for number in (0, 2)]
        assert summary([{**read_as, "drawn": other_phase}])["read_right"] == right


def test_pairs_are_counted_in_closed_form():
    sun = tuple(SCENERY).index("sun_x")
    rows = [list(CELLS[cell(sun_x=place)]) for place in (0, 0, 1, 2)]
    assert differs(rows, "sun_x") == 5 / 6 and differs(rows, "hills") == 0.0 and rows[2][sun] == 1


def test_the_command_keeps_prompts_and_writes_a_table(tmp_path, monkeypatch, capsys):
    calls = []

    def looker(model):
        def look(job):
            index, _, _, seeds, control = job
            calls.append(index)
            cells = [list(CELLS[2 * number]) for number in range(seeds)]
            row = {
                "shown": list(VARIABLES[:-1]),
                "cells": cells,
                "ways": [[0.0, 0.5, 0.0, 0.1, 0.2]] * seeds,
                "spread": 0.9,
            }
            return {"model": row} | ({"control": {**row, "drawn": cells[::-1]}} if control else {})

        return look

    class Pipe:
        transformer = text_encoder = vae = None

    monkeypatch.setattr(diversity, "looker", looker)
    monkeypatch.setattr(diversity, "load_pipeline", lambda model: Pipe)
    monkeypatch.setattr(diversity, "fingerprint", lambda *modules: "weights")
    arguments = ["--prompts", "4", "--seeds", "2", "--controls", "1", "--parts", str(tmp_path / "parts")]
    arguments += ["--output", str(tmp_path / "deep" / "x.json")]
    diversity.main(arguments)
    found = json.loads((tmp_path / "deep" / "x.json").read_text())
    hills = found["model"]["variables"]["hills"]
    assert list(found["model"]["variables"]) == list(VARIABLES[:-1]) and hills["prompts"] == 4
    assert hills["between"]["mean"] == 1.0 and found["model"]["spread"]["mean"] == 0.9
    assert found["control"]["read_right"] == 0.0 and "read_right" not in found["model"]
    diversity.main(arguments)
    assert calls == [0, 1, 2, 3]
    diversity.main([*arguments[:4], "--controls", "2", *arguments[6:]])
    assert calls[4:] == [1]
    assert "| hills | " in capsys.readouterr().out


def test_seeds_of_the_shipped_model_differ(tmp_path):
    """And renders that went through its VAE are read right."""
    output = tmp_path / "x.json"
    diversity.main(
        [
            "--prompts",
            "1",
            "--seeds",
            "6",
            "--controls",
            "1",
            "--parts",
            str(tmp_path),
            "--output",
            str(output),
        ]
    )
    found = json.loads(output.read_text())
    assert found["control"]["read_right"] == 1.0
    assert sum(row["differs"]["mean"] > 0 for row in found["model"]["variables"].values()) >= 3
    assert 0.5 < found["model"]["spread"]["mean"] < 1.5


def test_the_same_seed_gives_the_same_picture():
    from streamvid.models import load_pipeline

    pipe = load_pipeline("diorama")
    first, again, other = diversity.pictures_of(pipe, questions(1)[0][1], [5, 5, 6])
    np.testing.assert_allclose(first, again, atol=1.0)
    assert np.abs(first - other).mean() > 2
