"""The measurement of prompt adherence, with pipelines and probes of known behaviour."""

import json
import math
from functools import partial

import numpy as np
import pytest
import torch

from streamvid.evaluation import adherence
from streamvid.evaluation.adherence import MINUTE_BLOCKS, START_BLOCKS, SWITCH_BLOCK, Kept, measure, table
from streamvid.evaluation.stored import fingerprint
from streamvid.world.probe import WINDOW_FRAMES
from streamvid.world.prompts import parse
from streamvid.world.scene import ATTRIBUTES, Scene, is_held_out

CLASSES = [len(values) for values in ATTRIBUTES.values()]


def labels_of(text: str) -> tuple[int, ...]:
    return Scene(**{"weather": "clear", **parse(text)}).labels()


class FakePipeline:
    """Its latents are the labels of what was prompted; `obeys` tells whether it follows a switch."""

    vae = torch.nn.Linear(1, 1)
    vae.dtype = torch.float32

    def __init__(self, obeys: bool = True):
        self.obeys, self.calls = obeys, []

    def stream(self, texts, seed, blocks, decode_pixels, **options):
        self.calls.append({"texts": texts, "seed": seed, "blocks": blocks, "options": options})
        assert not decode_pixels
        return FakeStream(texts, blocks, self.obeys)


class FakeStream:
    def __init__(self, texts, blocks, obeys):
        self.texts, self.blocks, self.obeys = texts, blocks, obeys

    def prompt(self, texts):
        assert len(texts) == len(self.texts)
        if self.obeys:
            self.texts = texts

    def __iter__(self):
        for index in range(self.blocks):
            rows = torch.tensor([labels_of(text) for text in self.texts])  # B 7
            latents = rows[:, :, None, None, None].float().expand(-1, -1, 3, 1, 1)
            yield type("Chunk", (), {"index": index, "latents": latents})


class FakeProbe:
    """Reads the labels back; `shift` makes every answer wrong, `rng` makes them guesses."""

    def __init__(self, shift: int = 0, rng: np.random.Generator | None = None):
        self.shift, self.rng = shift, rng

    def classify(self, frames):
        assert frames.shape[1] == WINDOW_FRAMES
        told = {}
        for index, (name, count) in enumerate(zip(ATTRIBUTES, CLASSES, strict=True)):
            answer = frames[:, -1, index, 0, 0].mul(100).round().long()
            if self.rng is not None:
                answer = torch.from_numpy(self.rng.integers(0, count, len(answer)))
            told[name] = (answer + self.shift) % count
        return told


@pytest.fixture(autouse=True)
def readable_pixels(monkeypatch):
    """A decoder that shows label i of a latent frame as the brightness of row i, four frames each."""

    def decode(vae, latents, state, frames_per_call):
        frames = latents[:, :, :, 0, 0].repeat_interleave(4, 2)[:, :, 3:]  # B 7 T
        pixels = frames.transpose(1, 2)[:, None, :, :, None].expand(-1, 3, -1, -1, 2)  # B 3 T 7 2
        return pixels / 50 - 1  # `measure` maps [-1, 1] to [0, 1]

    monkeypatch.setattr(adherence, "decode", decode)
    monkeypatch.setattr(adherence, "decoder_state", lambda vae: None)


def run(pipe=None, probe=None, prompts=12, seeds=(0, 1), parts=("start", "switch"), **options):
    return measure(pipe or FakePipeline(), probe or FakeProbe(), prompts, seeds, 8, parts, **options)


def test_a_pipeline_that_is_always_right():
    result = run(parts=("start", "switch", "minute"))
    for part in ("start", "switch", "minute"):
        row = result[part]
        assert (row["mean"], row["worst"], row["all_right"], row["interval"]) == (1.0, 1.0, 1.0, 0.0)
        assert row["attributes"] == dict.fromkeys(ATTRIBUTES, 1.0)
    changes = 2 * sum(1 + index % 2 for index in range(12))  # two seeds, one or two attributes by turns
    assert result["switch"]["changed"] == {"accuracy": 1.0, "count": changes, "interval": 0.0}
    assert result["switch"]["kept"] == {"accuracy": 1.0, "count": 2 * 12 * 7 - changes, "interval": 0.0}
    assert result["switch"]["soon"] == {name: result["switch"][name] for name in ("changed", "kept")}
    assert result["prompts"] == 12 and result["seeds"] == [0, 1]


