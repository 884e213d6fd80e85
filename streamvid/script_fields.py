"""Fields of a script: what each may hold, as checks of a document and as JSON Schema.

One table (`SCRIPT_FIELDS`, `SHOT_FIELDS`) drives both, and the documentation.
"""

from __future__ import annotations

import difflib
import math
import re
import unicodedata
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from streamvid.script_formats import Located, plain, problem, show

TRANSITIONS = ("cross_only", "recache", "flush", "blend", "shot", "cut")
"""Names of the prompt-switch policies that a shot's `transition` may ask for, options in brackets: `blend(8, slerp)`."""
OPTIONS_PATTERN = r"(\([a-z0-9_][a-z0-9_, ]*\))?"
TRANSITION_OPTIONS = {
    "recache": r"(causal|bidirectional)( *, *(keep|keep_once_full|reencode|reanchor))?",
    "blend": r"0*[1-9][0-9]*( *, *(lerp|slerp))?",
}
"""The options that a policy takes; one that is not here takes none."""
MAX_PROMPT_CHARACTERS = 2000
MIN_SECONDS = 0.001
"""Shortest length of a shot, in seconds, before snapping; also the tolerance between contradictory times."""
MAX_SECONDS = 1_000_000
"""Longest script, in seconds (eleven days)."""
TIME_DIGITS = 6
"""Times are kept to the microsecond, so that they survive being written and read as decimal numbers."""


@dataclass(frozen=True)
class FieldSpec:
    """What one field of a script file may hold; `minimum` and `maximum` are in `unit` and inclusive."""

    name: str
    kind: str
    """`text`, `number`, `integer`, `mapping` or `shots`."""
    help: str
    minimum: float = 0
    maximum: float = math.inf
    unit: str = ""
    longest: int = 1000
    """Largest number of characters of a text."""
    choices: tuple[str, ...] = ()
    required: bool = False


_SEED = FieldSpec("seed", "integer", "", 0, 2**63 - 1)
_DURATION = FieldSpec("duration", "number", "", MIN_SECONDS, MAX_SECONDS, "seconds")

SHOT_FIELDS = (
    FieldSpec("prompt", "text", "what is to be seen", longest=MAX_PROMPT_CHARACTERS, required=True),
    FieldSpec("at", "number", "second at which the shot starts; the first is 0", 0, MAX_SECONDS, "seconds"),
    replace(_DURATION, help="how long the shot lasts; the next shot's at does as well"),
    FieldSpec("transition", "text", "how the stream changes over to this shot", choices=TRANSITIONS),
    replace(_SEED, help="seed of the noise from this shot on"),
    FieldSpec("overrides", "mapping", "generation options for this shot only"),
)
SCRIPT_FIELDS = (
    FieldSpec("$schema", "text", "address of the JSON Schema, for editors; not used"),
    FieldSpec("title", "text", "name of the video", longest=200),
    FieldSpec("model", "text", "name or folder of the model"),
    FieldSpec("method", "text", "name of the method, a preset of options"),
    FieldSpec("width", "integer", "width of the video in pixels, together with height", 16, 8192, "pixels"),
    FieldSpec("height", "integer", "height of the video in pixels, together with width", 16, 8192, "pixels"),
    FieldSpec("fps", "number", "frames per second; the model's own where it is left out", 1, 240),
    replace(_SEED, help="seed of the noise"),
    replace(_DURATION, help="length of the whole script; ends the last shot"),
    FieldSpec("overrides", "mapping", "generation options for the whole script"),
    FieldSpec("shots", "shots", "the shots, in the order in which they play", required=True),
)


def json_schema(transitions: Sequence[str] = TRANSITIONS) -> dict[str, Any]:
    """The JSON Schema of the YAML and JSON form (draft 2020-12), made from the table of fields.

    It cannot express that times agree with each other; `load_script` checks that too.
    """
    shot = _object_schema(shot_fields(transitions))
    schema = _object_schema(SCRIPT_FIELDS)
    schema["properties"]["shots"] |= {"items": shot, "minItems": 1}
    schema["dependentRequired"] = {"width": ["height"], "height": ["width"]}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "streamvid script",
        "description": "Timed prompts; a shot ends by its duration or where the next one starts (at).",
        **schema,
    }


def transition_pattern(transitions: Sequence[str] = TRANSITIONS) -> str:
    """Regular expression of a transition with its options."""
    forms = [
        f"{name}(\\({TRANSITION_OPTIONS[name]} *\\))?" if name in TRANSITION_OPTIONS else name
        for name in transitions
    ]
    return f"({'|'.join(forms)})"


def shot_fields(transitions: Sequence[str]) -> tuple[FieldSpec, ...]:
    choices = tuple(transitions)
    return tuple(replace(spec, choices=choices) if spec.choices else spec for spec in SHOT_FIELDS)


def _object_schema(fields: Sequence[FieldSpec]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {spec.name: _field_schema(spec) for spec in fields},
        "required": [spec.name for spec in fields if spec.required],
        "additionalProperties": False,
    }


