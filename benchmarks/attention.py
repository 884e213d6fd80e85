"""The windowed-attention kernel against PyTorch's dense attention at equal work, with each option on.

    python -m benchmarks.attention --device cuda --dtype bfloat16 --output benchmarks/results/attention.json
    python -m benchmarks.attention --device cuda --dtype bfloat16 --tune        # other tiles, the fastest last
    python -m benchmarks.attention --tiled --output benchmarks/results/attention_tiled.json     # on a CPU: where tiles pay

On a CPU it runs the kernel's PyTorch twin on a small window; with `--tiled` it compares attention by tiles in bfloat16 with
PyTorch's own, on one thread in CPU time, in turns.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from streamvid.kernels.attention import BACKENDS, chosen, unavailable
from streamvid.kernels.windowed import Part, windowed_attention

from streamvid.bench import write_record
from streamvid.io.manifest import environment
from streamvid.kv_storage import codecs
from streamvid.machine import in_turns, machine, settle
from streamvid.rope import rotation

# block of 3 frames, window of 12, 1560 tokens a frame, 12 heads of 128; on a CPU something small
SIZES = {"cuda": (3, 12, 1560, 12, 128), "cpu": (3, 12, 16, 4, 64)}

# queries and keys: of windows, of a prompt (512 keys); each with heads of 64 and 128 channels
TILED_SIZES = (
    (192, 768),
    (128, 8192),
    (256, 4096),
    (512, 512),
    (512, 2048),
    (1024, 1024),
    (4680, 512),
    (1170, 4680),
    (4680, 18720),
)


def milliseconds(run: Callable[[], object], device: str, repeats: int) -> float:
    """Median of several runs after three to warm up."""
    times = []
    for index in range(repeats + 3):
        began = time.perf_counter()
        run()
        settle(torch.device(device))
        if index >= 3:
            times.append(time.perf_counter() - began)
    return 1000 * statistics.median(times)


def options(k, v, tokens: int, frames: int, device: str) -> dict[str, list[Part]]:
    """The same window as one or several parts, with one option each."""
    runs = torch.tensor([[0, frames * tokens]], dtype=torch.int32, device=device)
    plain = Part(k, v, runs, tokens)
    shuffled = [[frame * tokens, tokens] for frame in reversed(range(frames))]
    (k8, k_scale), (v8, v_scale) = (codecs("int8")[0].encode(x) for x in (k, v))
    return {
        "plain": [plain],
        "frames in any order": [
            plain._replace(runs=torch.tensor(shuffled, dtype=torch.int32, device=device))
        ],
        "bias": [plain._replace(bias=torch.linspace(-1, 0, frames, device=device))],
        "gain": [plain._replace(gain=torch.linspace(0.9, 1, frames, device=device))],
        "phase": [plain._replace(phase=rotation(range(frames), 1, 1, k.shape[-1], device))],
        "int8": [Part(k8, v8, runs, tokens, k_scale=k_scale, v_scale=v_scale)],
        "two parts": [
            Part(x, y, torch.tensor([[0, x.shape[1]]], dtype=torch.int32, device=device), tokens)
            for x, y in ((k[:, : 3 * tokens], v[:, : 3 * tokens]), (k[:, 3 * tokens :], v[:, 3 * tokens :]))
        ],
    }


def measure(device: str, dtype: torch.dtype, repeats: int) -> dict:
    own, frames, tokens, heads, dim = SIZES[device]
    q, k, v = (torch.randn(1, n * tokens, heads, dim, device=device).to(dtype) for n in (own, frames, frames))
    flop = 4 * q.shape[1] * k.shape[1] * heads * dim
    dense = {
        name: milliseconds(lambda name=name: BACKENDS[name].attend(q, k, v), device, repeats)
        for name in ("sdpa", "flash", "xformers")
        if not unavailable(name) and not BACKENDS[name].refuses(q, k, v)
    }
    best = min(dense.values())
    backend = "triton" if device == "cuda" else "reference"
    rows = {}
    for name, parts in options(k, v, tokens, frames, device).items():
        spent = milliseconds(lambda parts=parts: windowed_attention(q, parts, None, backend), device, repeats)
        rows[name] = {"ms": spent, "tflops": flop / spent / 1e9, "share_of_best_dense": best / spent}
    return {"shape": SIZES[device], "backend": backend, "dense_ms": dense, "windowed": rows}


def tune(dtype: torch.dtype, repeats: int) -> None:
    """Every tile on the plain window, fastest last."""
    from streamvid.kernels.windowed_triton import Tile, attend

    own, frames, tokens, heads, dim = SIZES["cuda"]
    q, k, v = (torch.randn(1, n * tokens, heads, dim, device="cuda").to(dtype) for n in (own, frames, frames))
    parts = options(k, v, tokens, frames, "cuda")["plain"]
    results = []
    for sizes in itertools.product((64, 128), (32, 64, 128), (4, 8), (2, 3, 4)):
        try:
            spent = milliseconds(lambda sizes=sizes: attend(q, parts, Tile(*sizes)), "cuda", repeats)
        except Exception as error:  # too much shared memory
            print(sizes, type(error).__name__)
            continue
        results.append((spent, Tile(*sizes)))
    for spent, tile in sorted(results, reverse=True):
        print(f"{spent:8.3f} ms  {tile}")


def tiled_against_sdpa(rounds: int) -> dict:
    """GFLOP/s of both at every size, of a large product beside them, and what `auto` takes."""
    torch.set_num_threads(1)
    square = torch.randn(2048, 2048).bfloat16()
    rows = []
    for dim, (queries, keys) in itertools.product((64, 128), TILED_SIZES):
        q, k, v = (torch.randn(1, size, 2, dim).bfloat16() for size in (queries, keys, keys))
        routes = {name: partial(BACKENDS[name].attend, q, k, v) for name in ("tiled", "sdpa")}
        seconds = in_turns({**routes, "product": lambda: square @ square}, rounds)
        product = 2 * 2048**3 / seconds.pop("product") / 1e9
        gflops = {name: round(4 * q.numel() * keys / spent / 1e9, 1) for name, spent in seconds.items()}
        sizes = {"queries": queries, "keys": keys, "dim": dim}
        rows.append({**sizes, "gflops": gflops, "product_gflops": round(product, 1), "auto": chosen(q, k, v)})
    return {"dtype": "bfloat16", "sizes": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu", choices=list(SIZES))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--tiled", action="store_true")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    dtype = getattr(torch, given.dtype)
    if given.tune:
        return tune(dtype, given.repeats)
    if given.tiled:
        measured = tiled_against_sdpa(given.repeats)
    else:
        measured = {"dtype": given.dtype, **measure(given.device, dtype, given.repeats)}
    about = {**environment(given.device), "machine": machine(torch.device(given.device))}
    write_record({**measured, **about}, given.output)


if __name__ == "__main__":
    main()