def test_a_slow_switch_is_right_late_and_wrong_soon():
    """The first window ends 3.5 s after the switch, the second 4.5 s: between them lies the slow pipeline's change."""

    class Slow(FakeStream):
        def prompt(self, texts):
            self.after = texts

        def __iter__(self):
            for chunk in super().__iter__():
                yield chunk
                if chunk.index == SWITCH_BLOCK + 4:  # its block 5 after the switch begins at 3.75 s
                    self.texts = self.after

    pipe = FakePipeline()
    pipe.stream = lambda texts, seed, blocks, decode_pixels, **options: Slow(texts, blocks, True)
    switch = run(pipe, parts=("switch",))["switch"]
    assert switch["changed"]["accuracy"] == 1.0 and switch["soon"]["changed"]["accuracy"] == 0.0
    assert switch["kept"]["accuracy"] == switch["soon"]["kept"]["accuracy"] == 1.0


def test_ten_minutes_are_ten_minutes():
    pipe = FakePipeline()
    assert run(pipe, prompts=2, seeds=(0,), parts=("ten_minutes",))["ten_minutes"]["mean"] == 1.0
    assert 9 + 12 * (pipe.calls[0]["blocks"] - 1) >= 600 * 16


def test_a_measurement_that_is_killed_goes_on(tmp_path):
    """Groups that are kept are not made again, unless anything that they depend on has changed."""
    whole = run(parts=("start", "switch"))
    kept = Kept(tmp_path, {"weights": "a"})

    class Killed(FakePipeline):
        def stream(self, *arguments, **keywords):
            if len(self.calls) == 4:
                raise KeyboardInterrupt
            return super().stream(*arguments, **keywords)

    with pytest.raises(KeyboardInterrupt):
        run(Killed(), parts=("start", "switch"), kept=kept)
    pipe = FakePipeline()
    again = run(pipe, parts=("start", "switch"), kept=kept)
    assert len(pipe.calls) == 2  # of six groups four were kept
    assert {**again, "seconds": 0} == {**whole, "seconds": 0}
    (tmp_path / "start" / "1.json").write_text('{"settings"')  # cut short
    other = FakePipeline()
    run(other, parts=("start", "switch"), kept=kept)
    assert len(other.calls) == 1
    changed = FakePipeline()
    run(changed, parts=("start",), kept=Kept(tmp_path, {"weights": "b"}))
    assert len(changed.calls) == 3


def test_a_whole_measurement_takes_what_a_part_of_it_made(tmp_path):
    """A part: the first 8 of 12 prompts, one of two seeds."""
    kept = Kept(tmp_path, {"weights": "a"})
    part = FakePipeline()
    found = run(part, seeds=(0,), parts=("switch",), kept=kept, first=8)
    assert found["first"] == 8 and part.calls[0]["seed"] == [1000 * i for i in range(8)]
    assert found["switch"]["changed"]["count"] == 12
    pipe = FakePipeline()
    whole = run(pipe, parts=("switch",), kept=kept)
    assert len(pipe.calls) == 2 and whole["switch"] == run(parts=("switch",))["switch"]
    other = FakePipeline()
    run(other, prompts=8, seeds=(0,), parts=("switch",), kept=kept)  # others, for prompts are drawn together
    assert len(other.calls) == 1


def test_other_weights_have_another_fingerprint():
    one = torch.nn.Linear(3, 2)
    before = fingerprint(one, FakePipeline.vae)
    assert fingerprint(one, FakePipeline.vae) == before
    with torch.no_grad():
        one.bias[1] += 1e-3
    assert fingerprint(one, FakePipeline.vae) != before


def test_a_pipeline_that_is_always_wrong():
    row = run(probe=FakeProbe(shift=1))["start"]
    assert (row["mean"], row["worst"], row["all_right"]) == (0.0, 0.0, 0.0)


