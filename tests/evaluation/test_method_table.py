"""The table of methods: its numbers in closed form, and a run over a short stream of the embedded model."""

import json

import pytest
import torch

from streamvid.decoding import decode, decoder_state
from streamvid.evaluation import method_table
from streamvid.evaluation.method_table import (
    LAG,
    LOOKED_AT,
    OPENING,
    WARM_UP,
    WINDOW,
    Openings,
    cases,
    main,
    repetition,
    see,
    summary,
    table,
)
from streamvid.evaluation.stored import write_stored
from streamvid.models import load_pipeline, load_probe
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
    monkeypatch.setattr(method_table, "CHANGE", 9)
    monkeypatch.setattr(method_table, "AFTER", 9)
    monkeypatch.setattr(method_table, "WARM_UP", 1)
    monkeypatch.setattr(method_table, "LAG", 3)
    monkeypatch.setattr(method_table, "LOOKED_AT", 6)
    monkeypatch.setattr(method_table, "SPEED_WARM_UP", 1)
    monkeypatch.setattr(method_table, "SPEED_BLOCKS", 2)


@pytest.fixture(scope="module")
def model():
    return load_pipeline("diorama"), load_probe("diorama")


@pytest.fixture(scope="module")
@torch.no_grad()
def latents(model):
    stream = model[0].stream(
        cases(1)[0]["texts"][0], method="longlive_infinite", decode_pixels=False, blocks=6
    )
    return torch.cat([chunk.latents for chunk in stream], 2)


@torch.no_grad()
def test_a_window_is_what_a_whole_video_shows_there(model, latents):
    """The warmed-up decoder is off by less than one grey level; see() takes the same frames."""
    pipe, probe = model
    whole = decode(pipe.vae, latents, decoder_state(pipe.vae))
    part = decode(pipe.vae, latents[:, :, -WARM_UP - WINDOW :], decoder_state(pipe.vae))
    last = 4 * WINDOW
    off = 127.5 * (whole[:, :, -last:] - part[:, :, -last:]).float()
    assert off.square().mean().sqrt() < 1
    (seen,) = see(pipe, probe, latents[:, :, -WARM_UP - WINDOW :])
    frames = part[:, :, -last:].float().add(1).mul(127.5).round()
    assert seen.motion == pytest.approx(float(frames.diff(dim=2).abs().mean()), rel=1e-5)
    assert seen.look[:3] == pytest.approx(frames.mean((0, 2, 3, 4)).numpy(), rel=1e-4)


def test_an_opening_is_decoded_once(model, latents, monkeypatch):
    decoded = []
    real = method_table.see
    monkeypatch.setattr(method_table, "see", lambda *a: decoded.append(len(a[2])) or real(*a))
    openings, first = Openings(), latents[:, :, :OPENING]
    answers = openings.see(*model, torch.cat([first, first + 0.5]))
    again = openings.see(*model, torch.cat([first + 0.5, first, first + 1]))
    assert decoded == [2, 1]
    assert [a.motion for a in again[:2]] == [answers[1].motion, answers[0].motion] != [answers[0].motion] * 2


def files(folder) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("*.json"))}


def test_a_run_is_stored_piece_by_piece_and_goes_on(short, tmp_path, capsys, monkeypatch):
    parts = tmp_path / "parts"
    options = ["--prompts", "2", "--seeds", "0", "--parts", str(parts), "--batch", "1"]
    methods = ["--methods", "longlive_infinite", "deep_sink"]
    main([*options, "--output", str(tmp_path / "one.json"), "--methods", "longlive_infinite"])
    first = files(parts)
    assert list(first) == ["longlive_infinite/0.json", "longlive_infinite/1.json", "speeds.json"]
    del first["speeds.json"]  # of all methods, in turns
    (parts / "longlive_infinite" / "1.json").unlink()
    ran = []
    real = method_table.run
    monkeypatch.setattr(method_table, "run", lambda *a: ran.append(a[2:4]) or real(*a))
    main([*options, "--output", str(tmp_path / "two.json"), *methods])
    jobs = [(case, 1000 * index) for index, case in enumerate(cases(2))]
    assert ran == [("deep_sink", [jobs[0]]), ("longlive_infinite", [jobs[1]]), ("deep_sink", [jobs[1]])]
    assert first.items() <= files(parts).items()  # what was missing came out as before
    result = json.loads((tmp_path / "two.json").read_text())
    assert [row["method"] for row in result["methods"]] == ["longlive_infinite", "deep_sink"]
    for row in result["methods"]:
        assert 0 <= row["start"]["mean"] <= 1 and row["fps"] > 0 and row["kv_bytes"] > 0
        assert row["motion"]["mean"] > 0 and row["drift"]["mean"] > 0
    assert result["methods"][0]["start"] == result["methods"][1]["start"]  # no window is full by then
    assert result["methods"][0]["kv_bytes"] < result["methods"][1]["kv_bytes"]
    shown = capsys.readouterr().out
    assert table(result) in shown and "| deep_sink |" in shown
    ran.clear()
    options[3] = "1"  # another seed: other settings are run again
    main([*options[:1], "1", *options[2:], "--output", str(tmp_path / "three.json"), *methods[:2]])
    assert [name for name, _ in ran] == ["longlive_infinite"]
    ran.clear()
    monkeypatch.setattr(method_table, "weights_of", lambda model: "trained on")  # and those of other weights
    main([*options[:1], "1", *options[2:], "--output", str(tmp_path / "three.json"), *methods[:2]])
    assert [name for name, _ in ran] == ["longlive_infinite"]


def test_processes_share_the_batches(tmp_path):
    """Two processes make the files that one makes (the videos here are whole minutes: none is run)."""
    plan = method_table.Plan("diorama", ("longlive",), 2, (0,), 1, tmp_path, "weights")
    row = {"start": 1.0, "end": 0.5}
    for number in plan.batches:
        plan.stored("longlive", str(number), lambda: [row])
    speeds = {"longlive": {"fps": 1.0, "kv_bytes": 1}}
    write_stored(tmp_path / "speeds.json", {"model": "diorama", "methods": ["longlive"]}, speeds)
    result = method_table.measure(plan, processes=2)
    assert result["methods"][0]["start"] == {"mean": 1.0, "interval": 0.0}
    assert result["methods"][0]["fps"] == 1.0
    assert method_table.measure(plan, processes=1) == result
