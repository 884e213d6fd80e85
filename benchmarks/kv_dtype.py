"""What smaller keys and values cost: videos of every `kv_dtype` against those of the native one, same noise.

    python -m benchmarks.kv_dtype --output benchmarks/results/kv_dtype.json

Per dtype: PSNR of the decoded video against the native one in the two seconds that end at 5 s and at the end, mean and worst
of all prompts; the share of attributes that the probe finds right at the end; bytes of the embedded model's cache, and of
Wan2.1 1.3B's with the same method and with a window of 21 (`self_forcing`). A stream feeds on what it made, so any change,
however small, grows with time: the row `other kernel` (native, with attention written out instead of fused) shows how far
rounding alone leads.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from streamvid.decoding import decode, decoder_state
from streamvid.evaluation.method_table import WARM_UP, WINDOW, cases
from streamvid.evaluation.stored import release_of
from streamvid.io.files import replace_atomically
from streamvid.io.manifest import environment
from streamvid.kv_storage import KV_DTYPES
from streamvid.method_list import WAN
from streamvid.methods import load_method
from streamvid.models import DEFAULT_MODEL, load_pipeline, load_probe
from streamvid.world.probe import WINDOW_FRAMES
from streamvid.world.scene import ATTRIBUTES

EARLY = 20  # latent frames: the window that ends at 5 s
OTHER_KERNEL = "other kernel"


def psnr(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB of videos `[B, T, H, W, 3]` in 0..255, one number each, at most 99."""
    error = (a.float() - b.float()).square().flatten(1).mean(1)
    return (10 * (255**2 / error.clamp_min(1e-9)).log10()).clamp_max(99.0)


@torch.no_grad()
def windows(pipe, texts: Sequence[str], method: str, kv_dtype: str, blocks: int) -> dict[str, Any]:
    """Streams of all texts: their two windows, `[B, T, H, W, 3]` in 0..255, and the bytes of their cache per video."""
    kernel = "reference" if kv_dtype == OTHER_KERNEL else "auto"
    overrides = {"kv_dtype": "native" if kv_dtype == OTHER_KERNEL else kv_dtype}
    stream = pipe.stream(
        list(texts), method=method, overrides=overrides, blocks=blocks, attention=kernel, decode_pixels=False
    )
    latents = torch.cat([chunk.latents for chunk in stream], 2)
    seen: dict[str, Any] = {"bytes": stream.cache.bytes // len(texts)}
    for name, stop in (("early", min(EARLY, latents.shape[2])), ("end", latents.shape[2])):
        pieces = [
            decode(pipe.vae, video.to(pipe.vae.dtype), decoder_state(pipe.vae))
            for video in latents[:, :, max(0, stop - WARM_UP - WINDOW) : stop].split(1)
        ]
        frames = torch.cat(pieces)[:, :, -WINDOW_FRAMES:].float().add(1).mul(127.5).round()
        seen[name] = frames.byte().permute(0, 2, 3, 4, 1)
    return seen


def measure(model: str, prompts: int, blocks: int, method: str | None = None) -> dict[str, Any]:
    """All dtypes, native first."""
    pipe, probe = load_pipeline(model), load_probe(model)
    method = method or pipe.config.method
    chosen = cases(prompts)
    labels = torch.tensor([case["labels"][0] for case in chosen])
    rows, native = [], None
    for kv_dtype in (*KV_DTYPES, OTHER_KERNEL):
        began = time.monotonic()
        seen = windows(pipe, [case["texts"][0] for case in chosen], method, kv_dtype, blocks)
        native = native or seen
        row: dict[str, Any] = {"kv_dtype": kv_dtype, "bytes": seen["bytes"]}
        for name in ("early", "end"):
            ratio = psnr(seen[name], native[name])
            row[f"psnr_{name}"] = {
                "mean": round(float(ratio.mean()), 1),
                "worst": round(float(ratio.min()), 1),
            }
        if probe is not None:
            told = probe.classify(seen["end"])
            right = torch.stack([told[attribute] for attribute in ATTRIBUTES], -1) == labels
            row["adherence_end"] = round(float(right.float().mean()), 4)
        if kv_dtype != OTHER_KERNEL:
            row["bytes_wan_1.3B"] = {
                name: WAN["1.3B"].cache_bytes(load_method(name, {"kv_dtype": kv_dtype}))
                for name in dict.fromkeys([method, "self_forcing"])
            }
        rows.append(row)
        print(f"{kv_dtype}: {time.monotonic() - began:.0f} s {row}", flush=True)
    return {
        "command": f"python -m benchmarks.kv_dtype --prompts {prompts} --blocks {blocks}",
        "model": model,
        "release": release_of(model),
        "method": method,
        "prompts": prompts,
        "seconds": blocks * load_method(method).frames_per_block * pipe.temporal_ratio / pipe.config.fps,
        "environment": environment(),
        "rows": rows,
    }


def table(result: dict[str, Any]) -> str:
    """The measurement as a Markdown table."""
    native = result["rows"][0]
    lines = [
        f"| `kv_dtype` | PSNR at 5 s (worst) | at {result['seconds']:g} s (worst) | adherence | bytes | "
        + " | ".join(f"Wan2.1 1.3B, `{name}`" for name in native["bytes_wan_1.3B"])
        + " |",
        "|---" * (5 + len(native["bytes_wan_1.3B"])) + "|",
    ]
    for row in result["rows"]:
        own = row is native
        early, end = (
            "-" if own else f"{row[name]['mean']} dB ({row[name]['worst']})"
            for name in ("psnr_early", "psnr_end")
        )
        share = f"{row['bytes'] / 1e3:.0f} kB ({row['bytes'] / native['bytes']:.2f})"
        large = [
            f"{row['bytes_wan_1.3B'][name] / 1e9:.2f} GB ({row['bytes_wan_1.3B'][name] / of:.2f})"
            if "bytes_wan_1.3B" in row
            else "-"
            for name, of in native["bytes_wan_1.3B"].items()
        ]
        adherence = f"{row['adherence_end']:.3f}" if "adherence_end" in row else "-"
        lines.append(f"| {row['kv_dtype']} | {early} | {end} | {adherence} | {share} | {' | '.join(large)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--method", help="default: the model's")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--blocks", type=int, default=20)
    parser.add_argument("--output", default="out/kv_dtype.json")
    options = parser.parse_args(arguments)
    result = measure(options.model, options.prompts, options.blocks, options.method)
    output = Path(options.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    with replace_atomically(output) as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()
