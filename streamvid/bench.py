"""`streamvid bench`: how fast a model is here, for a viewer and for the hardware; a record in JSON.

    record = bench(subject, parts=("denoise", "disk"), blocks=20)

Warm-up rule: blocks until the window is full, at least 5, are left out of block times and frame rates, never out of the time
to the first frame. Measure on an otherwise idle machine; its load average is in the record.
"""

from __future__ import annotations

import hashlib
import json
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from streamvid.ahead import decode_ahead
from streamvid.chunk import Chunk
from streamvid.costs import Configuration
from streamvid.errors import UserError
from streamvid.io import open_writer
from streamvid.io.files import output_error, replace_atomically
from streamvid.io.manifest import environment
from streamvid.machine import machine, measured, peak_memory, reset_peak, resident, settle
from streamvid.plan import Plan, described, make_plan

if TYPE_CHECKING:
    from streamvid.pipelines.pipeline_streamvid import StreamVidPipeline
    from streamvid.stream import VideoStream

PARTS = ("first_frame", "denoise", "decode", "disk", "prompt", "roofline", "scaling")
WARM_UP_BLOCKS = 5
PROMPT = "a large yellow star bounces on the sand at sunset"
NEXT_PROMPTS = tuple(
    f"a {size} {colour} star bounces on the sand at sunset"
    for size in ("large", "small")
    for colour in ("red", "blue", "green", "white", "pink", "orange")
)
LONG_SPAN = 200  # blocks whose median is taken in a long stream: single ones wobble by several percent


@dataclass(frozen=True)
class Subject:
    """What is measured.

    Attributes:
        load: makes its pipeline.
        model: name by which a fresh process can load it; None: random weights.
        compiled: whether `load` compiles the transformer's blocks.
    """

    configuration: Configuration
    device: torch.device
    load: Callable[[], StreamVidPipeline]
    model: str | None = None
    compiled: bool = False

    def stream(
        self, pipe: StreamVidPipeline, configuration: Configuration | None = None, **options: Any
    ) -> VideoStream:
        """A stream of the configuration, or of another one with the same weights."""
        chosen = configuration or self.configuration
        return pipe.stream(
            [PROMPT] * chosen.batch,
            method=chosen.method,
            height=chosen.height,
            width=chosen.width,
            **options,
        )


def bench(
    subject: Subject, parts: Sequence[str] = PARTS, blocks: int = 20, length: int = 0, command: str = ""
) -> dict[str, Any]:
    """Measure the parts asked for.

    Args:
        blocks: measured after the warm-up, in every part.
        length: of a long stream, whose blocks must not become slower or larger; 0: none.

    Raises:
        UserError: a part that does not exist, or one that needs a model with a name.
    """
    check(subject, parts, blocks, length)
    device = subject.device
    record: dict[str, Any] = {
        "command": command,
        "warm_up": f"the first blocks, at least {WARM_UP_BLOCKS} and until the window is full, are left out of block times",
        "configuration": {
            **described(subject.configuration),
            "compiled": subject.compiled,
            "options": asdict(subject.configuration.method),
        },
        **environment(str(device)),
        "machine": machine(device),
    }
    record["config_hash"] = config_hash(record["configuration"])
    record["load_average_before"] = record["machine"].pop("load_average")
    plan = make_plan(subject.configuration, measured(device, subject.configuration.dtype))
    if "first_frame" in parts and subject.model is not None:
        record["first_frame"] = first_frame(subject)
    reset_peak(device)
    pipe = subject.load()
    peaks = [peak_memory(device)]

    def measure(name: str, part: Callable[[], Any]) -> None:
        reset_peak(device)  # what a part has freed does not count for the next
        record[name] = part()
        peaks.append(peak_memory(device))

    if "denoise" in parts or "roofline" in parts:
        measure("denoise", lambda: rates(subject, subject.stream(pipe, decode_pixels=False), blocks))
    if "decode" in parts or "roofline" in parts:
        measure("denoise_decode", lambda: rates(subject, subject.stream(pipe), blocks))
    if "disk" in parts:
        measure("to_disk", lambda: to_disk(subject, pipe, blocks))
    if "prompt" in parts:
        measure("prompt_to_pixel", lambda: prompt_to_pixel(subject, pipe))
    record["peak_memory_mb"] = round(max(peaks) / 1e6, 1)
    if "roofline" in parts:
        record["roofline"] = roofline(plan, record)
    record["plan"] = prediction(plan, record)
    if "scaling" in parts:
        record["scaling"] = scaling(subject, pipe, min(blocks, 5))
    if length:
        record["long_stream"] = long_stream(subject, pipe, length)
    record["load_average_after"] = machine(device)["load_average"]
    return record


