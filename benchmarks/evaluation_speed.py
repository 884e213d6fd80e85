"""Speed and memory of the offline metrics on a 60 s video of 832 x 480 px: `python -m benchmarks.evaluation_speed`."""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from streamvid.evaluation.backbones import Backbones
from streamvid.evaluation.engine import measure
from streamvid.evaluation.registry import resolve
from streamvid.evaluation.sources import open_source
from streamvid.evaluation.types import Segment, Video
from streamvid.io import open_writer
from streamvid.io.files import replace_atomically
from streamvid.machine import peak_memory

METRICS = [
    "vbench.temporal_flickering",
    "drift.*",
    "!drift.imaging",
    "!drift.aesthetic",
    "long.*",
    "!long.*clip_to_clip",
]
METRICS += ["interactive.switch_*"]


def write_video(path: Path, frames: int, height: int, width: int) -> None:
    """A coarse texture that is panned over, changes in the middle, and has a little noise."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(40, 216, (2, height // 16, 3 * width // 16, 3), np.uint8)
    textures = coarse.repeat(16, 1).repeat(16, 2)
    with open_writer(path, 16) as writer:
        for start in range(0, frames, 12):
            chunk = []
            for index in range(start, min(start + 12, frames)):
                left = 2 * index % (2 * width)
                picture = textures[2 * index // frames][:, left : left + width].astype(np.int16)
                chunk.append((picture + rng.integers(-4, 5, picture.shape)).clip(0, 255).astype(np.uint8))
            writer.write(np.stack(chunk))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=957)
    parser.add_argument("--folder", type=Path, default=Path("out"), help="where the video is put")
    parser.add_argument("--output", default="benchmarks/results/evaluation_speed.json")
    options = parser.parse_args(arguments)
    height, width = 480, 832
    path = options.folder / "evaluation_speed.mp4"
    path.parent.mkdir(parents=True, exist_ok=True)
    load = round(os.getloadavg()[0], 2)
    write_video(path, options.frames, height, width)
    half = options.frames // 2
    video = Video(
        "v",
        str(path),
        segments=(Segment(0, half, "a"), Segment(half, options.frames, "b")),
        borders=(half // 2,),
    )
    before = time.perf_counter(), time.process_time()
    found = measure(video, open_source(path), resolve(METRICS), Backbones())
    wall, cpu = time.perf_counter() - before[0], time.process_time() - before[1]
    result = {
        "command": f"python -m benchmarks.evaluation_speed --frames {options.frames}",
        "frames": options.frames,
        "size": [height, width],
        "frames_per_second": round(options.frames / wall, 2),
        "frames_per_cpu_second": round(options.frames / cpu, 2),
        "peak_memory_mb": round(peak_memory(torch.device("cpu")) / 1e6),
        "cores": os.cpu_count(),
        "load_average_before": load,
        "machine": platform.processor() or platform.machine(),
        "metrics": len(found),
        "seconds_by_metric": {name: round(seconds, 2) for name, (_, seconds) in found.items()},
        "failed": [name for name, (outcome, _) in found.items() if outcome.status == "failed"],
    }
    with replace_atomically(Path(options.output)) as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
