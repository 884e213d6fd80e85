"""How much videos move, with pipelines of known motion."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from streamvid.evaluation import liveliness
from streamvid.evaluation.liveliness import (
    MOMENTS,
    MOTIONS,
    PERIOD,
    mean_flow,
    questions,
    ratio,
    rendered_flow,
    summary,
)
from streamvid.world.prompts import parse
from streamvid.world.render import render_clip
from streamvid.world.sampling import block_start
from streamvid.world.scene import ATTRIBUTES, Scene, is_held_out, sample_scenery


class Pipeline:
    """Its latents are the numbers of its frames; `decode` renders them. `pace` is how fast, `still_from` the last frame."""

    vae = None

    def __init__(self, pace: float = 1.0, still_from: int | None = None):
        self.pace, self.still_from, self.asked = pace, still_from, []

    def stream(self, texts, seed, blocks, decode_pixels, **options):
        self.asked.append((tuple(texts), tuple(seed), blocks, options))
        self.texts, self.seeds = texts, seed
        rows = torch.arange(len(texts)).float()[:, None, None, None, None]
        for index in range(blocks):
            number = torch.full((len(texts), 1, 3, 1, 1), float(index))
            latents = torch.cat([rows.expand(-1, 1, 3, 1, 1), number], 1)
            yield type("Chunk", (), {"index": index, "latents": latents})


class Probe:
    def __init__(self, pipe):
        self.pipe = pipe

    def classify(self, frames):
        scene = scene_of(self.pipe.texts[self.pipe.row])
        return {name: torch.tensor([label]) for name, label in zip(ATTRIBUTES, scene.labels(), strict=True)}


def scene_of(text: str) -> Scene:
    return Scene(**{"weather": "clear", **parse(text)})


@pytest.fixture
def rendering(monkeypatch):
    """A pipeline whose decoder renders the scene of its prompt in the scenery of its seed."""

    def make(**keywords):
        pipe = Pipeline(**keywords)

        def decode_to_bytes(vae, latents, state):
            pipe.row = row = int(latents[0, 0, 0, 0, 0])
            frames = 12 * latents.shape[2] // 3
            last = block_start(int(latents[0, 1, -1, 0, 0]) + 1)
            numbers = range(last - frames, last)
            if pipe.still_from is not None:
                numbers = [min(n, pipe.still_from) for n in numbers]
            scenery = sample_scenery(np.random.default_rng(pipe.seeds[row]))
            shots = [(0, scene_of(pipe.texts[row]))]
            clip = np.concatenate(
                [render_clip(shots, scenery, 1, first_frame=round(pipe.pace * n)) for n in numbers]
            )
            return clip[None]

        monkeypatch.setattr(liveliness, "decode_to_bytes", decode_to_bytes)
        monkeypatch.setattr(liveliness, "decoder_state", lambda vae: None)
        return pipe

    return make


def watched(pipe, count=6, moments=("start",), **options):
    jobs = [(*asked, 1000 * index) for index, asked in enumerate(questions(count))]
    return liveliness.watch(pipe, Probe(pipe), moments, jobs, **options)


def test_renders_move_as_renders(rendering):
    videos = watched(rendering())
    assert all(video["generated"]["start"] == pytest.approx(video["rendered"], rel=1e-6) for video in videos)
    found = summary(videos, range(len(MOTIONS)), ["start"])["start"]
    assert found["against_rendered"] == {"ratio": 1.0, "low": 1.0, "high": 1.0}
    assert {name: row["ratio"] for name, row in found["by_motion"].items()} == dict.fromkeys(MOTIONS, 1.0)
    assert found["right"]["mean"] == 1.0


def test_a_frozen_stream_has_no_motion_and_a_slow_one_half(rendering):
    frozen = watched(rendering(still_from=5))
    assert summary(frozen, range(len(MOTIONS)), ["start"])["start"]["against_rendered"]["ratio"] == 0.0
    dry = summary(frozen, range(len(MOTIONS)), ["start"])["start"]["by_weather"]["clear"]
    assert (dry["ratio"], dry["prompts"]) == (0.0, 3) and dry["rendered"] > 0
    slow = summary(watched(rendering(pace=0.5)), range(len(MOTIONS)), ["start"])["start"]
    for name in ("rolls left", "bounces", "circles"):
        assert 0.35 < slow["by_motion"][name]["ratio"] < 0.75


def test_motion_that_fades_is_seen(rendering, monkeypatch):
    monkeypatch.setattr(liveliness, "MOMENTS", {"start": 7, "minute": 20})
    videos = watched(rendering(still_from=block_start(15)), moments=("start", "minute"))
    found = summary(videos, range(len(MOTIONS)), ["start", "minute"])
    assert found["start"]["against_rendered"]["ratio"] == 1.0
    assert found["minute"]["against_rendered"]["ratio"] == found["minute"]["against_start"]["ratio"] == 0.0


def test_every_motion_comes_round_in_the_window():
    """So that a window's place does not matter; where nothing moves but clouds, there is nothing to compare."""
    for scene, _ in questions(len(MOTIONS))[1:]:
        scene = replace(scene, weather="clear")
        scenery = sample_scenery(np.random.default_rng(0))
        flows = [
            mean_flow(render_clip([(0, scene)], scenery, PERIOD + 1, first_frame=first))
            for first in (0, 5, 90)
        ]
        assert max(flows) < 1.25 * min(flows)