def check(subject: Subject, parts: Sequence[str], blocks: int, length: int) -> None:
    """Refuse what cannot be measured."""
    for part in parts:
        if part not in PARTS:
            raise UserError(f"parts = {part!r} is not known: choose from {', '.join(PARTS)}")
    if blocks < 2:
        raise UserError(f"blocks = {blocks} must be at least 2")
    if length and length < 50 + 2 * LONG_SPAN:
        raise UserError(
            f"length = {length} is no long stream: give at least {50 + 2 * LONG_SPAN} blocks, or 0 for none"
        )


def config_hash(configuration: Any) -> str:
    """Twelve digits that are the same for the same configuration."""
    return hashlib.sha256(json.dumps(configuration, sort_keys=True, default=str).encode()).hexdigest()[:12]


def warm_up(configuration: Configuration) -> int:
    """Blocks until the window is full, at least `WARM_UP_BLOCKS`."""
    method = configuration.method
    return max(WARM_UP_BLOCKS, -(-method.window // method.frames_per_block) + 1)


def write_record(record: dict[str, Any], output: str | Path | None) -> None:
    """Print a record as JSON, and write it whole or not at all."""
    text = json.dumps(record, indent=2, default=str)
    print(text)
    if output is None:
        return
    path = Path(output)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replace_atomically(path) as temporary:
            temporary.write_text(text + "\n")
    except OSError as error:
        raise output_error(error, path) from error


# --- parts ------------------------------------------------------------------------------------------------------------


def timed(
    subject: Subject, chunks: Iterable[Chunk], consume: Callable[[Chunk], Any] | None = None
) -> Iterator[tuple]:
    """Chunks with the seconds that each took, consumption and the device's last work included."""
    began = time.perf_counter()
    for chunk in chunks:
        if consume is not None:
            consume(chunk)
        settle(subject.device)
        now = time.perf_counter()
        yield chunk, now - began
        began = now


def rates(
    subject: Subject, chunks: Iterable[Chunk], blocks: int, consume=None, configuration=None
) -> dict[str, Any]:
    """Frame rate, block times and shares of the stages of `blocks` blocks after the warm-up."""
    configuration = configuration or subject.configuration
    warm, times, stages, frames = warm_up(configuration), [], dict[str, float](), 0
    ratio = 2 ** sum(configuration.spec.vae["temperal_downsample"])
    for index, (chunk, seconds) in enumerate(timed(subject, chunks, consume)):
        if index >= warm:
            times.append(seconds)
            frames += ratio * chunk.latents.shape[2]
            for name, value in chunk.timings.items():
                stages[name] = stages.get(name, 0.0) + value
        if len(times) == blocks:
            break
    total, ordered = sum(times), sorted(times)
    return {
        "fps": round(frames / total, 2),
        "real_time_factor": round(frames / total / configuration.spec.fps, 2),
        "block_p50_ms": round(1000 * statistics.median(times), 2),
        "block_p95_ms": round(1000 * ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))], 2),
        "stage_shares": {name: round(value / total, 3) for name, value in stages.items() if name != "total"},
    }


