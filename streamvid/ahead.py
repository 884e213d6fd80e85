"""Decoding beside denoising: while one chunk becomes pixels in a thread, the next block is already being denoised.

For files, where nobody waits for the next prompt to show: a consumer is one block behind what the stream has made.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from streamvid.decoding import decode_to_bytes, decoder_state
from streamvid.stream import Chunk, VideoStream

if TYPE_CHECKING:
    from streamvid.pipelines.pipeline_streamvid import StreamVidPipeline


def decodes_beside(pipe: StreamVidPipeline) -> bool:
    """Whether files are made that way: on a CPU decoding takes as long as denoising, and each keeps a core busy."""
    return pipe.device.type == "cpu" and (os.cpu_count() or 1) > 1


def decode_ahead(stream: VideoStream) -> Iterator[Chunk]:
    """The chunks of a stream made with `decode_pixels=False`, with their pixels, in order.

    If the stream fails, what it made before is decoded and yielded first.
    """
    vae = stream.pipe.vae
    decoder = decoder_state(vae)

    def finish(chunk: Chunk) -> Chunk:
        nonlocal decoder
        began = time.perf_counter()
        if chunk.new_scene:
            decoder = decoder_state(vae)
        videos = decode_to_bytes(vae, chunk.latents, decoder)
        return replace(chunk, videos=videos, timings={**chunk.timings, "decode": time.perf_counter() - began})

    with (
        _shared_cores() as threads,
        ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(threads,)) as worker,
    ):
        waiting: Future[Chunk] | None = None
        try:
            for chunk in stream:
                previous, waiting = waiting, worker.submit(finish, chunk)
                if previous is not None:
                    yield previous.result()
        except GeneratorExit:
            raise
        except BaseException:
            if waiting is not None:
                yield waiting.result()
            raise
        if waiting is not None:
            yield waiting.result()


@contextmanager
def _shared_cores() -> Iterator[int]:
    """Half of the cores for each of the two threads: more would only make them wait for each other."""
    before = torch.get_num_threads()
    threads = max(1, min(before, (os.cpu_count() or 1) // 2))
    torch.set_num_threads(threads)
    try:
        yield threads
    finally:
        torch.set_num_threads(before)
