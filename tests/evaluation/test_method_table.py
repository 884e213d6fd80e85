"""The table of methods: its numbers in closed form, and a run over a short stream of the embedded model."""

import json

import pytest
import torch

from streamvid.evaluation import method_table
from streamvid.evaluation.method_table import LAG, LOOKED_AT, cases, main, repetition, summary, table
from streamvid.world.prompts import parse
from streamvid.world.scene import Scene, is_held_out


def test_cases_are_held_out_scenes_that_change():
    for index, case in enumerate(cases(6)):
        scenes = [Scene(**{"weather": "clear", **parse(text)}) for text in case["texts"]]
        assert tuple(scene.labels() for scene in scenes) == case["labels"]
        assert is_held_out(scenes[0])
        assert sum(a != b for a, b in zip(*case["labels"], strict=True)) == 1 + index % 2
    assert cases(3) == cases(6)[:3]


def test_repetition_of_loops_and_of_noise():
    noise = torch.randn(4, 2 * LOOKED_AT, 8, 8, generator=torch.Generator().manual_seed(0))
    assert repetition(noise) < 0.3
    loop = torch.cat([noise[:, : LAG + 6]] * 6, 1)[:, : 2 * LOOKED_AT]
    assert repetition(loop) == pytest.approx(1.0, abs=1e-5)
    short = torch.cat([noise[:, :5]] * 24, 1)  # also what repeats sooner
    assert repetition(short) == pytest.approx(1.0, abs=1e-5)


def test_summary_over_videos():
    found = summary([{"a": 1.0}, {"a": 2.0}, {"a": 6.0}])
    assert found["a"]["mean"] == 3.0
    assert found["a"]["interval"] == pytest.approx(1.96 * 7**0.5 / 3**0.5, abs=1e-4)
    assert summary([{"a": 1.0}])["a"]["interval"] == 0.0


@pytest.fixture
def short(monkeypatch):
    """Six seconds instead of sixty."""
    monkeypatch.setattr(method_table, "LATENT_FRAMES", 24)
    monkeypatch.setattr(method_table, "CHANGE", 15)
    monkeypatch.setattr(method_table, "WINDOWS", {"start": 9, "before": 15, "after": 21, "end": 24})
    monkeypatch.setattr(method_table, "WARM_UP", 1)
    monkeypatch.setattr(method_table, "LAG", 3)
    monkeypatch.setattr(method_table, "LOOKED_AT", 6)
    monkeypatch.setattr(method_table, "SPEED_WARM_UP", 1)
    monkeypatch.setattr(method_table, "SPEED_BLOCKS", 2)


def test_a_run_is_stored_method_by_method_and_goes_on(short, tmp_path, capsys, monkeypatch):
    options = ["--prompts", "1", "--seeds", "0", "--parts", str(tmp_path / "parts"), "--batch", "1"]
    methods = ["--methods", "longlive_infinite", "deep_sink"]
    main([*options, "--output", str(tmp_path / "one.json"), "--methods", "longlive_infinite"])
    first = (tmp_path / "parts" / "longlive_infinite.json").read_text()
    ran = []
    real = method_table.run
    monkeypatch.setattr(method_table, "run", lambda *a: ran.append(a[2]) or real(*a))
    main([*options, "--output", str(tmp_path / "two.json"), *methods])
    assert ran == ["deep_sink"]
    assert (tmp_path / "parts" / "longlive_infinite.json").read_text() == first
    result = json.loads((tmp_path / "two.json").read_text())
    assert [row["method"] for row in result["methods"]] == ["longlive_infinite", "deep_sink"]
    for row in result["methods"]:
        assert 0 <= row["start"]["mean"] <= 1 and row["fps"] > 0 and row["kv_bytes"] > 0
        assert row["motion"]["mean"] > 0 and row["drift"]["mean"] > 0
    assert result["methods"][0]["kv_bytes"] < result["methods"][1]["kv_bytes"]
    shown = capsys.readouterr().out
    assert table(result) in shown and "| deep_sink |" in shown
    options[3] = "1"  # another seed
    main([*options, "--output", str(tmp_path / "three.json"), *methods[:2]])
    assert ran == ["deep_sink", "longlive_infinite"]  # other settings are run again
