"""From the name of a model to a pipeline: the embedded one, a local folder, or a hub id."""

from __future__ import annotations

import difflib
import json
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from streamvid.errors import UserError

if TYPE_CHECKING:
    from streamvid.pipelines.pipeline_streamvid import StreamVidPipeline

DEFAULT_MODEL = "diorama"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def embedded_models() -> dict[str, Path]:
    """Models shipped with the package: name to folder."""
    root = Path(str(resources.files("streamvid") / "embedded"))
    return {path.parent.name: path.parent for path in sorted(root.glob("*/model_index.json"))}


def resolve_model(name: str) -> str:
    """What `from_pretrained` takes: a folder, or a hub id (`owner/name`).

    Raises:
        UserError: neither an embedded model, nor a folder with a `model_index.json`, nor a hub id.
    """
    models = embedded_models()
    if name in models:
        return str(models[name])
    folder = Path(name)
    if folder.is_dir():
        if (folder / "model_index.json").is_file():
            return name
        raise UserError(
            f"model = {name!r} is a folder without model_index.json: make one with `streamvid convert`"
        )
    if folder.is_file():
        raise UserError(f"model = {name!r} is a single file: turn it into a folder with `streamvid convert`")
    parts = name.split("/")
    if len(parts) == 2 and all(part and not part.startswith(".") for part in parts):
        return name
    near = difflib.get_close_matches(name, models, 1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    raise UserError(
        f"model = {name!r} is not known{hint}: give one of {', '.join(models)}, a folder with model_index.json, or a hub id"
    )


def choose_device(name: str = "auto") -> torch.device:
    """The device to run on; `auto` prefers CUDA, then MPS, then the CPU.

    Raises:
        UserError: it does not exist here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device = {name!r} is not a device: give cpu, cuda, cuda:0 or mps") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device = {name!r} asks for CUDA, which is not available here: use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"device = {name!r} does not exist: there are {torch.cuda.device_count()} CUDA devices"
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"device = {name!r} is not available here: use --device cpu")
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The number format to run in; `auto` is bfloat16 where the device multiplies it fast, else float32.

    Raises:
        UserError: not a known name.
    """
    if name != "auto":
        if name not in DTYPES:
            raise UserError(f"dtype = {name!r} is not known: choose one of auto, {', '.join(DTYPES)}")
        return DTYPES[name]
    if device.type == "cpu":
        return torch.bfloat16 if cpu_multiplies_bfloat16() else torch.float32
    return torch.bfloat16


def cpu_multiplies_bfloat16() -> bool:
    """Whether this CPU has bfloat16 products (AVX512-BF16 or AMX)."""
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in names)


def load_pipeline(model: str = DEFAULT_MODEL, device: str = "auto", dtype: str = "auto") -> StreamVidPipeline:
    """Load a model's pipeline.

    Args:
        model: an embedded model, a folder, or a hub id.
        device, dtype: `auto` chooses (`choose_device`, `choose_dtype`).
    """
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    from streamvid.pipelines.pipeline_streamvid import StreamVidPipeline

    source, target = resolve_model(model), choose_device(device)
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    try:
        pipe = StreamVidPipeline.from_pretrained(source, dtype=choose_dtype(dtype, target))
    except UserError:
        raise
    except Exception as error:  # whatever the libraries raise for a broken or missing model
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"model = {model!r} cannot be loaded ({type(error).__name__}: {reason})") from error
    return pipe.to(target)


def describe_model(name: str) -> dict[str, Any]:
    """Facts of an embedded model: sizes, method, and what its card says in numbers."""
    folder = embedded_models()[name]
    index = json.loads((folder / "model_index.json").read_text())
    files = folder.rglob("*.safetensors")
    return {
        "name": name,
        "bytes": sum(path.stat().st_size for path in files),
        "size": f"{index['width']}x{index['height']} at {index['fps']:g} fps",
        "method": index["method"],
    }
