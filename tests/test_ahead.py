"""Decoding beside denoising: the same chunks as one after the other, two blocks behind."""

import numpy as np
import pytest
import tiny
import torch

from streamvid.ahead import decode_ahead

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


def test_the_stream_is_two_blocks_ahead_of_its_consumer():
    _, blind = streams(tiny.pipeline())
    chunks = decode_ahead(blind)
    assert [(next(chunks).index, blind.block) for _ in range(3)] == [(0, 3), (1, 4), (2, 5)]
    chunks.close()


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
