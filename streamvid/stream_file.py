"""A stream in a file: one safetensors file of tensors, and everything else as JSON in its metadata.

Nothing in it is ever executed. The state is that of the protocol in streamvid.saving.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from streamvid.control import PromptChange
from streamvid.errors import UserError
from streamvid.io.files import output_error, prepare_output_file, replace_atomically
from streamvid.methods import Method
from streamvid.noise import noise_from, noise_state
from streamvid.saving import map_tensors, options_of, pack, unpack
from streamvid.timeline import Timeline, TimelineShot

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


def settings_of(stream: VideoStream) -> dict[str, Any]:
    """What `new_stream` makes such a stream of."""
    timeline = stream.timeline
    return {
        "method": options_of(stream.method),
        "first": options_of(stream.current),
        "latent_size": stream.latent_size,
        "noise": noise_state(stream.noise),
        "fps": stream.fps,
        "timeline": timeline and {**options_of(timeline), "shots": [options_of(s) for s in timeline.shots]},
        "blocks": stream.blocks,
        "attention": stream.attention,
        "decode_pixels": stream.decode_pixels,
        "context_pass": stream.context_pass,
    }


def new_stream(pipe: StreamVidPipeline, settings: Mapping[str, Any]) -> VideoStream:
    """A stream at its beginning."""
    from streamvid.stream import VideoStream

    timeline = settings["timeline"]
    if timeline is not None:
        shots = tuple(TimelineShot(**shot) for shot in timeline["shots"])
        timeline = Timeline(**{**timeline, "shots": shots})
    return VideoStream(
        pipe,
        Method(**settings["method"]),
        PromptChange(**settings["first"]),
        settings["latent_size"],
        noise_from(settings["noise"], pipe.transformer.device),
        settings["fps"],
        timeline,
        settings["blocks"],
        settings["attention"],
        settings["decode_pixels"],
        settings.get("context_pass", "separate"),  # files of before it was an option
    )


def save_stream(stream: VideoStream, path: str | Path, mode: str = "exact") -> Path:
    """What `VideoStream.save` does."""
    if mode not in MODES:
        raise UserError(f"mode = {mode!r} is not known: choose one of {', '.join(MODES)}")
    target = prepare_output_file(path)
    with stream.between_chunks():
        tree = {
            "mode": mode,
            "model": _identity(stream.pipe),
            "settings": settings_of(stream),
            "asked": stream.mailbox.state_dict(),
            "state": stream.state_dict(compact=mode == "compact"),
        }
        tensors: dict[str, torch.Tensor] = {}
        text = json.dumps(pack(tree, tensors, ""))
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
    tree = _read(Path(path))
    try:
        _check_model(Path(path), tree, _identity(pipe))
        device, dtype = pipe.transformer.device, pipe.transformer.dtype

        def place(tensor: torch.Tensor) -> torch.Tensor:
            # a compact file may have been saved in another precision
            return tensor.to(device, dtype if str(tensor.dtype) == tree["model"]["dtype"] else None)

        stream = new_stream(pipe, tree["settings"])
        stream.load_state_dict(map_tensors(tree["state"], place))
        stream.mailbox.load_state_dict(tree["asked"])
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
        if isinstance(error, UserError):
            raise
        raise _damaged(Path(path)) from error
    return stream


def _check_model(path: Path, tree: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """A stream goes on with the model that it was made with."""
    there = _plain(tree["model"])
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
    for part in dict.fromkeys((pipe.transformer, pipe.vae, pipe.decoder)):
        for name, parameter in part.named_parameters():
            digest.update(f"{name} {tuple(parameter.shape)}".encode())
            if type(parameter.data) is torch.Tensor:  # quantised ones are known by the module's other weights
                row = (
                    parameter.detach()[(0,) * (parameter.ndim - 1)] if parameter.ndim else parameter.detach()
                )
                digest.update(row.float().cpu().numpy().tobytes())
    vae = pipe.vae.config
    identity = {
        "transformer": {k: v for k, v in pipe.transformer.config.items() if not k.startswith("_")},
        "vae": {k: vae[k] for k in ("z_dim", "base_dim", "dim_mult", "temperal_downsample", "patch_size")},
        "dtype": str(pipe.transformer.dtype),
        "decoder": type(pipe.decoder).__name__,
        "weights": digest.hexdigest()[:16],
    }
    return _plain(identity)


def _plain(identity: dict[str, Any]) -> dict[str, Any]:
    """With lists for tuples: a part that comes out of a folder has lists."""
    return json.loads(json.dumps(identity))


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
        return unpack(json.loads(metadata["stream"]), tensors)
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, RuntimeError) as error:
        if isinstance(error, UserError):
            raise
        raise _damaged(path) from error


def _damaged(path: Path) -> UserError:
    return UserError(f"stream file '{path}' is damaged or no stream file: save the stream again")
