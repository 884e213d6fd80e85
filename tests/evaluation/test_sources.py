"""Frame sources and the pass over them: streams, batches, memory."""

import tracemalloc

import numpy as np
import pytest
from reference import clip

from streamvid.evaluation.backbones import Backbones
from streamvid.evaluation.engine import measure
from streamvid.evaluation.registry import resolve
from streamvid.evaluation.sources import ArraySource, BadVideo, StreamSource, batches
from streamvid.evaluation.types import Segment, Video
from streamvid.io import open_writer
from streamvid.models import load_pipeline

OFFLINE = ["vbench.temporal_flickering", "drift.*", "long.*", "interactive.switch_*"]


class Panned:
    """A wide picture that is panned over: any number of large frames, none kept."""

    def __init__(self, frames, height=480, width=832, fps=16.0):
        from streamvid.evaluation.sources import Measure

        self.measure = Measure(frames, height, width, fps)
        self.picture = np.random.default_rng(0).integers(0, 255, (height, 3 * width, 3), np.uint8)

    def frames(self):
        for index in range(self.measure.frames):
            start = (2 * index) % (2 * self.measure.width)
            yield np.ascontiguousarray(self.picture[:, start : start + self.measure.width])


def test_memory_does_not_grow_with_length():
    """120 frames of 832 x 480 px are 144 MB; what a pass over them holds is two batches and small descriptors."""
    requests = resolve(
        ["vbench.temporal_flickering", "drift.luma", "long.loop", "long.freeze", "long.dynamic_degree"]
    )
    source = Panned(120)
    tracemalloc.start()
    found = measure(Video("v", "v"), source, requests, Backbones())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found["long.loop"][0].status == "ok" and peak < 100e6


def test_a_stream_is_measured_while_it_is_made():
    pipe = load_pipeline("diorama")
    prompt = "a large green ball rolls left on a meadow by day"
    chunks = list(pipe.stream(prompt, seed=1, blocks=3))
    frames = np.concatenate([chunk.frames for chunk in chunks])
    stream = pipe.stream(prompt, seed=1, blocks=3)
    requests = resolve(["drift.luma", "long.motion"])
    live = measure(Video("v", "v"), StreamSource(stream, len(frames), 128, 128, 16.0), requests, Backbones())
    stored = measure(Video("v", "v"), ArraySource(frames, 16.0), requests, Backbones())
    assert {n: o.score for n, (o, _) in live.items()} == {n: o.score for n, (o, _) in stored.items()}


@pytest.mark.parametrize("size", [1, 7, 64])
def test_the_size_of_batches_changes_nothing(size, monkeypatch):
    parts = (Segment(0, 20, "a"), Segment(20, 40, "b"))
    video, requests = Video("v", "v", segments=parts, borders=(12, 24, 36)), resolve(OFFLINE)
    source = ArraySource(clip("d_drift"), 16.0)
    usual = measure(video, source, requests, Backbones())
    monkeypatch.setattr("streamvid.evaluation.engine.BATCH_FRAMES", size)
    other = measure(video, source, requests, Backbones())
    assert {n: o.score for n, (o, _) in usual.items()} == {n: o.score for n, (o, _) in other.items()}


def test_a_source_that_ends_early_fails_in_one_line():
    class Short(ArraySource):
        def frames(self):
            yield from self.array[:5]

    found = measure(Video("v", "v"), Short(clip("c_pan"), 16.0), resolve(["long.freeze"]), Backbones())
    assert found["long.freeze"][0].reason == "5 of 33 frames can be decoded"
    with pytest.raises(BadVideo):
        list(batches(Short(clip("c_pan"), 16.0)))


@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
def test_delivered_files_are_read(suffix, tmp_path):
    from streamvid.evaluation.sources import open_source

    with open_writer(tmp_path / f"v{suffix}", 16) as writer:
        for start in range(0, 32, 8):
            writer.write(clip("d_drift")[start : start + 8])
    source = open_source(tmp_path / f"v{suffix}")
    frames = np.stack(list(source.frames()))
    assert source.measure.frames == len(frames) == 32
    assert np.abs(frames.astype(int) - clip("d_drift")[:32]).mean() < 12