def test_guesses_give_chance():
    result = run(probe=FakeProbe(rng=np.random.default_rng(0)), prompts=200, parts=("start",))
    for name, count in zip(ATTRIBUTES, CLASSES, strict=True):
        error = 4 * math.sqrt((count - 1) / count**2 / 400)
        assert result["start"]["attributes"][name] == pytest.approx(1 / count, abs=error)
    chance = sum(1 / count for count in CLASSES) / 7
    assert result["start"]["mean"] == pytest.approx(chance, abs=0.05)
    assert 0.01 < result["start"]["interval"] < 0.03  # of 400 videos


def test_a_pipeline_that_ignores_the_switch_keeps_and_does_not_change():
    result = run(FakePipeline(obeys=False))
    assert result["start"]["mean"] == 1.0
    assert result["switch"]["changed"]["accuracy"] == 0.0
    assert result["switch"]["kept"]["accuracy"] == 1.0
    changes = result["switch"]["changed"]["count"]
    assert result["switch"]["mean"] == pytest.approx(1 - changes / (2 * 12 * 7), abs=1e-4)


def test_what_is_asked_of_the_pipeline():
    pipe = FakePipeline()
    run(pipe, prompts=5, seeds=(0, 3), parts=("start", "switch", "minute"), method="longlive")
    assert {call["blocks"] for call in pipe.calls} == {START_BLOCKS, SWITCH_BLOCK + 6, MINUTE_BLOCKS}
    assert 9 + 12 * (START_BLOCKS - 1) >= 5 * 16 and 9 + 12 * (MINUTE_BLOCKS - 1) >= 60 * 16
    assert all(call["options"] == {"method": "longlive"} for call in pipe.calls)
    texts = [text for call in pipe.calls[:2] for text in call["texts"]]
    assert len(texts) == 10 and texts[:5] == texts[5:]  # the same prompts with each seed
    assert all(is_held_out(Scene.from_labels(labels_of(text))) for text in texts)
    seeds = [seed for call in pipe.calls[:2] for seed in call["seed"]]
    assert seeds == [0, 1000, 2000, 3000, 4000, 3, 1003, 2003, 3003, 4003]


def test_only_the_last_windows_are_probed():
    """`minute` asks for two windows of two seconds, and the decoder warms up before them."""
    pipe, seen = FakePipeline(), []

    class Probe(FakeProbe):
        def classify(self, frames):
            seen.append(len(frames))
            return super().classify(frames)

    run(pipe, Probe(), prompts=3, seeds=(0,), parts=("start", "minute"))
    assert seen == [3, 6]
    latents = torch.arange(60.0).view(1, 1, 60, 1, 1).expand(2, 7, -1, -1, -1) % 2
    told = adherence.probe_tail(pipe, FakeProbe(), latents, ends=(WINDOW_FRAMES, 0))
    assert told.shape == (2, 2, 7)
    assert (told == 1).all()  # both windows end on the eighth latent frame of their own: 51 and 59


def test_accuracies_have_a_closed_form():
    right = torch.zeros(4, 2, 7)
    right[:2] = 1
    right[2, 0, :3] = 1
    row = adherence._accuracies(right)
    shares = [(4 + 1) / 8] * 3 + [4 / 8] * 4
    assert list(row["attributes"].values()) == pytest.approx(shares, abs=1e-4)
    assert row["mean"] == pytest.approx(sum(shares) / 7, abs=1e-4) and row["worst"] == 0.5
    assert row["all_right"] == 0.5
    per_video = np.array([1, 1, 3 / 14, 0])
    assert row["interval"] == pytest.approx(1.96 * per_video.std(ddof=1) / 2, abs=1e-4)
    share = adherence._share(torch.tensor([True] * 3 + [False]))
    assert share == {
        "accuracy": 0.75,
        "count": 4,
        "interval": pytest.approx(1.96 * math.sqrt(0.75 * 0.25 / 4), abs=1e-4),
    }


