"""The list of methods, and how many bytes their keys and values take for a model of some shape.

print(format_methods(WAN["1.3B"]))
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from streamvid.context import ContextCache
from streamvid.method_tables import aligned, budget_sum, window_options, window_sum
from streamvid.methods import Method, load_method, method_names
from streamvid.models import choose_device, choose_dtype
from streamvid.specs import WAN_SPECS, ModelSpec, model_spec

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

    @staticmethod
    def of(spec: ModelSpec, dtype: torch.dtype) -> Shape:
        """Of a model at its own size."""
        config = spec.transformer
        return Shape(
            f"{spec.name} at {spec.height}x{spec.width}",
            config["num_layers"],
            config["num_attention_heads"],
            config["attention_head_dim"],
            (spec.height // spec.unit[0], spec.width // spec.unit[1]),
            dtype,
            len(spec.scheduler["denoising_steps"]),
        )


WAN = {
    size: replace(Shape.of(spec, torch.bfloat16), levels=PUBLISHED_LEVELS) for size, spec in WAN_SPECS.items()
}


def model_shape(model: str) -> Shape:
    """The shape of an embedded model or of a model folder, from its configurations: no weights are read.

    Raises:
        UserError: no such model on this machine.
    """
    return Shape.of(model_spec(model), choose_dtype("auto", choose_device()))


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
