"""The state of a stream, in memory and in a file.

Whatever a stream remembers is offered by the part that owns it, in one protocol:

    state = part.state_dict()       # dicts, lists, tuples, numbers, texts and tensors: references, not copies
    part.load_state_dict(state)     # of a part made with the same options; copies into its own buffers

`fork`, `save`, `load_stream`, `reset` and the undoing of a failed block use nothing else. A stream file is one safetensors
file: tensors, and everything else as JSON in its metadata. Nothing in it is ever executed.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from streamvid.errors import UserError
from streamvid.io.files import output_error, prepare_output_file, replace_atomically

if TYPE_CHECKING:
    from streamvid.pipelines.pipeline_streamvid import StreamVidPipeline
    from streamvid.stream import VideoStream

MODES = ("exact", "compact")
FORMAT = "streamvid-stream-1"
PARTS = (  # what an exact continuation needs to be the same
    ("dtype", "in another precision"),
    ("decoder", "with another decoder"),
    ("weights", "with other weights"),
)


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


# --- a stream -------------------------------------------------------------------------------------------------------


def save_stream(stream: VideoStream, path: str | Path, mode: str = "exact") -> Path:
    """What `VideoStream.save` does."""
    if mode not in MODES:
        raise UserError(f"mode = {mode!r} is not known: choose one of {', '.join(MODES)}")
    target = prepare_output_file(path)
    with stream.between_chunks():
        tree = {
            "mode": mode,
            "model": _identity(stream.pipe),
            "settings": stream.settings(),
            "asked": stream.mailbox.state_dict(),
            "state": stream.state_dict(compact=mode == "compact"),
        }
        tensors: dict[str, torch.Tensor] = {}
        text = json.dumps(_pack(tree, tensors, ""))
    metadata = {"format": FORMAT, "stream": text, "checksum": str(_checksum(text, tensors))}
    try:
        with replace_atomically(target) as temporary:
            save_file(tensors, temporary, metadata)
    except OSError as error:
        raise output_error(error, target) from error
    except SafetensorError as error:  # its way to report a full disk
        raise UserError(
            f"output '{target}': it cannot be written ({error}); choose another place."
        ) from error
    return target


def load_stream(pipe: StreamVidPipeline, path: str | Path) -> VideoStream:
    """What `StreamVidPipeline.load_stream` does."""
    from streamvid.stream import VideoStream

    tree = _read(Path(path))
    try:
        _check_model(Path(path), tree, _identity(pipe))
        device, dtype = pipe.transformer.device, pipe.transformer.dtype

        def place(tensor: torch.Tensor) -> torch.Tensor:
            # a compact file may have been saved in another precision
            return tensor.to(device, dtype if str(tensor.dtype) == tree["model"]["dtype"] else None)

        stream = VideoStream.from_settings(pipe, tree["settings"])
        stream.load_state_dict(map_tensors(tree["state"], place))
        stream.mailbox.load_state_dict(tree["asked"])
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
        if isinstance(error, UserError):
            raise
        raise _damaged(Path(path)) from error
    return stream


def _check_model(path: Path, tree: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """A stream goes on with the model that it was made with."""
    there = tree["model"]
    for part in ("transformer", "vae"):
        for name in {**there[part], **here[part]}:
            saved, own = there[part].get(name), here[part].get(name)
            if saved != own:
                raise UserError(
                    f"stream file '{path}' was saved from another model ({part} {name} = {saved}, here {own}): "
                    "load it with the model that made it"
                )
    if tree["mode"] == "exact":
        for name, what in PARTS:
            if there.get(name) != here[name]:
                raise UserError(
                    f"stream file '{path}' was saved exactly and {what} ({there.get(name)}, here {here[name]}): "
                    "load the same model, or save the stream with mode = 'compact'"
                )


def _identity(pipe: StreamVidPipeline) -> dict[str, Any]:
    """What tells a model from others: its sizes, precision, and some numbers out of every weight."""
    digest = hashlib.sha256()
    for part in (pipe.transformer, pipe.vae):
        for name, parameter in part.named_parameters():
            digest.update(f"{name} {tuple(parameter.shape)}".encode())
            if type(parameter.data) is torch.Tensor:  # quantised ones are known by the module's other weights
                row = (
                    parameter.detach()[(0,) * (parameter.ndim - 1)] if parameter.ndim else parameter.detach()
                )
                digest.update(row.float().cpu().numpy().tobytes())
    vae = pipe.vae.config
    return {
        "transformer": {k: v for k, v in pipe.transformer.config.items() if not k.startswith("_")},
        "vae": {k: vae[k] for k in ("z_dim", "base_dim", "dim_mult", "temperal_downsample", "patch_size")},
        "dtype": str(pipe.transformer.dtype),
        "decoder": type(pipe.decoder).__name__,
        "weights": digest.hexdigest()[:16],
    }


def options_of(thing: Any) -> dict[str, Any]:
    """The fields of a dataclass, so that `type(thing)(**options)` is equal to it."""
    return {f.name: getattr(thing, f.name) for f in fields(thing)}


# --- trees and files ------------------------------------------------------------------------------------------------
# JSON has no tuples, no keys but texts and no tensors: `{"tuple": [...]}`, `{"pairs": [...]}` and
# `{"tensor": name, "order": [...]}` stand for them, and `{"dict": {...}}` for a dictionary.


def _pack(tree: Any, tensors: dict[str, torch.Tensor], name: str) -> Any:
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
            return {"dict": {key: _pack(value, tensors, inside + key) for key, value in tree.items()}}
        pairs = enumerate(tree.items())
        return {"pairs": [[_pack(k, {}, ""), _pack(v, tensors, f"{inside}{i}")] for i, (k, v) in pairs]}
    if isinstance(tree, (list, tuple)):
        items = [_pack(value, tensors, f"{inside}{i}") for i, value in enumerate(tree)]
        return {"tuple": items} if isinstance(tree, tuple) else items
    raise UserError(
        f"{name.split('.')[-1]} = {tree!r} cannot be saved: give the stream one that is made by name"
    )


def _unpack(packed: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """The inverse of `_pack`."""
    if isinstance(packed, list):
        return [_unpack(item, tensors) for item in packed]
    if not isinstance(packed, dict):
        return packed
    if "tensor" in packed:
        order = packed["order"]
        return tensors[packed["tensor"]].permute([order.index(axis) for axis in range(len(order))])
    if "dict" in packed:
        return {key: _unpack(value, tensors) for key, value in packed["dict"].items()}
    if "pairs" in packed:
        return {_unpack(key, tensors): _unpack(value, tensors) for key, value in packed["pairs"]}
    return tuple(_unpack(item, tensors) for item in packed["tuple"])


def _checksum(text: str, tensors: Mapping[str, torch.Tensor]) -> int:
    """CRC-32 of everything in the file."""
    checksum = zlib.crc32(text.encode())
    for name in sorted(tensors):
        checksum = zlib.crc32(tensors[name].flatten().view(torch.uint8).numpy().data, checksum)
    return checksum


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"stream file '{path}' does not exist: give one that `stream.save` has written")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if "stream" in metadata and metadata.get("format") != FORMAT:
                raise UserError(
                    f"stream file '{path}' has format {metadata.get('format')}, this version reads {FORMAT}: save it anew"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
        if metadata.get("checksum") != str(_checksum(metadata["stream"], tensors)):
            raise _damaged(path)
        return _unpack(json.loads(metadata["stream"]), tensors)
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, RuntimeError) as error:
        if isinstance(error, UserError):
            raise
        raise _damaged(path) from error


def _damaged(path: Path) -> UserError:
    return UserError(f"stream file '{path}' is damaged or no stream file: save the stream again")