def test_a_shift_of_two_pixels_is_a_flow_of_two():
    rng = np.random.default_rng(0)
    world = np.kron(rng.integers(0, 255, (40, 60)), np.ones((4, 4))).astype(np.uint8)
    world = world[..., None].repeat(3, 2)
    frames = np.stack([world[:128, 2 * n : 2 * n + 128] for n in range(4)])
    assert mean_flow(frames) == pytest.approx(2.0, rel=0.15)
    assert mean_flow(frames[[0, 0, 0]]) == 0.0


def test_what_is_asked():
    asked = questions(24)
    assert [scene.motion for scene, _ in asked] == 4 * list(MOTIONS)
    assert all(is_held_out(scene) and scene_of(text) == scene for scene, text in asked)
    assert questions(3) == asked[:3]
    assert rendered_flow(asked[3][0], 7) == rendered_flow(asked[3][0], 7) > 0


def test_the_stream_is_as_long_as_the_last_moment(rendering):
    pipe = rendering()
    watched(pipe, 2, ("start",), method="longlive")
    assert pipe.asked == [(tuple(text for _, text in questions(2)), (0, 1000), 7, {"method": "longlive"})]
    for moment, seconds in (("start", 5), ("minute", 60), ("ten_minutes", 600)):
        assert seconds <= block_start(MOMENTS[moment]) / 16 < seconds + 0.75


def test_ratios_are_paired():
    one = np.arange(1.0, 21.0)
    found = ratio(2 * one, one)
    assert found == {"ratio": 2.0, "low": 2.0, "high": 2.0}
    noisy = ratio(one[::-1].copy(), one)
    assert noisy["low"] < noisy["ratio"] == 1.0 < noisy["high"]


def test_the_command_keeps_groups_and_writes_a_table(tmp_path, monkeypatch, capsys):
    calls = []

    def watcher(model, moments, options):
        def watch(jobs):
            calls.append(jobs)
            row = {"rendered": 2.0, "generated": dict.fromkeys(moments, 1.0)}
            return [{**row, "right": {name: [1, 1, 1, 1, 1, 1, 0] for name in moments}} for _ in jobs]

        return watch

    class Pipe:
        transformer = text_encoder = vae = None

    monkeypatch.setattr(liveliness, "watcher", watcher)
    monkeypatch.setattr(liveliness, "load_pipeline", lambda model: Pipe)
    monkeypatch.setattr(liveliness, "shipped_probe", lambda: None)
    monkeypatch.setattr(liveliness, "fingerprint", lambda *modules: "weights")
    arguments = ["--prompts", "12", "--seeds", "0", "3", "--moments", "start", "minute"]
    arguments += ["--parts", str(tmp_path / "parts"), "--output", str(tmp_path / "deep" / "x.json")]
    liveliness.main(arguments)
    assert len(calls) == 4 and [seed for _, _, seed in calls[2]] == [3, 1003, 2003, 3003, 4003, 5003]
    (tmp_path / "parts" / "6_3.json").unlink()
    liveliness.main(arguments)
    assert len(calls) == 5
    liveliness.main([*arguments, "--method", "longlive", "--set", "denoising_steps=[1000, 500]"])
    assert len(calls) == 9
    found = json.loads((tmp_path / "deep" / "x.json").read_text())
    assert found["method"] == "longlive" and found["overrides"] == {"denoising_steps": [1000, 500]}
    assert found["command"].endswith("minute --method longlive --set denoising_steps=[1000, 500]")
    assert found["moments"]["minute"]["against_rendered"]["ratio"] == 0.5
    assert found["moments"]["start"]["right"]["mean"] == pytest.approx(6 / 7, abs=1e-4)
    told = capsys.readouterr().out
    assert "| minute | 1.00, x 0.50 [0.50, 0.50] | 1.00, x 0.50 [0.50, 0.50] | 1.00 |" in told


def test_the_shipped_model_moves(tmp_path):
    """One real group: within a factor of two of what is rendered."""
    liveliness.main(["--prompts", "6", "--parts", str(tmp_path), "--output", str(tmp_path / "x.json")])
    whole = json.loads((tmp_path / "x.json").read_text())["moments"]["start"]
    assert 0.5 < whole["against_rendered"]["ratio"] < 2 and whole["right"]["mean"] > 0.9
