"""End-to-end speed of a model: pixels on disk, time to the first frame, block times, memory.

    python -m benchmarks.end_to_end --output benchmarks/results/end_to_end.json

Warm-up rule: the first 5 blocks of a stream are left out of block times and frame rates, never out of the times to the first
frame. Everything is measured in one process on an otherwise idle machine; the machine is in the result.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from streamvid.ahead import decode_ahead, decodes_beside
from streamvid.io import open_writer
from streamvid.io.manifest import environment
from streamvid.models import load_pipeline

WARM_UP_BLOCKS = 5
LONG_SPAN = 200  # blocks that a median of the long stream is of: single ones vary by a tenth
PROMPT = "a large yellow star bounces on the sand at sunset"


def memory_mb() -> float:
    """Resident memory of this process in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def to_disk(pipe, blocks: int) -> dict[str, Any]:
    """A stream written to an MP4 as `streamvid generate` does: frames per second, block times, seconds per stage.

    Where decoding runs beside denoising, the stages' shares add up to more than one.
    """
    with (
        tempfile.TemporaryDirectory() as folder,
        open_writer(Path(folder) / "x.mp4", pipe.config.fps) as writer,
    ):
        beside = decodes_beside(pipe)
        stream = pipe.stream(PROMPT, blocks=blocks, decode_pixels=not beside)
        began = time.perf_counter()
        times, stages, frames = [], {}, 0
        for chunk in decode_ahead(stream) if beside else stream:
            writer.write(chunk.frames)
            now = time.perf_counter()
            times.append(now - began)
            began = now
            if chunk.index >= WARM_UP_BLOCKS:
                frames += len(chunk.frames)
                for name, seconds in chunk.timings.items():
                    stages[name] = stages.get(name, 0.0) + seconds
    steady = sorted(times[WARM_UP_BLOCKS:])
    total = sum(steady)
    shares = {name: round(value / total, 3) for name, value in stages.items() if name != "total"}
    return {
        "fps": round(frames / total, 1),
        "real_time_factor": round(frames / total / pipe.config.fps, 2),
        "block_p50_ms": round(1000 * statistics.median(steady), 1),
        "block_p95_ms": round(1000 * steady[int(0.95 * len(steady))], 1),
        "decodes_beside": beside,
        "stage_shares": shares,
    }


def long_stream(pipe, blocks: int) -> dict[str, Any]:
    """Block time and memory early and late in one stream: medians of `LONG_SPAN` blocks from block 50 and at the end."""
    times, memory = [], []
    for chunk in pipe.stream(PROMPT, blocks=blocks):
        times.append(chunk.timings["total"])
        memory.append(memory_mb())
    start, end = slice(50, 50 + LONG_SPAN), slice(-LONG_SPAN, None)
    early, late = statistics.median(times[start]), statistics.median(times[end])
    memory_early, memory_late = statistics.median(memory[start]), statistics.median(memory[end])
    return {
        "blocks": blocks,
        "block_ms_at_50": round(1000 * early, 2),
        "block_ms_at_end": round(1000 * late, 2),
        "time_ratio": round(late / early, 4),
        "memory_mb_at_50": round(memory_early, 1),
        "memory_mb_at_end": round(memory_late, 1),
        "memory_ratio": round(memory_late / memory_early, 4),
    }


FIRST_FRAME = """
import time; began = {began!r}
from streamvid.models import load_pipeline
pipe = load_pipeline({model!r}); loaded = time.time()
next(pipe.stream({prompt!r})); done = time.time()
print(done - loaded, done - began)
"""


def first_frame(model: str, runs: int = 3) -> dict[str, float]:
    """Seconds to the first chunk in a fresh process, after loading and from the start; medians."""
    results = []
    for _ in range(runs):
        program = FIRST_FRAME.format(began=time.time(), model=model, prompt=PROMPT)
        output = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True
        ).stdout
        results.append([float(value) for value in output.split()[-2:]])
    after_load, from_start = (statistics.median(column) for column in zip(*results, strict=True))
    return {"after_load_s": round(after_load, 2), "from_process_start_s": round(from_start, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="diorama")
    parser.add_argument("--blocks", type=int, default=100)
    parser.add_argument("--long-blocks", type=int, default=2040)
    parser.add_argument("--output", default="benchmarks/results/end_to_end.json")
    options = parser.parse_args()
    result: dict[str, Any] = {
        "command": f"python -m benchmarks.end_to_end --model {options.model} --blocks {options.blocks} "
        f"--long-blocks {options.long_blocks}",
        "warm_up": f"the first {WARM_UP_BLOCKS} blocks are left out of block times and frame rates",
        **environment("cpu" if not torch.cuda.is_available() else "cuda"),
        "machine": {"processor": processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "load_average_before": round(os.getloadavg()[0], 2),
        "first_frame": first_frame(options.model),
    }
    pipe = load_pipeline(options.model)
    result["to_disk"] = to_disk(pipe, options.blocks)
    result["long_stream"] = long_stream(pipe, options.long_blocks)
    result["peak_memory_mb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3, 1)
    Path(options.output).parent.mkdir(parents=True, exist_ok=True)
    Path(options.output).write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


def processor() -> str:
    """The processor's name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
