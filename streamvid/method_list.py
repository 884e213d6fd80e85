"""The list of methods, and how many bytes their keys and values take for a model of some shape.

print(format_methods(WAN["1.3B"]))
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from streamvid.context import ContextCache
from streamvid.errors import UserError
from streamvid.method_tables import aligned, budget_sum, window_options, window_sum
from streamvid.methods import Method, load_method, method_names
from streamvid.models import choose_device, choose_dtype, resolve_model

PUBLISHED_LEVELS = 4  # denoising steps of the published students


@dataclass(frozen=True)
class Shape:
    """Sizes of a model that decide how many bytes its keys and values take.

    Attributes:
        name: with the size of the picture.
        grid: token rows and columns of a latent frame.
        levels: denoising steps of its scheduler.
    """

    name: str
    layers: int
    heads: int
    head_dim: int
    grid: tuple[int, int]
    dtype: torch.dtype = torch.bfloat16
    levels: int = PUBLISHED_LEVELS

    @property
    def frame_bytes(self) -> int:
        """Of the keys and values of one latent frame: layers x 2 x tokens x width x bytes of a number."""
        width = self.heads * self.head_dim
        return self.layers * 2 * self.grid[0] * self.grid[1] * width * self.dtype.itemsize

    def cache_bytes(self, method: Method) -> int:
        """Of all keys and values that a stream's cache holds: it is made, without memory, and asked."""
        cache = ContextCache(
            window_options(method, self.levels),
            self.layers,
            self.heads,
            self.head_dim,
            self.grid,
            latent_shape=(1, 1, 1),
            dtype=self.dtype,
            device="meta",
            **method.cache_options(),
        )
        return cache.bytes


WAN = {
    "1.3B": Shape("Wan2.1 1.3B at 480x832", 30, 12, 128, (30, 52)),
    "14B": Shape("Wan2.1 14B at 480x832", 40, 40, 128, (30, 52)),
    "5B": Shape("Wan2.2 5B at 704x1280", 30, 24, 128, (22, 40)),
}


def model_shape(model: str) -> Shape:
    """The shape of an embedded model or of a model folder, from its configurations: no weights are read.

    Raises:
        UserError: no such model on this machine.
    """
    folder = Path(resolve_model(model))
    if not folder.is_dir():
        raise UserError(
            f"model = {model!r} is not on this machine: give an embedded model or a folder, or --wan"
        )
    try:
        index = json.loads((folder / "model_index.json").read_text())
        transformer, vae, scheduler = (
            json.loads((folder / file).read_text())
            for file in ("transformer/config.json", "vae/config.json", "scheduler/scheduler_config.json")
        )
        _, *patch = transformer["patch_size"]
        ratio = 2 ** len(vae["temperal_downsample"]) * (vae.get("patch_size") or 1)
        grid = index["height"] // ratio // patch[0], index["width"] // ratio // patch[1]
        return Shape(
            f"{model} at {index['height']}x{index['width']}",
            transformer["num_layers"],
            transformer["num_attention_heads"],
            transformer["attention_head_dim"],
            grid,
            choose_dtype("auto", choose_device()),
            len(scheduler["denoising_steps"]),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"model = {model!r} has configurations that cannot be read ({type(error).__name__}: {reason}): "
            "make it anew with `streamvid convert`"
        ) from error


def _sampler(method: Method) -> str:
    """Sampler with what is special about it."""
    if method.micro_steps > 1:
        return f"{method.sampler}, {method.micro_steps} micro-steps"
    return method.sampler if method.solver == "renoise" else f"{method.sampler}, {method.solver}"


def format_methods(shape: Shape) -> str:
    """All presets: their arithmetic, their bytes for a model of this shape, and their sources."""
    titles = [
        "method",
        "sampler",
        "block",
        "window",
        "budget",
        "positions",
        "at a switch",
        "window K/V",
        "cache",
    ]
    table, sources = [titles], []
    for name in method_names():
        method = load_method(name)
        options = window_options(method, shape.levels)
        jointly = f"{options.joint_blocks} x " if options.joint_blocks > 1 else ""
        table.append(
            [
                name,
                _sampler(method),
                f"{jointly}{options.frames_per_block}",
                window_sum(options),
                budget_sum(options),
                method.positions,
                method.transition,
                format_bytes(options.window * shape.frame_bytes),
                format_bytes(shape.cache_bytes(method)),
            ]
        )
        sources.append([name, method.source])
    explained = (
        f"for {shape.name}: {shape.layers} layers, width {shape.heads * shape.head_dim}, "
        f"{shape.grid[0] * shape.grid[1]} tokens per latent frame, {str(shape.dtype).split('.')[-1]}\n"
        "numbers are latent frames; window = sink + recent + block(s) being denoised; budget = sink + chosen + recent\n"
        "window K/V: keys and values of a full window; cache: all that one stream keeps (also raw or averaged sinks,\n"
        "a second buffer to compress into, and frames that only the context pass of the rolling sampler sees)"
    )
    return "\n".join([*aligned(table), "", explained, "", *aligned(sources)])


def format_bytes(number: float) -> str:
    """Decimal, three digits: `6.04 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 999.5:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"
