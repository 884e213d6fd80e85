"""Decoding beside denoising: the same chunks as one after the other, two blocks behind."""

import threading

import numpy as np
import pytest
import tiny
import torch

from streamvid import ahead
from streamvid.ahead import decode_ahead, decodes_beside
from streamvid.chunk import Chunk

SCRIPT = "a red fox walks in the snow [3s] | rain falls [2s] | # a blue cat sleeps [3s]"


def streams(pipe, **options):
    """The same stream with and without pixels."""
    options = {"height": tiny.PIXELS, "width": tiny.PIXELS, "seed": 3, **options}
    return pipe.stream(SCRIPT, **options), pipe.stream(SCRIPT, decode_pixels=False, **options)


def test_chunks_are_those_of_the_stream_also_after_a_cut():
    plain, blind = streams(tiny.pipeline())
    chunks, beside = list(plain), list(decode_ahead(blind))
    assert len(chunks) == len(beside) > 4
    assert sum(chunk.new_scene for chunk in chunks) == 1
    for one, other in zip(chunks, beside, strict=True):
        assert np.array_equal(one.videos, other.videos) and torch.equal(one.latents, other.latents)
        assert (one.index, one.first_frame, one.events) == (other.index, other.first_frame, other.events)
        assert other.timings["decode"] > 0


@pytest.mark.parametrize("given", ["image", "video"])
def test_after_a_reset_it_goes_on_from_the_given_frames_again(given):
    frames = np.random.default_rng(2).integers(0, 256, (21, 32, 32, 3), np.uint8)

    def chunks(beside: bool) -> list[Chunk]:
        options = {given: frames[0] if given == "image" else frames, "decode_pixels": not beside}
        stream = tiny.pipeline().stream("a red fox walks", seed=3, blocks=2, **options)
        resets = []

        def reset_once(timesteps, latents):
            if stream.block == 1 and not resets:
                resets.append(stream.reset())
            return latents

        stream.sampler.on_step_end = reset_once
        return list(decode_ahead(stream) if beside else stream)

    plain, beside = chunks(False), chunks(True)
    assert [chunk.index for chunk in beside] == [0, 1, 0, 1]
    for one, other in zip(plain, beside, strict=True):
        assert np.array_equal(one.videos, other.videos) and one.events == other.events
    assert np.array_equal(beside[0].videos, beside[2].videos)


def test_it_may_begin_in_the_middle_of_a_stream():
    """While the window holds the whole scene, the pixels are exactly those of the stream."""
    plain, blind = streams(tiny.pipeline())
    chunks = list(plain)[3:]
    for _ in range(3):
        next(blind)
    for one, other in zip(chunks, decode_ahead(blind), strict=True):
        assert np.array_equal(one.videos, other.videos)


def test_the_stream_is_two_blocks_ahead_of_its_consumer():
    _, blind = streams(tiny.pipeline())
    chunks = decode_ahead(blind)
    assert [(next(chunks).index, blind.block) for _ in range(3)] == [(0, 3), (1, 4), (2, 5)]
    chunks.close()


def test_a_live_consumer_is_one_block_behind_and_steers():
    options = {"height": tiny.PIXELS, "width": tiny.PIXELS, "blocks": 6}
    plain, blind = (tiny.pipeline().stream("a red fox", decode_pixels=on, **options) for on in (True, False))
    beside = decode_ahead(blind, blocks_ahead=1)
    shown = [next(beside), next(beside)]
    assert blind.block == 3
    receipt = blind.prompt("a blue cat", "cut")
    shown += beside
    expected = [next(plain) for _ in range(3)]
    plain.prompt("a blue cat", "cut")
    expected += plain
    assert receipt.chunk == 3 and [chunk.new_scene for chunk in shown].index(True) == 3
    for one, other in zip(expected, shown, strict=True):
        assert np.array_equal(one.videos, other.videos)


@pytest.mark.parametrize("at", [0, 1, 3])
def test_what_was_made_before_a_failure_comes_first(at, monkeypatch):
    _, blind = streams(tiny.pipeline())
    denoise = blind.sampler.denoise

    def failing(inputs):
        if blind.block == at:
            raise RuntimeError("out of memory")
        return denoise(inputs)

    monkeypatch.setattr(blind.sampler, "denoise", failing)
    seen = []
    with pytest.raises(RuntimeError, match="out of memory"):
        for chunk in decode_ahead(blind):
            assert chunk.videos.size
            seen.append(chunk.index)
    assert seen == list(range(at))


def test_a_decoder_that_fails_is_heard_of(monkeypatch):
    _, blind = streams(tiny.pipeline())
    monkeypatch.setattr("streamvid.ahead.begin_decoding", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(decode_ahead(blind))


def test_threads_are_shared_while_it_runs_and_given_back(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        _, blind = streams(tiny.pipeline())
        chunks = decode_ahead(blind)
        next(chunks)
        assert torch.get_num_threads() == 1
        chunks.close()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


class FakeQueue:
    """Of a GPU, as far as `decode_ahead` uses one: notes down what happens in which order."""

    def __init__(self, seen):
        self.seen, self.device, self.inside = seen, torch.device("cpu"), threading.local()

    def __enter__(self):
        self.inside.now = True

    def __exit__(self, *_):
        self.inside.now = False

    def wait_event(self, event):
        assert self.inside.now
        self.seen.append(("waits for", event))

    def record_event(self):
        self.seen.append("denoised")
        return self.seen.count("denoised")


def test_a_gpu_decodes_in_a_queue_of_its_own_when_the_latents_are_there(monkeypatch):
    """No GPU is needed to see who waits for what; that kernels overlap on one has not been measured."""
    plain, blind = streams(tiny.pipeline())
    seen: list = []
    queue = FakeQueue(seen)
    begin = ahead.begin_decoding

    def noting(vae, latents, decoder):
        assert queue.inside.now
        seen.append("first half")
        rest = begin(vae, latents, decoder)

        def noting_rest():
            assert queue.inside.now
            seen.append("second half")
            return rest()

        return noting_rest

    def own(self, device):
        self.stream = queue

    monkeypatch.setattr(ahead.DecodingQueue, "__init__", own)
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: queue)
    monkeypatch.setattr(ahead, "begin_decoding", noting)
    chunks = list(decode_ahead(blind))
    for one, other in zip(plain, chunks, strict=True):
        assert np.array_equal(one.videos, other.videos)
    work = [what for what in seen if what != "denoised"]
    assert work[0] == ("waits for", 1)  # the decoder's memory before the first chunk
    for index in range(len(chunks)):
        waits = ("waits for", index + 2)
        assert work[1 + 4 * index :][:4] == [waits, "first half", waits, "second half"]


def test_where_decoding_runs_beside(monkeypatch):
    pipe = tiny.pipeline()
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    assert decodes_beside(pipe)
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    assert not decodes_beside(pipe)
    assert ahead.decodes_beside_on(torch.device("cuda")) and not ahead.decodes_beside_on(torch.device("mps"))


def test_not_where_weights_are_offloaded(monkeypatch):
    """A hook that takes the transformer from its device for the decoder would do so in the middle of a forward."""
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    pipe = tiny.pipeline()
    pipe.decoder._hf_hook = object()
    assert not decodes_beside(pipe)