def to_disk(subject: Subject, pipe: StreamVidPipeline, blocks: int) -> dict[str, Any]:
    """Pixels in an MP4, as `streamvid generate` writes them.

    Where decoding runs beside denoising, the stages' shares add up to more than one.
    """
    beside = subject.configuration.beside
    with (
        tempfile.TemporaryDirectory() as folder,
        open_writer(Path(folder) / "x.mp4", pipe.config.fps) as writer,
    ):
        stream = subject.stream(pipe, decode_pixels=not beside)
        chunks = decode_ahead(stream) if beside else stream
        found = rates(subject, chunks, blocks, lambda chunk: writer.write(chunk.frames))
        stream.close()
    return {**found, "decodes_beside": beside}


def prompt_to_pixel(subject: Subject, pipe: StreamVidPipeline) -> dict[str, Any]:
    """Seconds from a prompt to the first frames made with it in the viewer's hands: asked at random moments of a block.

    Every prompt is a new one; with random weights there is no text encoder and they count as encoded.
    """
    stream, dice = subject.stream(pipe), random.Random(0)
    for _ in range(warm_up(subject.configuration)):
        began = time.perf_counter()
        next(stream)
    block = time.perf_counter() - began
    waits = []
    for text in NEXT_PROMPTS:
        asked: list[Any] = []

        def ask(text=text, asked=asked) -> None:
            asked.extend((time.perf_counter(), stream.prompt([text] * subject.configuration.batch)))

        timer = threading.Timer(dice.random() * block, ask)
        timer.start()
        while True:
            chunk = next(stream)
            settle(subject.device)
            if len(asked) == 2 and asked[1].chunk == chunk.index:
                break
        waits.append(time.perf_counter() - asked[0])
        timer.join()
    stream.close()
    ordered = sorted(waits)
    return {
        "prompts": len(waits),
        "encoded_before": subject.model is None,
        "p50_ms": round(1000 * statistics.median(waits), 1),
        "p95_ms": round(1000 * ordered[int(0.95 * len(ordered))], 1),
    }


def roofline(plan: Plan, record: dict[str, Any]) -> dict[str, Any]:
    """What was reached of the device's rates, measured in the same run: of products and of traffic, by stage."""
    device, counts = plan.device, plan.counts
    denoise = record["denoise"]["block_p50_ms"] / 1000
    both = record["denoise_decode"]["block_p50_ms"] / 1000
    rows = {}
    for name, meter, seconds in (
        ("denoise", counts.denoise, denoise),
        ("decode", counts.decode, both - denoise),
    ):
        rows[name] = {
            "seconds_per_block": round(seconds, 5),
            "gflop_per_block": round(meter.flop / 1e9, 3),
            "traffic_mb_per_block": round(meter.bytes / 1e6, 3),
            "share_of_products": round(meter.flop / seconds / device.flop_rate, 4),
            "share_of_bandwidth": round(meter.bytes / seconds / device.byte_rate, 4),
        }
    return {
        "product_gflops": round(device.flop_rate / 1e9, 2),
        "bandwidth_gb_per_s": round(device.byte_rate / 1e9, 2),
        "call_us": round(1e6 * device.call_seconds, 3),
        **rows,
    }


def prediction(plan: Plan, record: dict[str, Any]) -> dict[str, Any]:
    """What `streamvid plan` said before anything was loaded, beside what came of it."""
    predicted = {"peak_memory_mb": round(plan.peak / 1e6, 1), "fps": round(plan.frames_per_second, 2)}
    found: dict[str, Any] = {"predicted": predicted, "bytes": plan.rows}
    found["memory_ratio"] = round(record["peak_memory_mb"] / predicted["peak_memory_mb"], 3)
    if "denoise_decode" in record:
        found["fps_ratio"] = round(record["denoise_decode"]["fps"] / predicted["fps"], 3)
    return found


