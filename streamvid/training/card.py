"""The model card that a training leaves beside its weights: what was trained, how, for how long, what it measured."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import ModelCard, ModelCardData

from streamvid.machine import processor

CARD = "README.md"


def write_card(config: Mapping[str, Any], processes: int) -> Path:
    """The card of a finished run, in the folder of its weights: `output`/model/README.md.

    Args:
        config: of `streamvid.training.run.load_config`.
        processes: data-parallel processes of the run.
    """
    output = Path(config["trainer"]["output"])
    log, validation = _last(output / "log.jsonl"), _last(output / "validation.jsonl")
    work = [
        f"{config['trainer']['steps']} steps",
        f"{log.get('seconds', 0.0) / 60:.1f} minutes",
        f"{processes} process{'es' if processes > 1 else ''}",
        torch.cuda.get_device_name() if torch.cuda.is_available() else processor(),
        f"streamvid {version('streamvid')}, torch {torch.__version__}",
    ]
    parts = [f"Trained by `streamvid train`, stage `{config['kind']}`: {', '.join(work)}."]
    for title, row in (("last step", log), ("last validation", validation)):
        if row:
            numbers = [f"{name} {value:g}" for name, value in row.items() if name not in ("step", "seconds")]
            parts.append(f"Measured at its {title}: {', '.join(numbers)}.")
    parts.append(f"Configuration:\n\n```yaml\n{yaml.safe_dump(dict(config), sort_keys=False)}```")
    return save_card(output / "model", output.name, parts)


def write_assembled_card(output: Path, folders: Sequence[Path]) -> Path:
    """The card of a model put together: those of its parts, one after the other."""
    parts = ["Put together by `streamvid train`, stage `assemble`, of these parts."]
    for folder in folders:
        if (folder / CARD).is_file():
            parts.append(ModelCard.load(folder / CARD).text.strip().replace("# ", "## ", 1))
        else:
            parts.append(f"## {folder.name}\n\nCame without a card.")
    return save_card(output, output.name, parts)


def save_card(folder: Path, title: str, parts: Sequence[str]) -> Path:
    """Write a card that model hubs can read."""
    about = ModelCardData(library_name="diffusers", pipeline_tag="text-to-video", tags=["streamvid"])
    body = "\n\n".join([f"# {title}", *parts])
    ModelCard(f"---\n{about.to_yaml()}\n---\n{body}\n").save(folder / CARD)
    return folder / CARD


def _last(path: Path) -> dict[str, Any]:
    rows = path.read_text().splitlines() if path.is_file() else []
    return json.loads(rows[-1]) if rows else {}
