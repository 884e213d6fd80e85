"""Smaller weights of the transformer, by torchao: which formats there are, and which layers keep their own.

As published (LongLive 2, Krea): linear layers of the blocks are quantised; embeddings of text and time, the head, and layers
whose sides are no multiples of 16 stay as they are. Whether it is faster is measured by `python -m benchmarks.weights`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from streamvid.errors import UserError

# name -> torchao's configuration: weights alone, or with activations quantised as they come (dynamic)
WEIGHTS: dict[str, str | None] = {
    "native": None,
    "int8": "Int8WeightOnlyConfig",
    "int8_dynamic": "Int8DynamicActivationInt8WeightConfig",
    "fp8": "Float8WeightOnlyConfig",
    "fp8_dynamic": "Float8DynamicActivationFloat8WeightConfig",
}
SIDE = 16
SCALE_BYTES = 4


def quantised_layers(block: nn.Module) -> Iterator[nn.Linear]:
    """The layers of a block that are quantised."""
    for module in block.modules():
        if isinstance(module, nn.Linear) and not (module.in_features % SIDE or module.out_features % SIDE):
            yield module


def bytes_saved(block: nn.Module, weights: str) -> int:
    """Bytes that a block becomes smaller by: one per number is left, and a scale per output."""
    if weights == "native":
        return 0
    return sum(
        layer.weight.numel() * (layer.weight.itemsize - 1) - layer.out_features * SCALE_BYTES
        for layer in quantised_layers(block)
    )


def quantise(transformer: Any, weights: str) -> None:
    """Quantise a transformer's blocks in place.

    Raises:
        UserError: no such format, torchao is missing, or it cannot do this format on this device.
    """
    if weights not in WEIGHTS:
        raise UserError(f"weights = {weights!r} is not known: choose one of {', '.join(WEIGHTS)}")
    config = WEIGHTS[weights]
    if config is None:
        return
    try:
        import torchao.quantization as quantization
    except ImportError:
        raise UserError(
            f"weights = {weights} needs torchao: pip install 'streamvid[quantize]', or give native"
        ) from None
    chosen = {id(layer) for block in transformer.blocks for layer in quantised_layers(block)}
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            quantization.quantize_(
                transformer, getattr(quantization, config)(), filter_fn=lambda module, _: id(module) in chosen
            )
    except (AssertionError, RuntimeError, NotImplementedError, ValueError) as error:
        reason = " ".join(str(error).split())[:150]
        raise UserError(
            f"weights = {weights} cannot be had on {transformer.device} ({reason}): give native or int8"
        ) from error