def test_the_ceiling_sends_renders_through_the_vae(monkeypatch):
    scenes, places = [], set()

    def render(shots, scenery, frames):
        ((start, scene),) = shots
        assert start == 0 and frames == 81
        scenes.append(scene)
        places.add(scenery.cells())
        return np.array(scene.labels(), np.uint8)[None, :, None, None].repeat(frames, 0).repeat(3, 3)

    def encode(vae, pixels, state, frames_per_call):
        labels = (pixels[:, 0, :21] + 1) * 127.5  # B 21 7 1
        return labels.transpose(1, 2)[..., None]

    monkeypatch.setattr(adherence, "render_clip", render)
    monkeypatch.setattr(adherence, "encode", encode)
    monkeypatch.setattr(adherence, "encoder_state", lambda vae: None)
    quality = {"psnr": 30.0, "psnr_first": 29.0, "psnr_last": 28.0, "latent_std": []}
    monkeypatch.setattr(adherence, "reconstruction_quality", lambda vae, clips, frames: quality)
    row = run(parts=("vae",))["vae"]
    assert (row["mean"], row["psnr"], row["psnr_last"]) == (1.0, 30.0, 28.0)
    assert len(scenes) == 12 and all(map(is_held_out, scenes))
    assert len(places) > 6  # of 24, drawn anew for every clip


def test_the_command_writes_numbers_and_prints_a_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(adherence, "load_pipeline", lambda model: FakePipeline())
    monkeypatch.setattr(adherence, "resolve_model", str)
    monkeypatch.setattr(adherence.AttributeProbe, "load", classmethod(lambda cls, path: FakeProbe()))
    output = tmp_path / "deep" / "adherence.json"
    monkeypatch.setattr(adherence, "settings", lambda *arguments: {})
    arguments = ["--prompts", "3", "--seeds", "4", "--parts", "start", "switch", "--method", "longlive"]
    arguments += ["--parts-folder", str(tmp_path / "parts"), "--set", "sink=0", "denoising_steps=[1000, 500]"]
    monkeypatch.setattr("sys.argv", ["adherence", *arguments, "--output", str(output)])
    adherence.main()
    written = json.loads(output.read_text())
    assert written["model"] == "diorama" and written["seeds"] == [4]
    overrides = {"sink": 0, "denoising_steps": [1000, 500]}
    assert written["options"] == {"method": "longlive", "overrides": overrides}
    assert written["start"]["mean"] == 1.0
    told = capsys.readouterr().out
    assert table(written) in told and "changed attributes" in told
    lines = table(written).splitlines()
    assert {line.count("|") for line in lines} == {4 + len(ATTRIBUTES)} and len(lines) == 4


def test_processes_give_the_same_numbers(monkeypatch):
    """Groups are answered in any process, one by one, as the real worker would."""
    here = run(parts=("start", "switch"))
    monkeypatch.setattr(adherence, "load_pipeline", lambda model: FakePipeline())
    monkeypatch.setattr(adherence, "shipped_probe", FakeProbe)
    threads = torch.get_num_threads()
    adherence._load(partial(adherence.answers_of, "diorama", {}))
    torch.set_num_threads(threads)
    there = run(
        parts=("start", "switch"), answer=lambda groups: [adherence._answer_in_worker(g) for g in groups]
    )
    assert {**here, "seconds": 0} == {**there, "seconds": 0}


def test_two_processes_of_the_real_model(tmp_path, monkeypatch, capsys):
    """The shipped model, measured by workers and here: the same file but for its time; and the picture of it."""
    monkeypatch.undo()
    written = []
    for count in ("1", "2"):
        output, sheet = tmp_path / f"{count}.json", tmp_path / f"{count}.png"
        arguments = ["--prompts", "2", "--seeds", "0", "--parts", "start", "--processes", count]
        arguments += ["--parts-folder", str(tmp_path / f"parts_{count}")]
        monkeypatch.setattr(
            "sys.argv", ["adherence", *arguments, "--output", str(output), "--contact-sheet", str(sheet)]
        )
        adherence.main()
        written.append({**json.loads(output.read_text()), "seconds": 0})
        assert sheet.stat().st_size > 10_000
    assert written[0] == written[1]