def _field_schema(spec: FieldSpec) -> dict[str, Any]:
    types = {"text": "string", "mapping": "object", "shots": "array"}
    schema: dict[str, Any] = {"type": types.get(spec.kind, spec.kind), "description": spec.help}
    if spec.choices:
        schema["pattern"] = f"^{transition_pattern(spec.choices)}$"
    elif spec.kind == "text":
        schema |= {"minLength": 1, "maxLength": spec.longest, "pattern": "\\S"}
    elif spec.kind == "mapping":
        schema["propertyNames"] = {"minLength": 1}
    elif spec.kind != "shots":
        schema |= {"minimum": spec.minimum, "maximum": spec.maximum}
    return schema


# --- checking --------------------------------------------------------------------------------------


def read_fields(
    node: Located, fields: Sequence[FieldSpec], source: str, where: str, options: Collection[str] | None
) -> dict[str, Any]:
    """The checked values of one mapping; `where` starts every message."""
    if not isinstance(node.value, dict):
        what, example = (where.rstrip(": "), "prompt: ...") if where else ("the script", "shots: ...")
        reason = f"{what} is {show(node.value)} but must be a mapping; write '{example}'"
        raise problem(source, node.line, reason)
    known = {spec.name: spec for spec in fields}
    for name, entry in node.value.items():
        if name not in known:
            raise problem(source, entry.line, f"{where}{_unknown('field', name, list(known))}")
    for spec in fields:
        if spec.required and spec.name not in node.value:
            raise problem(source, node.line, f"{where}{spec.name} is missing; add '{spec.name}: ...'")
    return {
        name: _read_value(entry, known[name], source, where, options) for name, entry in node.value.items()
    }


def _unknown(what: str, name: str, known: Sequence[str]) -> str:
    """`unknown field 'promt', did you mean 'prompt' (known: ...)`."""
    near = difflib.get_close_matches(name.lower(), known, n=1)
    guess = f", did you mean {near[0]!r}" if near else "; remove it or use a known one"
    return f"unknown {what} {show(name)}{guess} (known: {', '.join(sorted(known))})"


def _read_value(
    node: Located, spec: FieldSpec, source: str, where: str, options: Collection[str] | None
) -> Any:
    """One checked value as the dataclasses hold it."""
    value = node.value
    given = f"{where}{spec.name} is {show(value)} but must be"
    if spec.kind == "text":
        return _read_text_value(value, spec, given, source, node.line, where)
    if spec.kind in ("number", "integer"):
        number = f"a number{' of ' + spec.unit if spec.unit else ''} from {spec.minimum} to {spec.maximum}"
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise problem(source, node.line, f"{given} {number}; write it without quotes or unit")
        if not spec.minimum <= value <= spec.maximum:
            raise problem(source, node.line, f"{given} {number}; choose one in that range")
        if spec.kind == "integer":
            if value != int(value):
                raise problem(source, node.line, f"{given} a whole number; round it")
            return int(value)
        return round(float(value), TIME_DIGITS)
    if spec.kind == "mapping":
        if not isinstance(value, dict):
            raise problem(source, node.line, f"{given} a mapping of options; write for example {{steps: 4}}")
        for name, entry in value.items():
            if not name or (options is not None and name not in options):
                option = _unknown("option", name, list(options or ()))
                raise problem(source, entry.line, f"{where}{spec.name}: {option}")
        return plain(node)
    if not isinstance(value, list):
        raise problem(source, node.line, f"{given} a list of shots; start each shot with '- prompt: ...'")
    if not value:
        raise problem(source, node.line, "shots is an empty list; add at least one shot with a prompt")
    return value


def _read_text_value(
    value: Any, spec: FieldSpec, given: str, source: str, line: int | None, where: str
) -> str:
    """A text with runs of white space as one space."""
    if not isinstance(value, str):
        raise problem(source, line, f"{given} text; put it in quotes if it is meant as text")
    if spec.choices:
        if not re.fullmatch(transition_pattern(spec.choices), value):
            if re.fullmatch(f"({'|'.join(spec.choices)}){OPTIONS_PATTERN}", value):
                example = "write for example recache(bidirectional, reanchor) or blend(8, slerp)"
                raise problem(
                    source, line, f"{where}{spec.name} {show(value)} has options that do not exist; {example}"
                )
            near = difflib.get_close_matches(value.lower(), spec.choices, n=1)
            fix = f"; did you mean {near[0]!r}" if near else "; choose one of them"
            raise problem(source, line, f"{given} one of {', '.join(spec.choices)}{fix}")
        return value
    text = " ".join(value.split())
    if not text:
        raise problem(source, line, f"{where}{spec.name} is empty; write some text or remove it")
    if len(value) > spec.longest:
        reason = f"{spec.name} {show(text, 30)} has {len(value)} characters"
        raise problem(source, line, f"{where}{reason} but may have at most {spec.longest}; shorten it")
    for character in text:
        if unicodedata.category(character) in ("Cc", "Cs"):
            reason = f"{where}{spec.name} {show(text, 40)} holds the control character {character!r}"
            raise problem(source, line, f"{reason}; remove it")
    return text
