"""Generating a protocol's videos: losslessly stored, described beside the file, made once."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from streamvid.errors import UserError
from streamvid.evaluation.manifest import read_beside
from streamvid.evaluation.protocol import Generation, Job, script_of
from streamvid.evaluation.types import Segment, Video
from streamvid.io.ffmpeg import ffmpeg_binary, ffmpeg_error, raw_input, start_ffmpeg, stop_process
from streamvid.io.files import replace_atomically, temporary_sibling
from streamvid.io.writers import frame_rate
from streamvid.models import load_pipeline
from streamvid.pipelines.pipeline_streamvid import StreamVidPipeline
from streamvid.script import load_script


class ArchiveWriter:
    """Frames as H.264 in RGB without any loss; the file appears when it is whole.

    Args:
        path: of the MP4; a file of that name is replaced.
        fps: frames per second.
    """

    def __init__(self, path: Path, fps: float, height: int, width: int):
        self.path, self.temporary = path, temporary_sibling(path)
        coding = ("-c:v", "libx264rgb", "-preset", "veryfast", "-qp", "0", "-threads", "1")
        rate: Fraction = frame_rate(fps)
        self._messages = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the writer
        command = [ffmpeg_binary(), *raw_input(width, height, rate), *coding, "-y", str(self.temporary)]
        self._ffmpeg = start_ffmpeg(command, stderr=self._messages)

    def write(self, frames: np.ndarray) -> None:
        assert self._ffmpeg.stdin is not None
        try:
            self._ffmpeg.stdin.write(np.ascontiguousarray(frames).tobytes())
        except BrokenPipeError:
            self._fail()

    def close(self) -> None:
        assert self._ffmpeg.stdin is not None
        self._ffmpeg.stdin.close()
        if self._ffmpeg.wait():
            self._fail()
        self.temporary.replace(self.path)

    def abort(self) -> None:
        stop_process(self._ffmpeg)
        self.temporary.unlink(missing_ok=True)

    def _fail(self) -> None:
        code = self._ffmpeg.wait()
        self._messages.seek(0)
        raise ffmpeg_error(self.path, self._messages.read(), code, "nothing of it is kept")


def own_device(device: str) -> str:
    """`auto` as the GPU of this process, where several processes and several GPUs share a run."""
    count, rank = torch.cuda.device_count(), os.environ.get("LOCAL_RANK")
    return f"cuda:{int(rank) % count}" if device == "auto" and count > 1 and rank is not None else device


class Producer:
    """Makes the videos of jobs with one model and method; a finished one is only read.

    Args:
        jobs: by id of the video.
        model, method, overrides, device, dtype: as of `streamvid generate`.
    """

    def __init__(
        self,
        jobs: list[Job],
        generation: Generation,
        model: str,
        method: str | None = None,
        overrides: dict[str, Any] | None = None,
        device: str = "auto",
        dtype: str = "auto",
    ):
        self.jobs = {job.video.id: job for job in jobs}
        self.generation, self.model, self.method = generation, model, method or generation.method
        self.overrides = {**generation.overrides, **(overrides or {})}
        self.device, self.dtype = device, dtype
        self._pipe: StreamVidPipeline | None = None
        self.made: list[str] = []

    @property
    def pipe(self) -> StreamVidPipeline:
        if self._pipe is None:
            self._pipe = load_pipeline(self.model, own_device(self.device), self.dtype)
        return self._pipe

    def __call__(self, video: Video) -> Video:
        """The video, made now unless it is there."""
        beside = Path(video.path).with_suffix(".video.json")
        known = read_beside(beside)
        if known is not None and Path(video.path).is_file():
            return replace(known, path=video.path)
        Path(video.path).parent.mkdir(parents=True, exist_ok=True)
        for torso in Path(video.path).parent.glob(f".{Path(video.path).stem}.*partial*"):  # of a killed run
            torso.unlink(missing_ok=True)
        made = self._make(self.jobs[video.id])
        with replace_atomically(beside) as temporary:
            Path(temporary).write_text(json.dumps(made.to_dict(), ensure_ascii=False))
        self.made.append(video.id)
        return made

    def _make(self, job: Job) -> Video:
        fps = self.generation.fps or 16.0
        size = self.generation.size or (None, None)
        stream = self.pipe.stream(
            load_script(script_of(job.prompts, self.generation, fps)),
            method=self.method,
            overrides=self.overrides or None,
            seed=job.video.seed,
            height=size[0],
            width=size[1],
            fps=self.generation.fps,
        )
        if self.pipe.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        writer: ArchiveWriter | None = None
        seconds, counts, prompts = [], [], []
        try:
            for chunk in stream:
                if writer is None:
                    writer = ArchiveWriter(Path(job.video.path), stream.fps, *chunk.frames.shape[1:3])
                writer.write(chunk.frames)
                seconds.append(round(float(chunk.timings["total"]), 6))
                counts.append(len(chunk.frames))
                prompts.append(chunk.prompt)
            if writer is None:
                raise UserError(f"{job.video.id}: the stream has no chunk: give a longer video")
            writer.close()
        except BaseException:
            if writer is not None:
                writer.abort()
            raise
        return self._described(job.video, stream.fps, seconds, counts, prompts)

    def _described(
        self, video: Video, fps: float, seconds: list[float], counts: list[int], prompts: list[str]
    ) -> Video:
        starts = [0, *np.cumsum(counts).tolist()]
        switches = [i for i in range(1, len(prompts)) if prompts[i] != prompts[i - 1]]
        edges = [0, *switches, len(prompts)]
        segments = tuple(Segment(starts[a], starts[b], prompts[a]) for a, b in pairwise(edges))
        return replace(
            video,
            fps=fps,
            segments=segments if len(segments) > 1 else (),
            borders=tuple(starts[1:-1]),
            timings={
                "chunk_seconds": seconds,
                "chunk_frames": counts,
                "switches": switches,
                "peak_memory_mb": round(self._peak_memory(), 1),
            },
        )

    def _peak_memory(self) -> float:
        """In MB: of the device on a GPU, else of the process so far."""
        if self.pipe.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 1e6
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / 1e6 if sys.platform == "darwin" else peak / 1e3
