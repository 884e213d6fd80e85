"""Files of weights: safetensors or PyTorch pickles of plain tensors, whole or in shards."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from streamvid.errors import UserError


def read_state_dict(path: str | Path) -> dict[str, Any]:
    """Everything in a checkpoint: a safetensors or torch file, or a folder with one (or with shards and their index).

    Raises:
        UserError: there is no such file, or it is damaged or no checkpoint.
    """
    merged: dict[str, Any] = {}
    for file in _weight_files(Path(path)):
        merged.update(_read_safetensors(file) if file.suffix == ".safetensors" else _read_torch(file))
    return merged


def _weight_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(
            f"checkpoint {path} does not exist: give a .safetensors, .pt or .pth file or its folder"
        )
    indices = sorted(path.glob("*.safetensors.index.json"))
    if indices:
        shards = sorted(set(read_json(indices[0]).get("weight_map", {}).values()))
        absent = [shard for shard in shards if not (path / shard).is_file()]
        if absent or not shards:
            raise UserError(
                f"{indices[0]} names shards that are not there ({shortened(absent)}): download them all"
            )
        return [path / shard for shard in shards]
    files = sorted(path.glob("*.safetensors")) or sorted([*path.glob("*.pt"), *path.glob("*.pth")])
    if len(files) != 1:
        found = shortened([file.name for file in files]) if files else "none"
        raise UserError(
            f"folder {path} should hold one checkpoint but has {len(files)} ({found}): name the file"
        )
    return files


def _read_safetensors(file: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{file} is truncated or not a safetensors file ({error}): download it again or check its name"
        ) from None


def _read_torch(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        archive = stream.read(2) == b"PK"  # the older format cannot be mapped into memory
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=archive)
    except pickle.UnpicklingError as error:
        if re.search(r"GLOBAL|Unsupported (global|class)", str(error)):
            raise UserError(
                f"{file} holds Python objects besides tensors and might run code when read: "
                "ask its author for a safetensors file"
            ) from None
        raise UserError(
            f"{file} is not a checkpoint: give a .safetensors, .pt or .pth file of weights"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError) as error:
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise UserError(f"{file} is truncated or not a checkpoint ({reason}): download it again") from None
    if not isinstance(content, dict):
        raise UserError(
            f"{file} holds a {type(content).__name__} and not a state dict: give a file of weights"
        )
    return content


def read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{file} cannot be read as JSON ({error}): download it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} does not hold a JSON object: download it again")
    return content


def shortened(names: list[str], count: int = 4) -> str:
    """The first of many names, for error messages."""
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")
