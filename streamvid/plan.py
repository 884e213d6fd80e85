"""`streamvid plan`: what a configuration takes of a device, before anything is loaded, and what to give up to make it fit.

    plan = make_plan(configuration, device)
    plan.peak, plan.fits, plan.frames_per_second
    for step, smaller in ladder(configuration, device): ...

Bytes and products are counted (streamvid.costs), so they follow every option. Seconds are an estimate: every call takes as
long as the slower of its products and its traffic at the device's rates, and a little besides.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from streamvid.costs import Configuration, Counts, count
from streamvid.errors import UserError
from streamvid.machine import Device, resident
from streamvid.method_list import format_bytes
from streamvid.method_tables import aligned

# Measured with two models (tests/test_plan.py): compiled kernels of oneDNN, and what glibc keeps of freed activations, as a
# share of their peak, without and with threads that decode beside.
CPU_LIBRARIES, KEPT, KEPT_BESIDE = 30e6, 0.5, 1.4
GPU_PROCESS = 0.6e9  # context and libraries' workspaces of a CUDA process: usual, not measured here


@dataclass(frozen=True)
class Plan:
    """A configuration on a device.

    Attributes:
        process: bytes of the process itself: Python and libraries, on a GPU the driver's context.
    """

    configuration: Configuration
    device: Device
    counts: Counts
    process: int

    @property
    def rows(self) -> dict[str, int]:
        """Bytes by what they are for; their sum is the most that is held at once, but for a text encoder freed early."""
        return {"process": self.process, **self.counts.bytes, "kept by the allocator": self.kept}

    @property
    def kept(self) -> int:
        """Freed memory that the allocator does not give back: an estimate."""
        if self.device.kind != "cpu":
            return 0
        return int((KEPT_BESIDE if self.configuration.beside else KEPT) * self.counts.small)

    @property
    def peak(self) -> int:
        return self.process + self.counts.peak + self.kept

    @property
    def fits(self) -> bool:
        return self.peak <= self.device.memory

    @property
    def seconds(self) -> dict[str, float]:
        """Estimate for a block: denoising with its context pass, and decoding."""
        rates = self.device.flop_rate, self.device.byte_rate, self.device.call_seconds
        return {name: getattr(self.counts, name).seconds(*rates) for name in ("denoise", "decode")}

    @property
    def frames_per_second(self) -> float:
        """Estimate, of one video."""
        return self.counts.frames / self.configuration.batch / sum(self.seconds.values())

    def to_dict(self) -> dict[str, Any]:
        """For JSON: bytes, products, traffic and seconds."""
        counts = self.counts
        return {
            **described(self.configuration),
            "device": self.device._asdict(),
            "bytes": self.rows,
            "peak_bytes": self.peak,
            "fits": self.fits,
            "frames_per_block": counts.frames // self.configuration.batch,
            "flop_per_block": {"denoise": counts.denoise.flop, "decode": counts.decode.flop},
            "traffic_per_block": {"denoise": counts.denoise.bytes, "decode": counts.decode.bytes},
            "estimated_seconds_per_block": self.seconds,
            "estimated_frames_per_second": self.frames_per_second,
        }


def described(configuration: Configuration) -> dict[str, Any]:
    """A configuration in plain words and numbers."""
    return {
        "model": configuration.spec.name,
        "method": configuration.method.name,
        "window": configuration.method.window,
        "kv_dtype": configuration.method.kv_dtype,
        "width": configuration.width,
        "height": configuration.height,
        "batch": configuration.batch,
        "dtype": str(configuration.dtype).removeprefix("torch."),
        "weights": configuration.weights,
        "decoder": configuration.decoder,
        "text_encoder": configuration.text_encoder,
    }


def make_plan(configuration: Configuration, device: Device) -> Plan:
    """Count a configuration for a device."""
    return Plan(configuration, device, count(configuration), process_bytes(device.kind))


def process_bytes(kind: str) -> int:
    """Of a process before it loads a model: of this one with its libraries, and what they will take."""
    return resident() + int(CPU_LIBRARIES) if kind == "cpu" else int(GPU_PROCESS)


# --- what to give up --------------------------------------------------------------------------------------------------


def ladder(configuration: Configuration, device: Device) -> Iterator[tuple[str, Configuration]]:
    """What can be given up, one after the other, each on top of those before it: the options to give, and the result.

    In the order of what it costs the picture: nothing (where the text encoder is), next to nothing (INT8 keys and values,
    8-bit weights), memory of the past (a smaller window), sharpness (tiny decoder), size.
    """
    now = configuration
    if now.text_encoder == "device":
        place = "free" if device.kind == "cpu" else "cpu"
        now = replace(now, text_encoder=place)
        yield f"--text-encoder {place}", now
    if now.method.kv_dtype == "native" and now.method.budget is None:
        now = _with_method(now, kv_dtype="int8")
        yield "--kv-dtype int8", now
    if now.weights == "native":
        now = replace(now, weights="int8" if device.kind == "cpu" else "fp8")
        yield f"--weights {now.weights}", now
    for smaller in _smaller_windows(now):
        now = smaller
        yield f"--set window={now.method.window}", now
    if now.decoder == "exact" and now.spec.tiny_decoder is not None:
        now = replace(now, decoder="tiny")
        yield "--decoder tiny", now
    rows, columns = now.spec.unit
    for share in (0.75, 0.5):
        height, width = (
            max(unit, round(share * size / unit) * unit)
            for size, unit in ((configuration.height, rows), (configuration.width, columns))
        )
        now = replace(now, height=height, width=width)
        yield f"--size {width}x{height}", now


def _with_method(configuration: Configuration, **changes: Any) -> Configuration:
    return replace(configuration, method=configuration.method.with_overrides(changes))


def _smaller_windows(configuration: Configuration) -> Iterator[Configuration]:
    """Two thirds of the window, then the least that holds the sink, one block of past and the block itself."""
    method = configuration.method
    block = method.frames_per_block
    least = method.sink + 2 * block
    for window in (max(least, 2 * method.window // 3 // block * block), least):
        if window < configuration.method.window:
            try:
                configuration = _with_method(configuration, window=window)
            except UserError:  # a budget or jointly denoised blocks need the window
                return
            yield configuration


def first_that_fits(configuration: Configuration, device: Device) -> tuple[list[str], Plan] | None:
    """The first rung of the ladder that fits, with the options that lead there; None: none does."""
    given: dict[str, str] = {}
    for options, smaller in ladder(configuration, device):
        name, _, value = options.partition(" ")
        given[f"--set {value.split('=')[0]}" if name == "--set" else name] = options
        plan = make_plan(smaller, device)
        if plan.fits:
            return list(given.values()), plan
    return None


# --- text -------------------------------------------------------------------------------------------------------------


def format_plan(plan: Plan) -> str:
    """A table of bytes, the verdict, and the estimate of speed."""
    facts, device = described(plan.configuration), plan.device
    text = {"cpu": " (the text encoder stays on the CPU)", "free": " (the text encoder is freed first)"}
    lines = [
        "{model}, {method}, {width}x{height}, batch {batch}, {dtype}, weights {weights}, decoder {decoder}".format(
            **facts
        )
        + text.get(plan.configuration.text_encoder, ""),
        f"on {device.name}",
        "",
        *aligned([[name, format_bytes(size)] for name, size in plan.rows.items() if size]),
        f"at most {format_bytes(plan.peak)} at once; there are {format_bytes(device.memory)}: "
        + ("fits" if plan.fits else "does not fit"),
        "",
    ]
    seconds, counts, fps = plan.seconds, plan.counts, plan.frames_per_second
    each = " and ".join(
        f"{name} {getattr(counts, name).flop / 1e12:.3g} TFLOP, {format_bytes(getattr(counts, name).bytes)} of traffic"
        for name in seconds
    )
    lines += [
        f"a block of {counts.frames // plan.configuration.batch} frames: {each}",
        f"about {fps:.3g} frames/s, {fps / plan.configuration.spec.fps:.2g}x real time "
        f"(an estimate: denoise {1000 * seconds['denoise']:.3g} ms, decode {1000 * seconds['decode']:.3g} ms, at "
        f"{device.flop_rate / 1e12:.3g} TFLOP/s and {device.byte_rate / 1e9:.3g} GB/s: {device.source})",
    ]
    return "\n".join(lines)
