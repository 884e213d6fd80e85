"""What a stored result was made with: pages say where the model has other weights by now."""

import json

import pytest

from benchmarks import diorama_pages, readme
from streamvid import models
from streamvid.evaluation import findings, leaderboard
from streamvid.evaluation.stored import of_other_weights, release_of

EARLIER = "Measured with earlier weights of diorama"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    for part in ("text_encoder", "transformer", "vae", "probe"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "x.safetensors").write_bytes(part.encode())
    return tmp_path


@pytest.mark.parametrize("part", ["text_encoder", "transformer", "vae"])
def test_a_release_is_told_by_the_weights_that_make_videos(part, folder):
    before = release_of(str(folder))
    (folder / "model_index.json").write_text('{"fps": 16}')
    (folder / "probe" / "x.safetensors").write_bytes(b"judges, and makes nothing")
    assert release_of(str(folder)) == before
    (folder / part / "x.safetensors").write_bytes(b"trained on")
    assert release_of(str(folder)) != before


def test_a_result_of_other_weights_says_so(folder):
    now = {"release": release_of(str(folder))}
    assert of_other_weights(now, str(folder)) == []
    (folder / "vae" / "x.safetensors").write_bytes(b"trained on")
    for result in (now, {}):
        told, empty = of_other_weights(result, str(folder))
        assert told.startswith(f"Measured with earlier weights of {folder}") and empty == ""


PAGES = {
    "ADHERENCE": readme.quality_lines,
    "METHODS": readme.method_lines,
    "STORAGE": readme.storage_lines,
    "FINDINGS": readme.findings_lines,
}


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("earlier", [True, False])
def test_pages_of_the_embedded_model_say_so(name, earlier, tmp_path, monkeypatch):
    result = json.loads(getattr(readme, name).read_text())
    result["release"] = "another" if earlier else release_of("diorama")
    (tmp_path / "x.json").write_text(json.dumps(result))
    monkeypatch.setattr(readme, name, tmp_path / "x.json")
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    assert (EARLIER in PAGES[name]()) == earlier


@pytest.mark.parametrize("earlier", [True, False])
def test_pages_of_motion_and_seeds_and_the_leaderboard_say_so(earlier, tmp_path, monkeypatch):
    release = "another" if earlier else release_of("diorama")
    files = {name: diorama_pages.stored(name) for name in ("motion", "two_steps", "long", "diversity")}
    part = {"mean": 0.9, "interval": 0.01, "worst": 0.8, "all_right": 0.5}
    gained = {"gain": {"over": "teacher", "difference": 0.05, "low": 0.04, "high": 0.06, "p": 0.01}}
    rows = [{"name": "teacher", "start": part}, {"name": "causal", "start": {**part, **gained}}]
    files["stages"] = {"prompts": 200, "seeds": [0, 1], "stages": rows}
    monkeypatch.setattr(diorama_pages, "stored", lambda name: {**files[name], "release": release})
    stages = diorama_pages.stage_lines()
    assert stages.count(EARLIER) == (1 if earlier else 0)
    assert (
        "--prompts 200 --seeds 0 1" in stages
        and "| causal | 0.900 ± 0.010 | +0.050 [+0.040, +0.060] |" in stages
    )
    assert diorama_pages.motion_lines().count(EARLIER) == (3 if earlier else 0)
    assert diorama_pages.diversity_lines().count(EARLIER) == (1 if earlier else 0)
    table = json.loads(readme.METHODS.read_text())
    (tmp_path / "table.json").write_text(json.dumps({**table, "release": release}))
    assert (EARLIER in leaderboard.board_of_table(tmp_path / "table.json").about) == earlier


def test_a_model_that_is_not_here_has_a_leaderboard(tmp_path):
    table = json.loads(readme.METHODS.read_text())
    (tmp_path / "table.json").write_text(json.dumps({**table, "model": "gone"}))
    assert "made for one of them" in leaderboard.board_of_table(tmp_path / "table.json").about


def test_stored_results_name_a_release():
    results = [readme.ADHERENCE, readme.METHODS, readme.STORAGE, readme.FINDINGS]
    results += [
        diorama_pages.DOCS / f"diorama_{name}.json"
        for name in ("switch", "motion", "two_steps", "long", "diversity")
    ]
    for path in results:
        assert len(json.loads(path.read_text())["release"]) == 16, path
    assert models.DEFAULT_MODEL == "diorama" == findings.DEFAULT_MODEL
