"""What a stream remembers, as trees of plain values and tensors.

Whatever a stream remembers is offered by the part that owns it, in one protocol:

    state = part.state_dict()       # dicts, lists, tuples, numbers, texts and tensors: references, not copies
    part.load_state_dict(state)     # of a part made with the same options; copies into its own buffers

`fork`, `save`, `load_stream`, `reset` and the undoing of a failed block use nothing else (streamvid.stream_file).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import torch

from streamvid.errors import UserError


def map_tensors(tree: Any, change: Callable[[torch.Tensor], Any]) -> Any:
    """`tree` with every tensor in it changed."""
    if isinstance(tree, torch.Tensor):
        return change(tree)
    if isinstance(tree, Mapping):
        return {key: map_tensors(value, change) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(map_tensors(value, change) for value in tree)
    return tree


def copy_into(buffers: Mapping[str, torch.Tensor], saved: Mapping[str, torch.Tensor]) -> None:
    """Copy saved tensors into the buffers of the same names.

    Raises:
        ValueError: a tensor has another shape.
    """
    for name, tensor in saved.items():
        if tensor.shape != buffers[name].shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {tuple(buffers[name].shape)}")
        buffers[name].copy_(tensor)


def options_of(thing: Any) -> dict[str, Any]:
    """The fields of a dataclass, so that `type(thing)(**options)` is equal to it."""
    return {f.name: getattr(thing, f.name) for f in fields(thing)}


# --- trees as JSON and tensors ---------------------------------------------------------------------------------------
# JSON has no tuples, no keys but texts and no tensors: `{"tuple": [...]}`, `{"pairs": [...]}` and
# `{"tensor": name, "order": [...]}` stand for them, and `{"dict": {...}}` for a dictionary.


def pack(tree: Any, tensors: dict[str, torch.Tensor], name: str) -> Any:
    """`tree` as JSON; copies of its tensors go to `tensors`, dense, with the order of their dimensions in memory."""
    if tree is None or isinstance(tree, (bool, int, float, str)):
        return tree
    if isinstance(tree, torch.Tensor):
        # a convolution may round differently where the layout in memory differs
        order = sorted(range(tree.ndim), key=lambda axis: -tree.stride()[axis])
        tensors[name] = tree.detach().permute(order).cpu().clone(memory_format=torch.contiguous_format)
        return {"tensor": name, "order": order}
    inside = f"{name}." if name else ""
    if isinstance(tree, Mapping):
        if all(isinstance(key, str) for key in tree):
            return {"dict": {key: pack(value, tensors, inside + key) for key, value in tree.items()}}
        pairs = enumerate(tree.items())
        return {"pairs": [[pack(k, {}, ""), pack(v, tensors, f"{inside}{i}")] for i, (k, v) in pairs]}
    if isinstance(tree, (list, tuple)):
        items = [pack(value, tensors, f"{inside}{i}") for i, value in enumerate(tree)]
        return {"tuple": items} if isinstance(tree, tuple) else items
    raise UserError(
        f"{name.split('.')[-1]} = {tree!r} cannot be saved: give the stream one that is made by name"
    )


def unpack(packed: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """The inverse of `pack`."""
    if isinstance(packed, list):
        return [unpack(item, tensors) for item in packed]
    if not isinstance(packed, dict):
        return packed
    if "tensor" in packed:
        order = packed["order"]
        return tensors[packed["tensor"]].permute([order.index(axis) for axis in range(len(order))])
    if "dict" in packed:
        return {key: unpack(value, tensors) for key, value in packed["dict"].items()}
    if "pairs" in packed:
        return {unpack(key, tensors): unpack(value, tensors) for key, value in packed["pairs"]}
    return tuple(unpack(item, tensors) for item in packed["tuple"])
