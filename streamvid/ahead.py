"""Decoding beside denoising: while chunks become pixels in threads, the next block is already being denoised.

On a GPU the threads queue their kernels in a CUDA stream of their own.

A consumer is two blocks behind what the stream has made: for files, where nobody waits for the next prompt to show. A live
consumer takes one block (`blocks_ahead=1`): as many frames per second but for the halves of the decoder,
which then wait for each other, and a prompt that shows one block later than without.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
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
    """Whether files are made that way. Not where weights are offloaded: hooks would take them from the other thread."""
    offloaded = any(hasattr(part, "_hf_hook") for part in (pipe.transformer, pipe.decoder))
    return not offloaded and decodes_beside_on(pipe.transformer.device)


def decodes_beside_on(device: torch.device) -> bool:
    """On a CPU decoding takes as long as denoising, and each keeps a core busy; a GPU has queues that overlap."""
    return device.type == "cuda" or (device.type == "cpu" and (os.cpu_count() or 1) > 1)


class DecodingQueue:
    """Where a device is told to decode: on a GPU a CUDA stream of its own, whose kernels do not wait for denoising's.

    Chunks keep their latents until their pixels are on the host, so no memory is reused before the queue has read it.
    """

    def __init__(self, device: torch.device):
        self.stream = torch.Stream(device) if device.type == "cuda" else None

    def told(self) -> torch.Event | None:
        """Marks what this thread has told the device so far, outside of the queue."""
        if self.stream is None:
            return None
        return torch.accelerator.current_stream(self.stream.device).record_event()

    @contextmanager
    def after(self, told: torch.Event | None) -> Iterator[None]:
        """In the queue, when the device has done what was marked."""
        if self.stream is None or told is None:
            yield
            return
        with self.stream:
            self.stream.wait_event(told)
            yield


def decode_ahead(stream: VideoStream, blocks_ahead: int = BLOCKS_AHEAD) -> Iterator[Chunk]:
    """The chunks of a stream made with `decode_pixels=False`, with their pixels, in order.

    Args:
        blocks_ahead: how many blocks the stream has made more than were yielded. It is steered as ever; what is asked
            of it (`prompt`, `cut`, `reset`) shows after these blocks. A fork or a file of it lacks the decoder's memory.

    A line of three threads: this one denoises, two others do a half of the decoding each (on a GPU one after the other). If
    the stream fails, what it made before is decoded and yielded first.
    """
    if stream.decode_pixels:  # it needs them itself, block by block (`reencode`)
        yield from stream
        return
    vae = stream.pipe.decoder
    queue = DecodingQueue(vae.device)
    with queue.after(queue.told()):
        decoder = decoder_after(vae, stream.given if stream.block == 0 else stream.cache.latest_latents())

    def first_half(chunk: Chunk, denoised: torch.Event | None) -> Future[Chunk]:
        nonlocal decoder
        began = time.perf_counter()
        with queue.after(denoised):
            if chunk.new_scene:
                decoder = decoder_of_scene(vae, chunk.index, stream.given)
            rest = begin_decoding(vae, chunk.latents, decoder)
        made = last.submit(second_half, chunk, denoised, rest, time.perf_counter() - began)
        if queue.stream is not None:
            wait([made])  # in one queue two halves at a time would take no less time, only more memory
        return made

    def second_half(
        chunk: Chunk, denoised: torch.Event | None, rest: Callable[[], np.ndarray], seconds: float
    ) -> Chunk:
        began = time.perf_counter()
        with queue.after(denoised):
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
                waiting.append(first.submit(first_half, chunk, queue.told()))
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