def variants(configuration: Configuration) -> Iterator[tuple[str, Any, Configuration]]:
    """Axis, value and configuration of everything that `scaling` measures."""
    method = configuration.method
    block, sink = method.frames_per_block, method.sink
    for axis, values in (
        ("window", sorted({sink + 2 * block, method.window, 21})),
        ("sink", [0, block, 2 * block]),
    ):
        for value in values:
            try:
                yield axis, value, replace(configuration, method=method.with_overrides({axis: value}))
            except UserError:  # the method cannot be played so
                continue
    rows, columns = configuration.spec.unit
    for share in (0.5, 1.0, 1.5):
        height, width = (
            max(unit, round(share * size / unit) * unit)
            for size, unit in ((configuration.height, rows), (configuration.width, columns))
        )
        yield "size", f"{width}x{height}", replace(configuration, height=height, width=width)
    for batch in (1, 2, 4):
        yield "batch", batch, replace(configuration, batch=batch)


def scaling(subject: Subject, pipe: StreamVidPipeline, blocks: int) -> dict[str, dict[str, Any]]:
    """Block time and bytes of keys and values along every axis, the others as configured."""
    found: dict[str, dict[str, Any]] = {}
    for axis, value, configuration in variants(subject.configuration):
        stream = subject.stream(pipe, configuration)
        row = rates(subject, stream, blocks, configuration=configuration)
        found.setdefault(axis, {})[str(value)] = {
            "block_p50_ms": row["block_p50_ms"],
            "cache_mb": round(stream.cache.bytes / 1e6, 2),
        }
    return found


def long_stream(subject: Subject, pipe: StreamVidPipeline, length: int) -> dict[str, Any]:
    """Block time and memory early and late in a stream, medians of `LONG_SPAN` blocks.

    Memory is that of the stream alone, from block 50 and at the end. Times are those of its last blocks and of a second
    stream's from block 50 on, taken in turns: whatever else the machine does meanwhile would make any two blocks differ.
    """
    old, memory = subject.stream(pipe, blocks=length), []
    for _ in range(length - LONG_SPAN):
        next(old)
        held = torch.cuda.memory_allocated(subject.device) if subject.device.type == "cuda" else resident()
        memory.append(held / 1e6)
    young = subject.stream(pipe)
    for _ in range(50):
        next(young)
    times = [[seconds_of_next(subject, stream) for stream in (young, old)] for _ in range(LONG_SPAN)]
    early, late = map(statistics.median, zip(*times, strict=True))
    memory_early, memory_late = (
        statistics.median(memory[span]) for span in (slice(50, 50 + LONG_SPAN), slice(-LONG_SPAN, None))
    )
    return {
        "blocks": length,
        "block_ms_at_50": round(1000 * early, 2),
        "block_ms_at_end": round(1000 * late, 2),
        "time_ratio": round(late / early, 4),
        "memory_mb_at_50": round(memory_early, 1),
        "memory_mb_at_end": round(memory_late, 1),
        "memory_ratio": round(memory_late / memory_early, 4),
    }


def seconds_of_next(subject: Subject, stream: Iterator[Chunk]) -> float:
    """Of one block, the device's last work included."""
    began = time.perf_counter()
    next(stream)
    settle(subject.device)
    return time.perf_counter() - began


FIRST_FRAME = """
import time; began = {began!r}
from streamvid.models import load_pipeline
pipe = load_pipeline({model!r}, {device!r}, {dtype!r}, {decoder!r}, {weights!r}, compiled={compiled!r}); loaded = time.time()
next(pipe.stream({prompt!r})); done = time.time()
print(done - loaded, done - began)
"""


def first_frame(subject: Subject, runs: int = 3) -> dict[str, float]:
    """Seconds to the first chunk in a fresh process, after loading and from the start; medians."""
    results = []
    for _ in range(runs):
        program = FIRST_FRAME.format(
            began=time.time(),
            model=subject.model,
            device=str(subject.device),
            dtype=str(subject.configuration.dtype).removeprefix("torch."),
            decoder=subject.configuration.decoder,
            weights=subject.configuration.weights,
            compiled=subject.compiled,
            prompt=PROMPT,
        )
        output = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True
        ).stdout
        results.append([float(value) for value in output.split()[-2:]])
    after_load, from_start = (statistics.median(column) for column in zip(*results, strict=True))
    return {"after_load_s": round(after_load, 2), "from_process_start_s": round(from_start, 2)}
