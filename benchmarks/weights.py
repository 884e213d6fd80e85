"""A forward at the shapes of Wan 1.3B, with random weights and few layers: how fast, how large, in which number format.

    python -m benchmarks.weights --layers 2 --output benchmarks/results/weights.json                  # on an idle machine
    python -m benchmarks.weights --layers 1 --size 416x240 --rounds 2                                 # a minute
    python -m benchmarks.weights --layers 30 --device cuda --output benchmarks/results/weights_cuda.json

A block of three latent frames against a full window of LongLive. Two bars, in bfloat16: the forward reaches 70% of the rate
of a large matrix product of the same run; and it holds no more than weights, caches and one layer's activations (what the
modules of a layer and its two attentions put out, together). Then every format of streamvid.quantization; one that torchao
cannot run here is in the result with the reason. On a CPU one thread's CPU time counts, in turns, so that a busy machine
disturbs little.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from streamvid.bench import write_record
from streamvid.commands.configuration import parse_size
from streamvid.context import ContextCache
from streamvid.errors import UserError
from streamvid.io.manifest import environment
from streamvid.machine import fastest, giving_back, in_turns, machine, peak_memory, reset_peak, settle
from streamvid.meter import Meter, size_of
from streamvid.methods import load_method
from streamvid.quantization import WEIGHTS, quantise
from streamvid.specs import WAN_SPECS, random_weights

RATE_BAR = 0.7


@dataclass
class Problem:
    """One forward, ready to run: a block at the end of a full window."""

    model: Any
    cache: ContextCache
    inputs: dict[str, Any]

    def forward(self) -> None:
        self.model(**self.inputs, context=self.cache)

    @property
    def held(self) -> int:
        """Bytes of weights, keys and values."""
        prompt = self.inputs["prompt_kv"]
        return size_of(self.model.parameters()) + self.cache.bytes + sum(map(size_of, prompt))


@torch.no_grad()
def problem(layers: int, width: int, height: int, device: torch.device, weights: str = "native") -> Problem:
    torch.manual_seed(0)
    spec, method, dtype = WAN_SPECS["1.3B"], load_method("longlive"), torch.bfloat16
    model: Any = random_weights(spec.part("transformer", num_layers=layers), device, dtype)
    config = model.config
    latent = (config.in_channels, height // 8, width // 8)
    cache = ContextCache(
        method.window_options(),
        layers,
        config.num_attention_heads,
        config.attention_head_dim,
        model.token_grid(*latent[1:]),
        latent,
        dtype=dtype,
        device=device,
    )
    frames = method.frames_per_block
    x = torch.randn(1, latent[0], frames, *latent[1:], device=device).to(dtype)
    for _ in range(method.window // frames):
        plan = cache.planner.plan()
        cache.begin(plan)
        cache.commit(plan, x)
    for stored in (cache.keys, cache.values):
        stored.normal_()
    cache.begin(cache.planner.plan())
    text = torch.randn(1, config.text_len, config.text_dim, device=device).to(dtype)
    inputs = {
        "hidden_states": x,
        "timestep": torch.full((1, frames), 500.0, device=device),
        "prompt_kv": model.prompt_kv(text),
    }
    quantise(model, weights)
    return Problem(model, cache, inputs)


@torch.no_grad()
def counted(layers: int, width: int, height: int) -> tuple[int, int]:
    """Products of the forward, and bytes of one layer's activations."""
    meta = problem(layers, width, height, torch.device("meta"))
    sizes: list[int] = []
    block = meta.model.blocks[0]
    leaves = [module for module in block.modules() if not list(module.children())]
    hooks = [leaf.register_forward_hook(lambda *given: sizes.append(size_of([given[-1]]))) for leaf in leaves]
    with Meter() as meter:
        meta.forward()
    for hook in hooks:
        hook.remove()
    tokens = meta.inputs["hidden_states"].shape[2] * meta.cache.tokens_per_frame
    attended = 2 * tokens * meta.cache.keys.shape[-1] * meta.cache.keys.shape[-2] * meta.cache.keys.itemsize
    return meter.flop, sum(sizes) + attended


