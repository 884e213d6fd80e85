"""Decoding and denoising of the embedded model against plain baselines of the same run.

    python -m benchmarks.parts --output benchmarks/results/parts.json

All on one thread, in CPU seconds of that thread (so that a busy machine disturbs little), in turns, medians.
Decoding: a plain `vae.decode` (diffusers, as loaded), streamvid.decoding, and a tiny decoder if one is given with its PSNR.
Denoising: benchmarks.naive, which does what the releases do, with the weights as loaded; a stream with separate context
passes; a stream as it is; one without `torch.inference_mode` around its forwards; with `--compile` one whose blocks are
compiled, after the seconds that this takes. A profile tells where the time of a stream as it is goes.
"""

from __future__ import annotations

import argparse
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile

from streamvid.allocator import keep_freed_memory
from streamvid.bench import PROMPT, write_record
from streamvid.checkpoints import load_transformer, load_vae
from streamvid.decoding import decode_to_bytes, decoder_state, latent_statistics
from streamvid.io.manifest import environment
from streamvid.machine import in_turns, machine
from streamvid.methods import load_method
from streamvid.models import DEFAULT_MODEL, load_pipeline, resolve_model
from streamvid.noise import SeededNoise
from streamvid.tiny_decoder import load_tiny_decoder
from streamvid.training.vae_stage import reconstruction_quality

from .naive import naive_blocks

WARM_UP = 6
KINDS = {
    "products": ("aten::addmm", "aten::mm", "aten::bmm"),
    "attention": ("aten::_scaled_dot_product_flash_attention_for_cpu",),
}


def milliseconds(seconds: dict[str, float]) -> dict[str, float]:
    return {name: round(1000 * value, 2) for name, value in seconds.items()}


@torch.no_grad()
def decoding(pipe, plain_vae, tiny, rounds: int) -> dict[str, Any]:
    """Milliseconds of CPU per block of 12 frames."""
    latents = torch.cat(
        [c.latents for c in pipe.stream(PROMPT, blocks=3, decode_pixels=False)], 2
    )  # the steady state needs a past
    block = latents[:, :, -3:]
    mean, std = latent_statistics(plain_vae, latents.to(plain_vae.dtype))
    raw = (latents.to(plain_vae.dtype) * std + mean)[:, :, -4:]

    def plain():
        return (
            plain_vae.decode(raw).sample[:, :, 1:].float().add(1).mul(127.5).byte().numpy()
        )  # 4: 1 + 12 frames

    def streamed(decoder):
        state = decoder_state(decoder)
        decode_to_bytes(decoder, latents[:, :, :-3], state)
        return lambda: decode_to_bytes(decoder, block, state.fork())

    routes = {"plain": plain, "exact": streamed(pipe.vae)}
    if tiny is not None:
        routes["tiny"] = streamed(tiny)
    result: dict[str, Any] = milliseconds(in_turns(routes, rounds))
    result["plain"] = round(result["plain"] * 12 / 13, 2)  # it also makes the frame before
    result["exact_faster_than_plain"] = round(result["plain"] / result["exact"], 3)
    if tiny is not None:
        for name, decoder in (("exact", None), ("tiny", tiny)):
            quality = reconstruction_quality(pipe.vae, clips=6, frames=81, decoder=decoder)
            result[f"psnr_{name}"] = quality["psnr"]
    return result


def denoising(pipe, folder: Path, rounds: int, compiled: bool) -> dict[str, Any]:
    """Milliseconds of CPU per block of a full window, with LongLive's absolute positions."""

    def another_pipeline() -> Any:
        transformer = load_transformer(folder, dtype=pipe.transformer.dtype)
        return type(pipe)(**{**pipe.components, "transformer": transformer}, **sizes)

    sizes = {name: pipe.config[name] for name in ("height", "width", "fps", "method")}
    method = load_method("longlive")
    blocks = WARM_UP + rounds + 1
    shape = (pipe.transformer.config.in_channels, *pipe.latent_size(None, None))
    options: dict[str, Any] = {"method": method, "blocks": blocks, "decode_pixels": False}
    loops: dict[str, Any] = {
        "separate": pipe.stream(PROMPT, context_pass="separate", **options),
        "stream": pipe.stream(PROMPT, **options),
        "no_inference_mode": pipe.stream(PROMPT, **options),
    }
    plain = another_pipeline()
    with torch.no_grad():
        prompt_kv = plain.transformer.prompt_kv(pipe.encode_prompt(PROMPT).to(pipe.transformer.dtype))
    loops["naive"] = naive_blocks(plain, method, prompt_kv, SeededNoise([0], shape), blocks)
    seconds = {}
    if compiled:
        other = another_pipeline()
        other.transformer.compile_repeated_blocks()
        loops["compiled"] = other.stream(PROMPT, **options)
    for name, loop in loops.items():
        began = time.perf_counter()
        for _ in range(WARM_UP):
            next(loop)
        seconds[name] = time.perf_counter() - began
    routes: dict[str, Any] = {name: partial(next, loop) for name, loop in loops.items()}
    routes["no_inference_mode"] = mock.patch.object(torch, "inference_mode", nullcontext)(
        routes["no_inference_mode"]
    )
    result: dict[str, Any] = milliseconds(in_turns(routes, rounds))
    for name in sorted(loops.keys() - {"naive"}):
        result[f"{name}_faster_than_naive"] = round(result["naive"] / result[name], 3)
    if compiled:
        result["compilation_s"] = round(seconds["compiled"] - seconds["stream"], 1)
    return result


def profiled(pipe, blocks: int) -> dict[str, float]:
    """Milliseconds of CPU per block by what they are for, and operations, by PyTorch's profiler."""
    stream = pipe.stream(PROMPT, method=load_method("longlive"), decode_pixels=False)
    for _ in range(WARM_UP):
        next(stream)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        for _ in range(blocks):
            next(stream)
    found = dict.fromkeys((*KINDS, "other", "operations"), 0.0)
    for row in seen.key_averages():
        kind = next((kind for kind, names in KINDS.items() if row.key in names), "other")
        found[kind] += row.self_cpu_time_total / 1000 / blocks
        found["operations"] += row.count / blocks
    return {name: round(value, 1) for name, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tiny", help="folder of a tiny decoder")
    parser.add_argument("--compile", action="store_true", help="also a transformer whose blocks are compiled")
    parser.add_argument("--output", default="benchmarks/results/parts.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()  # as every command
    pipe = load_pipeline(options.model)
    folder = Path(resolve_model(options.model))
    plain_vae = load_vae(folder, dtype=pipe.vae.dtype)
    tiny = None if options.tiny is None else load_tiny_decoder(options.tiny, pipe.vae.dtype)
    command = f"python -m benchmarks.parts --model {options.model} --rounds {options.rounds}"
    result = {
        "command": command
        + (f" --tiny {options.tiny}" if options.tiny else "")
        + " --compile" * options.compile,
        **environment("cpu"),
        "machine": machine(torch.device("cpu")),
        "decoding_ms_per_block": decoding(pipe, plain_vae, tiny, options.rounds),
        "denoising_ms_per_block": denoising(pipe, folder, options.rounds, options.compile),
        "profile_ms_per_block": profiled(pipe, options.rounds),
    }
    write_record(result, options.output)


if __name__ == "__main__":
    main()
