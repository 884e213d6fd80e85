"""What a device can do, measured here or taken from its vendor: products, memory traffic, calls."""

from __future__ import annotations

import ctypes
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch

from streamvid.meter import SMALL

M_MMAP_THRESHOLD = -3  # of glibc's mallopt


class Device(NamedTuple):
    """Rates of a device for one number format.

    Attributes:
        kind: cpu, cuda or mps.
        memory: bytes that a process may fill.
        flop_rate: multiplications and additions of large matrix products per second.
        byte_rate: bytes read and written per second.
        call_seconds: what every kernel costs besides.
        source: where the rates come from.
    """

    name: str
    kind: str
    memory: float
    flop_rate: float
    byte_rate: float
    call_seconds: float
    source: str


class Card(NamedTuple):
    """A vendor's numbers: GB, dense teraflops in bfloat16 (with float32 sums) and in float32, GB/s."""

    name: str
    memory: float
    bfloat16: float
    float32: float
    bandwidth: float


CARDS = {
    "rtx3090": Card("GeForce RTX 3090", 24, 71, 35.6, 936),
    "rtx4090": Card("GeForce RTX 4090", 24, 165, 82.6, 1008),
    "rtx5090": Card("GeForce RTX 5090", 32, 209, 104.8, 1792),
    "l4": Card("L4", 24, 121, 30.3, 300),
    "l40s": Card("L40S", 48, 362, 91.6, 864),
    "a100": Card("A100 80GB", 80, 312, 19.5, 2039),
    "h100": Card("H100 SXM", 80, 989, 67, 3350),
    "h200": Card("H200 SXM", 141, 989, 67, 4800),
    "b200": Card("B200", 180, 2250, 80, 8000),
}
# Shares of a vendor's numbers that are reached: with these the estimate for Self Forcing on an H100 is that of its own code
# in FlashDreams' table (570 ms per 12 frames), and those of LongLive, Reward Forcing and Krea are near what is published.
PRODUCT_SHARE, BANDWIDTH_SHARE, GPU_CALL_SECONDS = 0.5, 0.8, 3e-6


def card(name: str, dtype: torch.dtype) -> Device:
    """A card that need not be here, by its vendor's numbers."""
    known = CARDS[name]
    teraflops = known.float32 if dtype == torch.float32 else known.bfloat16
    source = f"the vendor's numbers, {PRODUCT_SHARE} of the products and {BANDWIDTH_SHARE} of the bandwidth"
    return Device(
        known.name,
        "cuda",
        known.memory * 1e9,
        teraflops * 1e12 * PRODUCT_SHARE,
        known.bandwidth * 1e9 * BANDWIDTH_SHARE,
        GPU_CALL_SECONDS,
        source,
    )


def measured(device: torch.device, dtype: torch.dtype) -> Device:
    """The device here, in about a second, as busy as it now is."""
    return Device(
        device_name(device),
        device.type,
        free_memory(device),
        product_rate(device, dtype),
        byte_rate(device),
        call_seconds(device),
        "measured now, as busy as the machine is",
    )


def product_rate(device: torch.device, dtype: torch.dtype, side: int | None = None) -> float:
    """Multiplications and additions per second of a large matrix product."""
    side = side or (1536 if device.type == "cpu" else 8192)
    square = torch.randn(side, side, device=device).to(dtype)
    return 2 * side**3 / fastest(lambda: square @ square, device)


def byte_rate(device: torch.device, size: int = 2**24) -> float:
    """Bytes read and written per second by a copy of `size` float32 numbers."""
    source = torch.zeros(size, device=device)
    target = torch.empty_like(source)
    return 2 * size * source.itemsize / fastest(lambda: target.copy_(source), device)


def call_seconds(device: torch.device, calls: int = 1000) -> float:
    """Seconds of a call that has next to nothing to do."""
    small = torch.zeros(16, device=device)

    def run() -> None:
        for _ in range(calls):
            small.add_(1)

    return fastest(run, device) / calls


def fastest(run: Callable[[], Any], device: torch.device, repeats: int = 3) -> float:
    """Seconds of the fastest of some runs after one to warm up."""
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        run()
        settle(device)
        times.append(time.perf_counter() - began)
    return min(times[1:])


def in_turns(routes: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of this thread's CPU time per call of each route, called in turns: a busy machine disturbs little."""
    times: dict[str, list[float]] = {name: [] for name in routes}
    for _ in range(rounds + 1):
        for name, route in routes.items():
            began = time.thread_time()
            route()
            times[name].append(time.thread_time() - began)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def settle(device: torch.device) -> None:
    """Wait until the device has done what it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


# --- memory -----------------------------------------------------------------------------------------------------------


def resident() -> int:
    """Bytes of memory that this process holds, on the CPU's side."""
    return psutil.Process().memory_info().rss


def peak_memory(device: torch.device) -> int:
    """Most bytes held so far: of the process on a CPU, of PyTorch's tensors on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.partition("VmHWM:")[2].split()[0])
    except (OSError, IndexError):
        import resource

        unit = 1 if platform.system() == "Darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak(device: torch.device) -> int:
    """Begin `peak_memory` anew (of a process: on Linux only, and without what it has freed); the bytes held now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    _trim()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return resident()


def _trim() -> None:
    """Give the system what this process has freed; with glibc only."""
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)


@contextmanager
def giving_back() -> Iterator[None]:
    """Freed memory goes back to the system at once, so that a process holds what it uses; slower, and with glibc only."""
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt"):
        yield
        return
    _trim()
    library.mallopt(M_MMAP_THRESHOLD, 2**16)
    try:
        yield
    finally:
        library.mallopt(M_MMAP_THRESHOLD, SMALL)


def free_memory(device: torch.device) -> int:
    """Bytes that this process may hold."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return psutil.virtual_memory().available + resident()


# --- names ------------------------------------------------------------------------------------------------------------


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return processor()


def processor() -> str:
    """The processor's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def machine(device: torch.device) -> dict[str, Any]:
    """What a measurement has to be read with: processor, cores, threads, memory, card, load."""
    facts: dict[str, Any] = {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "load_average": round(os.getloadavg()[0], 2),
    }
    if device.type == "cuda":
        facts["card"] = torch.cuda.get_device_name(device)
    return facts
