"""From a request to a stream of the pipeline: what is refused, what has an effect, what repeats it."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from server import wait_for
from streamvid.app.engine import PipelineEngine, StreamRequest, even_steps, leave_a_core
from streamvid.app.limits import Limits
from streamvid.app.live import ENDED
from streamvid.app.scripts import guess_kind, read_script
from streamvid.app.sessions import Studio

from streamvid.errors import UserError
from streamvid.methods import load_method
from streamvid.script import parse_script, to_yaml

FOX, CAT, BIRD = "a red fox walks", "the blue cat sleeps", "a bird runs"
SMALL = Limits(window=24, pixels=64 * 64, prompt_characters=100)


@pytest.fixture(scope="module")
def engine():
    return PipelineEngine(tiny.pipeline(), "tiny", SMALL)


def frames_of(engine, **options):
    return next(engine.prepare(StreamRequest(**{"height": 32, "width": 32, **options})).open()).frames


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 5},
        {"prompt": CAT},
        {"steps": 1},
        {"overrides": {"frames_per_block": 1}},
        {"width": 48},
        {"method": "streamdit"},
    ],
)
def test_every_setting_changes_the_video(engine, change):
    base = {"prompt": FOX, "method": "longlive", "seed": 1}
    same, again, other = (frames_of(engine, **o) for o in (base, base, {**base, **change}))
    assert np.array_equal(same, again)
    assert same.shape != other.shape or not np.array_equal(same, other)


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({"prompt": ""}, "empty"),
        ({"prompt": "x" * 101}, "101 characters"),
        ({"prompt": "a\x07fox"}, "control character"),
        ({"prompt": FOX, "method": "longlove"}, "longlive"),
        ({"prompt": FOX, "overrides": {"window": 25}}, "window = 25"),
        ({"prompt": FOX, "overrides": {"sinc": 2}}, "sink"),
        ({"prompt": FOX, "overrides": {"denoising_steps": [float("nan")]}}, "denoising_steps"),
        ({"prompt": FOX, "height": 128, "width": 128}, "4096 pixels"),
        ({"prompt": FOX, "height": 33}, "multiple"),
        ({"prompt": FOX, "overrides": {"frames_per_block": 15, "window": 24}}, "frames_per_block"),
    ],
)
def test_what_is_refused_is_refused_before_anything_is_allocated(engine, request_, words):
    with pytest.raises(UserError, match=words):
        engine.prepare(StreamRequest(**{"height": 32, "width": 32, **request_}))


def test_a_prompt_with_the_name_of_a_file_stays_a_prompt(engine, tmp_path):
    (tmp_path / "fox.yaml").write_text(f"shots: [{{prompt: {CAT}, duration: 3}}]")
    opening = engine.prepare(StreamRequest(prompt=str(tmp_path / "fox.yaml"), height=32, width=32))
    assert next(opening.open()).prompt.endswith("fox.yaml")


def test_the_script_of_what_happened_makes_the_same_video_again(engine, monkeypatch):
    """Steered live through the studio, then made again from the exported script: equal in every pixel."""
    studio = Studio(engine, SMALL)
    try:
        stream = studio.create(
            StreamRequest(
                prompt=FOX, seed=3, method="longlive", height=32, width=32, overrides={"sink": 2}, ahead=30
            )
        )
        seen, add = [], stream.recording.add

        def remembering(frames):
            seen.append(frames.copy())
            time.sleep(0.02)
            return add(frames)

        monkeypatch.setattr(stream.recording, "add", remembering)
        for text, policy in ((CAT, None), (BIRD, "cut")):
            at = stream.chunks
            wait_for(lambda at=at: stream.chunks > at, 30)
            receipt = stream.prompt(text, policy)
            wait_for(lambda receipt=receipt: receipt.chunk is not None, 30)
        at = stream.chunks
        wait_for(lambda: stream.chunks > at + 1, 30)
        stream.close()
        wait_for(lambda: stream.status == ENDED, 30)
        script = parse_script(to_yaml(stream.script()), ".yaml")
        assert [shot.prompt for shot in script.shots] == [FOX, CAT, BIRD]
        again = list(engine.pipe.stream(script))
        missed = stream.chunks - len(seen)  # made before we listened
        assert len(again) == stream.chunks
        assert np.array_equal(np.concatenate(seen), np.concatenate([c.frames for c in again[missed:]]))
    finally:
        studio.close()


def test_fork_and_saved_file_go_on_with_the_very_next_frames(engine, tmp_path):
    studio = Studio(engine, SMALL)
    ask = {"method": "longlive", "height": 32, "width": 32, "seed": 4}
    try:
        stream = studio.create(StreamRequest(prompt=FOX, ahead=0.3, **ask))
        wait_for(lambda: stream.chunks >= 2, 30)
        stream.pause()
        fork = studio.fork(stream.name)
        stream.save(tmp_path / "saved", "exact")
        saved = studio.resume_saved(tmp_path / "saved")
        wait_for(lambda: fork.raw and saved.raw, 30)
        whole = list(engine.pipe.stream([FOX], blocks=stream.chunks + 1, **ask))
        assert np.array_equal(fork.raw[0][2], whole[-1].frames)
        assert np.array_equal(saved.raw[0][2], whole[-1].frames)
        stream.resume()
        stream.reset(seed=5)
        at = stream.chunks
        wait_for(lambda: stream.chunks > at, 30)
        anew = next(engine.pipe.stream([FOX], **{**ask, "seed": 5})).frames
        assert any(np.array_equal(frames, anew) for _, _, frames in list(stream.raw))
        narrow = PipelineEngine(engine.pipe, "tiny", Limits(window=6))
        with pytest.raises(UserError, match="larger than this server") as refused:
            narrow.load(tmp_path / "saved")
        assert str(tmp_path) not in str(refused.value)
        (tmp_path / "bad").write_bytes(b"nonsense")
        with pytest.raises(UserError, match="that was sent") as refused:
            engine.load(tmp_path / "bad")
        assert str(tmp_path) not in str(refused.value)
    finally:
        studio.close()


def test_a_closed_stream_gives_up_its_block_between_two_steps(engine):
    """Sixteen steps of 0.2 s: closed after the first ones, its caches are free long before the block would be finished."""
    studio = Studio(engine, SMALL)
    forwards = []

    def slow(module, arguments):
        forwards.append(time.sleep(0.2))

    hook = engine.pipe.transformer.register_forward_pre_hook(slow)
    try:
        stream = studio.create(StreamRequest(prompt=FOX, height=32, width=32, steps=16))
        wait_for(lambda: len(forwards) >= 2, 30)
        stream.close()
        wait_for(lambda: stream.status == ENDED, 30)
        assert (stream.reason, stream.chunks) == ("closed", 0) and len(forwards) < 12
        wait_for(lambda: studio.counts()["in_memory"] == 0)
    finally:
        hook.remove()
        studio.close()


def test_a_resumed_stream_says_what_it_is_made_with(engine, tmp_path):
    options = {"sink": 2, "window": 9}
    stream = engine.pipe.stream([FOX], method=load_method("longlive", options), height=32, width=32, seed=3)
    next(stream)
    opening = engine.load(stream.save(tmp_path / "saved"))
    assert (opening.method, dict(opening.options), opening.seed) == ("longlive", options, 3)
    assert opening.resumed and not opening.scripted
    scripted = engine.pipe.stream(f"{FOX} [3s] | {CAT} [3s]", height=32, width=32)
    assert engine.load(scripted.save(tmp_path / "scripted")).scripted


@pytest.mark.parametrize(
    ("cores", "threads", "left", "at_once"), [(1, 1, 1, 1), (2, 2, 1, 2), (4, 4, 3, 1), (16, 4, 4, 4)]
)
def test_a_core_is_left_and_the_others_are_used(engine, monkeypatch, cores, threads, left, at_once):
    pool = [threads]
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    monkeypatch.setattr(torch, "get_num_threads", lambda: pool[0])
    monkeypatch.setattr(torch, "set_num_threads", lambda count: pool.__setitem__(0, count))
    leave_a_core()
    assert pool == [left] and engine.at_once == at_once


def test_a_gpu_makes_one_chunk_at_a_time():
    class OnGpu(PipelineEngine):
        def __init__(self):
            self.pipe = SimpleNamespace(device=torch.device("cuda"))

    assert OnGpu().at_once == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streams_made_at_the_same_time_are_those_made_alone(dtype):
    """Block by block in step, each in a thread of its own, with switches between: equal in every bit."""
    pipe = tiny.new_pipeline().to(dtype)
    methods = ("longlive", "self_forcing", "rolling_forcing", "deep_forcing")

    def run(number, together=None):
        torch.set_num_threads(1)
        stream = pipe.stream([FOX], seed=number, method=methods[number], height=32, width=32, blocks=5)
        chunks = []
        for chunk in stream:
            chunks.append(chunk.frames)
            stream.prompt((CAT, BIRD, FOX)[len(chunks) % 3])
            if together is not None:
                together.wait(60)
        return chunks

    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(len(methods)) as pool:
            step = threading.Barrier(len(methods))
            at_once = list(pool.map(lambda number: run(number, step), range(len(methods))))
        for number, chunks in enumerate(at_once):
            alone = run(number)
            assert len(chunks) == 5 and all(map(np.array_equal, chunks, alone))
    finally:
        torch.set_num_threads(before)


def test_steps_are_spaced_evenly():
    assert even_steps(4) == [1000.0, 750.0, 500.0, 250.0] and even_steps(1) == [1000.0]


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("a fox [5s] | a cat [5s]", "line"),
        ("shots:\n- {prompt: a, duration: 3}", ".yaml"),
        ('{"shots": [{"prompt": "a", "duration": 3}]}', ".json"),
    ],
)
def test_the_form_of_a_script_is_guessed(text, kind):
    assert guess_kind(text) == kind and read_script(text).shots[0].prompt.startswith("a")
