"""Scripts that people paste or load in the browser: texts, never names of files on the server."""

from __future__ import annotations

from typing import Any

from streamvid.methods import OPTION_NAMES
from streamvid.script import Script, parse_script, to_dict, to_yaml


def read_script(text: str, kind: str = "auto") -> Script:
    """A script in any form; a mistake raises `UserError` with its line."""
    return parse_script(text, guess_kind(text) if kind == "auto" else kind, options=OPTION_NAMES)


def guess_kind(text: str) -> str:
    """The form of a text at hand, as `parse_script` names them."""
    lines = [line for line in text.splitlines() if line.strip()]
    if lines and lines[0].lstrip().startswith("{"):
        return ".jsonl" if len(lines) > 1 and all(line.startswith("{") for line in lines) else ".json"
    if any(line.lstrip().startswith("shots:") for line in lines):
        return ".yaml"
    return "line" if len(lines) <= 1 else ".txt"


def describe_script(script: Script) -> dict[str, Any]:
    """What the editor shows."""
    settings = to_dict(script)
    shots = settings.pop("shots")
    return {
        "title": script.title,
        "yaml": to_yaml(script),
        "seconds": script.duration,
        "settings": settings,
        "shots": [{**plain, "start": shot.start} for plain, shot in zip(shots, script.shots, strict=True)],
        "notes": list(script.notes),
    }