@torch.no_grad()
def memory(layers: int, width: int, height: int, device: torch.device) -> dict[str, Any]:
    """Most bytes of a second forward above what was there before it, beside one layer's activations."""
    ready = problem(layers, width, height, device)
    ready.forward()
    settle(device)
    with giving_back():
        before = reset_peak(device)
        ready.forward()
        settle(device)
        needed = peak_memory(device) - before
    _, layer = counted(layers, width, height)
    return {
        "weights_and_caches_mb": round(ready.held / 1e6, 1),
        "above_them_mb": round(needed / 1e6, 1),
        "one_layers_activations_mb": round(layer / 1e6, 1),
        "bar_reached": needed <= layer,
    }


@torch.no_grad()
def speed(
    layers: int, width: int, height: int, device: torch.device, rounds: int, side: int
) -> dict[str, Any]:
    """Rates of the forward in every format, of a large matrix product, and of what the forward is made of."""
    square = torch.randn(side, side, device=device).bfloat16()
    routes: dict[str, Any] = {"matrix": lambda: square @ square}
    parts = pieces(problem(layers, width, height, device))
    routes |= {name: run for name, (run, _) in parts.items()}
    found: dict[str, Any] = {}
    for name in WEIGHTS:
        try:
            ready = problem(layers, width, height, device, name)
            ready.forward()
        except (UserError, RuntimeError, AssertionError, NotImplementedError) as error:
            found[name] = {"cannot": " ".join(str(error).split())[:200]}
        else:
            routes[name] = ready.forward
    if device.type == "cpu":
        seconds = in_turns(routes, rounds)
    else:
        seconds = {name: fastest(route, device, rounds) for name, route in routes.items()}
    flop, _ = counted(layers, width, height)
    product = 2 * side**3 / seconds.pop("matrix")
    reached_by = {name: round(flop / seconds.pop(name) / 1e9, 1) for name, (_, flop) in parts.items()}
    for name, spent in seconds.items():
        found[name] = {
            "seconds": round(spent, 4),
            "gflops": round(flop / spent / 1e9, 1),
            "share_of_matrix": round(flop / spent / product, 3),
            "times_as_fast_as_native": round(seconds["native"] / spent, 3),
        }
    reached = found["native"]["share_of_matrix"] >= RATE_BAR
    return {
        "matrix_gflops": round(product / 1e9, 1),
        "gflops_of": reached_by,
        "bar": RATE_BAR,
        "bar_reached": reached,
        "formats": {name: found[name] for name in WEIGHTS},
    }


def pieces(ready: Problem) -> dict[str, tuple[Any, int]]:
    """The two products that a forward mostly consists of, each with its multiplications and additions."""
    layer, cache = ready.model.blocks[0].ffn.net[0].proj, ready.cache
    tokens = ready.inputs["hidden_states"].shape[2] * cache.tokens_per_frame
    x = torch.randn(1, tokens, layer.in_features, device=layer.weight.device).bfloat16()
    query, keys, values = x.unflatten(-1, cache.keys.shape[-2:]), cache.keys[0], cache.values[0]
    return {
        "linear layer": (lambda: layer(x), 2 * tokens * layer.weight.numel()),
        "attention": (lambda: cache.attention(query, keys, values), 4 * tokens * keys[0].numel()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--size", default="832x480", help="pixels, width x height")
    parser.add_argument("--matrix", type=int, default=4096, help="side of the large matrix product")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    device = torch.device(given.device)
    torch.set_num_threads(1)
    shape = (given.layers, *parse_size(given.size, WAN_SPECS["1.3B"]))
    command = (
        f"python -m benchmarks.weights --layers {given.layers} --size {given.size} --matrix {given.matrix}"
    )
    record = {
        "command": f"{command} --rounds {given.rounds} --device {given.device}",
        **environment(given.device),
        "machine": machine(device),
        "memory": memory(*shape, device),  # first: what a process has freed and kept would hide what it takes
        "speed": speed(*shape, device, given.rounds, given.matrix),
    }
    write_record(record, given.output)


if __name__ == "__main__":
    main()
