"""Decoding beside denoising: while chunks become pixels in threads, the next block is already being denoised.

A consumer is two blocks behind what the stream has made: for files, where nobody waits for the next prompt to show. A live
consumer takes one block (`blocks_ahead=1`): as many frames per second but for the halves of the decoder,
which then wait for each other, and a prompt that shows one block later than without.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from streamvid.chunk import Chunk
from streamvid.decoding import begin_decoding, decoder_after, decoder_of_scene
from streamvid.stream import VideoStream

if TYPE_CHECKING:
    from streamvid.pipelines.pipeline_streamvid import StreamVidPipeline

BLOCKS_AHEAD = 2  # one in each half of the decoder


def decodes_beside(pipe: StreamVidPipeline) -> bool:
    """Whether files are made that way: on a CPU decoding takes as long as denoising, and each keeps a core busy."""
    return decodes_beside_on(pipe.transformer.device)


def decodes_beside_on(device: torch.device) -> bool:
    return device.type == "cpu" and (os.cpu_count() or 1) > 1


def decode_ahead(stream: VideoStream, blocks_ahead: int = BLOCKS_AHEAD) -> Iterator[Chunk]:
    """The chunks of a stream made with `decode_pixels=False`, with their pixels, in order.

    Args:
        blocks_ahead: how many blocks the stream has made more than were yielded. It is steered as ever; what is asked
            of it (`prompt`, `cut`, `reset`) shows after these blocks. A fork or a file of it lacks the decoder's memory.

    A line of three threads: this one denoises, two others do a half of the decoding each. If the stream fails, what it made
    before is decoded and yielded first.
    """
    if stream.decode_pixels:  # it needs them itself, block by block (`reencode`)
        yield from stream
        return
    vae = stream.pipe.decoder
    decoder = decoder_after(vae, stream.given if stream.block == 0 else stream.cache.latest_latents())

    def first_half(chunk: Chunk) -> Future[Chunk]:
        nonlocal decoder
        began = time.perf_counter()
        if chunk.new_scene:
            decoder = decoder_of_scene(vae, chunk.index, stream.given)
        rest = begin_decoding(vae, chunk.latents, decoder)
        return last.submit(second_half, chunk, rest, time.perf_counter() - began)

    def second_half(chunk: Chunk, rest: Callable[[], np.ndarray], seconds: float) -> Chunk:
        began = time.perf_counter()
        videos = rest()
        timings = {**chunk.timings, "decode": seconds + time.perf_counter() - began}
        return replace(chunk, videos=videos, timings=timings)

    with (
        _shared_cores() as threads,
        ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(threads,)) as last,
        ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(threads,)) as first,
    ):
        waiting: deque[Future[Future[Chunk]]] = deque()
        try:
            for chunk in stream:
                waiting.append(first.submit(first_half, chunk))
                if len(waiting) > blocks_ahead:
                    yield waiting.popleft().result().result()
        except GeneratorExit:
            raise
        except BaseException:
            while waiting:
                yield waiting.popleft().result().result()
            raise
        while waiting:
            yield waiting.popleft().result().result()


@contextmanager
def _shared_cores() -> Iterator[int]:
    """Half of the cores for each thread: more would only make them wait for each other."""
    before = torch.get_num_threads()
    threads = max(1, min(before, (os.cpu_count() or 1) // 2))
    torch.set_num_threads(threads)
    try:
        yield threads
    finally:
        torch.set_num_threads(before)
