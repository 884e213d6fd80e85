"""Parts of a long measurement as files, so that a run that is stopped goes on, and what a result was made with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from streamvid.io.files import replace_atomically
from streamvid.models import resolve_model


def stored(path: Path, settings: Mapping[str, Any], make: Callable[[], Any]) -> Any:
    """What `make()` gives (as JSON has it), from the file where it is there already and was made with the same settings."""
    found = read_stored(path, settings)
    return write_stored(path, settings, make()) if found is None else found


def read_stored(path: Path, settings: Mapping[str, Any]) -> Any:
    """A part, or None where there is none or one of other settings."""
    try:
        kept = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return kept["made"] if kept.get("settings") == json.loads(json.dumps(settings)) else None


def write_stored(path: Path, settings: Mapping[str, Any], made: Any) -> Any:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replace_atomically(path) as temporary:
        temporary.write_text(json.dumps({"settings": settings, "made": made}) + "\n")
    return made


def fingerprint(*modules: nn.Module) -> str:
    """Of all weights, so that parts of a model that was trained on are not taken for those of the new one."""
    digest = hashlib.sha256()
    for module in modules:
        for name, tensor in module.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def release_of(model: str) -> str:
    """Digest of the files that hold a local model's weights: a stored result says with it what was measured."""
    digest = hashlib.sha256()
    for part in ("text_encoder", "transformer", "vae"):
        for path in sorted((Path(resolve_model(model)) / part).glob("*.safetensors")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def of_other_weights(result: Mapping[str, Any], model: str) -> list[str]:
    """A paragraph for the page of a result that was measured with other weights than the model has now; else nothing."""
    if result.get("release") == release_of(model):
        return []
    return [f"Measured with earlier weights of {model}, not with those that it has now.", ""]
