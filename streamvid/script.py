"""Scripts: timed prompts, read from any form and checked.

`load_script` reads a file (YAML, JSON, LongLive's JSONL, Scope's timeline, plain text) or the one-line form
and returns a `Script`; streamvid.timeline says on which block each shot really starts. What its fields may hold is the
business of streamvid.script_fields (`python -m streamvid.script` prints their JSON Schema).
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from streamvid import script_formats
from streamvid.script_fields import (
    MAX_SECONDS,
    MIN_SECONDS,
    SCRIPT_FIELDS,
    SHOT_FIELDS,
    TIME_DIGITS,
    TRANSITIONS,
    json_schema,
    read_fields,
    shot_fields,
)
from streamvid.script_formats import Located, problem

SUFFIXES = (".yaml", ".yml", ".json", ".jsonl", ".txt")


@dataclass(frozen=True)
class Shot:
    """One prompt and the time that it plays, in seconds of media time."""

    prompt: str
    start: float
    duration: float
    transition: str | None = None
    """How the stream changes over to this shot; None leaves it to the method. The first shot needs none."""
    seed: int | None = None
    """Seed of the noise from this shot on; None goes on with the script's."""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """Generation options for this shot only."""
    line: int | None = field(default=None, compare=False)
    """Line of the file that the shot starts on, for error messages."""

    @property
    def end(self) -> float:
        """Second at which the next shot starts."""
        return round(self.start + self.duration, TIME_DIGITS)


@dataclass(frozen=True)
class Script:
    """A list of shots that follow each other without a gap from second 0, and settings for all of them."""

    shots: tuple[Shot, ...]
    title: str | None = None
    model: str | None = None
    method: str | None = None
    width: int | None = None
    """Pixels; given together with `height` or not at all."""
    height: int | None = None
    fps: float | None = None
    """Frames per second of the video; None takes the model's."""
    seed: int | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """Generation options for the whole script."""
    source: str = field(default="script", compare=False)
    """Where it was read from, for error messages."""
    notes: tuple[str, ...] = field(default=(), compare=False)
    """What an imported file asked for and was not used; a command line prints these."""

    @property
    def duration(self) -> float:
        """Requested length in seconds."""
        return self.shots[-1].end


# --- reading --------------------------------------------------------------------------------------


def load_script(
    script: str | Path | Mapping[str, Any],
    *,
    transitions: Sequence[str] = TRANSITIONS,
    options: Collection[str] | None = None,
) -> Script:
    """Read a script file, the one-line form or a mapping of the YAML form; a mistake raises `UserError`.

    `longlive.jsonl#3` reads line 3 of a JSONL file. `options` are the names of the known generation options;
    with them, `overrides` are checked too.
    """
    if isinstance(script, Mapping):
        return _build(script_formats.locate(dict(script)), "script", [], transitions, options)
    file = _find_file(script)
    if file is None:
        return parse_script(
            str(script), "line", source="one-line script", transitions=transitions, options=options
        )
    path, line = file
    document, notes = _parse(_read_text(path), path.suffix.lower(), str(path), line)
    return _build(document, str(path), notes, transitions, options)


def parse_script(
    text: str,
    kind: str,
    *,
    source: str = "script",
    transitions: Sequence[str] = TRANSITIONS,
    options: Collection[str] | None = None,
) -> Script:
    """Like `load_script` for a text at hand; `kind` is `line` or one of `SUFFIXES`."""
    document, notes = _parse(text, kind, source)
    return _build(document, source, notes, transitions, options)


def _find_file(script: str | Path) -> tuple[Path, int | None] | None:
    """The file that is meant and the line chosen with `#`, None for a text; a missing file is an error."""
    text = str(script)
    if not text.strip():
        return None
    path = Path(text)
    line: int | None = None
    stem, mark, number = text.rpartition("#")
    if mark and number.isdecimal() and stem.lower().endswith(".jsonl"):
        path, line = Path(stem), int(number)
    try:
        is_folder, exists = path.is_dir(), path.exists()
    except (OSError, ValueError):  # too long or with a character that no path can have
        is_folder = exists = False
    if is_folder:
        raise problem(text, None, "a script must be a file and this is a folder; name the file in it")
    if exists:
        if path.suffix.lower() not in SUFFIXES:
            ending = f"its name ends in {path.suffix!r}" if path.suffix else "its name has no suffix"
            raise problem(text, None, f"{ending} but must end in one of {', '.join(SUFFIXES)}; rename it")
        return path, line
    marked = script_formats.has_marks(text)
    looks_like_path = path.suffix.lower() in SUFFIXES or ("/" in text and len(text.split()) == 1)
    if isinstance(script, Path) or (looks_like_path and not marked):
        raise problem(str(path), None, f"there is no such script file; {_similar_file(path)}")
    if not marked and len(text.split()) == 1:
        fix = f"check its name, or write '{text.strip()} [5s]' for a prompt of one word"
        raise problem(text.strip(), None, f"there is no such script file; {fix}")
    return None


def _similar_file(path: Path) -> str:
    """What to do about a missing file: the nearest name in its folder, if there is one."""
    try:
        names = [entry.name for entry in path.parent.iterdir() if entry.suffix.lower() in SUFFIXES]
    except OSError:
        return f"there is not even a folder {str(path.parent)!r}, check its name"
    near = difflib.get_close_matches(path.name, names, n=1)
    return f"did you mean {str(path.parent / near[0])!r}" if near else "check its name and folder"


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        reason = f"the script cannot be read ({error.strerror}); check its permissions"
        raise problem(str(path), None, reason) from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        reason = f"the byte 0x{data[error.start]:02x} is not UTF-8 text; save the file as UTF-8"
        raise problem(str(path), line, reason) from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _parse(text: str, kind: str, source: str, chosen_line: int | None = None) -> tuple[Located, list[str]]:
    """The document that `text` of the form `kind` holds, with notes on what an import lost."""
    if not text.strip():
        raise problem(source, None, "the script is empty; write at least one shot with a prompt")
    first_line = 1
    if kind == ".jsonl":
        first_line, text = _jsonl_line(text, source, chosen_line)
    try:
        if kind == "line":
            return script_formats.one_line_document(text, source), []
        if kind == ".txt":
            return script_formats.plain_text_document(text, source), []
        if kind in (".yaml", ".yml"):
            return script_formats.read_yaml(text, source), []
        if kind in (".json", ".jsonl"):
            document = script_formats.read_json(text, source, first_line)
            return script_formats.foreign_document(document, source) or (document, [])
    except RecursionError:
        raise problem(source, None, "lists and mappings are nested too deep; flatten them") from None
    raise ValueError(f"unknown kind of script {kind!r}, known: line, {', '.join(SUFFIXES)}")


def _jsonl_line(text: str, source: str, chosen: int | None) -> tuple[int, str]:
    """The chosen line of a JSONL file and its number; without a choice the first that is not blank."""
    lines = dict(enumerate(text.split("\n"), start=1))
    number = chosen if chosen is not None else next(n for n, line in lines.items() if line.strip())
    if not lines.get(number, "").strip():
        last = max(n for n, line in lines.items() if line.strip())
        reason = f"#{number} names a line that is missing or blank; choose one from #1 to #{last}"
        raise problem(source, None, reason)
    return number, lines[number]


# --- checking -------------------------------------------------------------------------------------


def _build(
    document: Located,
    source: str,
    notes: Sequence[str],
    transitions: Sequence[str],
    options: Collection[str] | None,
) -> Script:
    """Check a document against the table of fields and work out when each shot starts and ends."""
    if document.value is None:
        raise problem(source, document.line, "the script is empty; write at least one shot with a prompt")
    values = read_fields(document, SCRIPT_FIELDS, source, "", options)
    line = {name: node.line for name, node in document.value.items()}
    if ("width" in values) != ("height" in values):
        given, missing = ("width", "height") if "width" in values else ("height", "width")
        reason = f"{given} is {values[given]} but {missing} is not given; add {missing}"
        raise problem(source, line[given], reason)
    of_shots = shot_fields(transitions)
    shots = []
    for number, node in enumerate(values["shots"], start=1):
        shots.append(read_fields(node, of_shots, source, f"shot {number}: ", options))
    times = _times(shots, values["shots"], values.get("duration"), line.get("duration"), source)
    names = ("prompt", "transition", "seed", "overrides")
    return Script(
        shots=tuple(
            Shot(start=start, duration=duration, line=node.line, **{n: shot[n] for n in names if n in shot})
            for shot, node, (start, duration) in zip(shots, values["shots"], times, strict=True)
        ),
        source=source,
        notes=tuple(notes),
        **{name: value for name, value in values.items() if name not in ("$schema", "duration", "shots")},
    )


def _times(
    shots: Sequence[Mapping[str, Any]],
    nodes: Sequence[Located],
    total: float | None,
    total_line: int | None,
    source: str,
) -> list[tuple[float, float]]:
    """Start and duration in seconds of every shot, from `at`, `duration` and the script's own duration."""
    times: list[tuple[float, float]] = []
    start = 0.0
    if shots[0].get("at", 0) != 0:
        text = f"shot 1: at is {shots[0]['at']:g} but the first shot must start at 0"
        raise problem(source, _line(nodes[0], "at"), f"{text}; set it to 0 or remove it")
    for number, shot in enumerate(shots, start=1):
        last = number == len(shots)
        end: float | None = total if last else shots[number].get("at")
        duration: float | None = shot.get("duration")
        if last:
            end_name, line = "the script's duration", total_line
            missing = "give it a duration"
        else:
            end_name, line = f"shot {number + 1}: at", _line(nodes[number], "at")
            missing = f"give it a duration or give shot {number + 1} an at"
        if end is None:
            if duration is None:
                raise problem(source, nodes[number - 1].line, f"shot {number}: it has no end; {missing}")
            end = round(start + duration, TIME_DIGITS)
        elif end - start < MIN_SECONDS:
            text = f"{end_name} is {end:g} but shot {number} starts at {start:g}; choose a later time"
            raise problem(source, line, text)
        elif duration is not None and abs(start + duration - end) > MIN_SECONDS:
            text = f"shot {number} starts at {start:g} and has duration {duration:g}, so it ends at"
            fix = "remove one of the two or make them agree"
            raise problem(source, line, f"{end_name} is {end:g} but {text} {start + duration:g}; {fix}")
        if end > MAX_SECONDS:
            text = f"shot {number}: it ends at second {end:.0f} but a script may last at most {MAX_SECONDS}"
            raise problem(source, nodes[number - 1].line, f"{text}; shorten it")
        times.append((start, round(end - start, TIME_DIGITS)))
        start = end
    return times


def _line(node: Located, name: str) -> int | None:
    entry = node.value.get(name)
    return node.line if entry is None else entry.line


# --- writing --------------------------------------------------------------------------------------


def to_dict(script: Script) -> dict[str, Any]:
    """The script as nested plain values of the YAML and JSON form; reading them gives an equal script."""
    document: dict[str, Any] = {}
    for spec in SCRIPT_FIELDS:
        if spec.name == "shots":
            document["shots"] = [_shot_dict(shot) for shot in script.shots]
        elif spec.name not in ("$schema", "duration"):
            _put(document, spec.name, getattr(script, spec.name))
    return document


def _shot_dict(shot: Shot) -> dict[str, Any]:
    document: dict[str, Any] = {}
    for spec in SHOT_FIELDS:
        if spec.name != "at":
            _put(document, spec.name, getattr(shot, spec.name))
    return document


def _put(document: dict[str, Any], name: str, value: Any) -> None:
    """Add a value unless it is left out anyway; whole numbers are written without a decimal point."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, Mapping):
        value = json.loads(json.dumps(dict(value)))
    if value is not None and value != {}:
        document[name] = value


def to_yaml(script: Script) -> str:
    """The script in its YAML form; reading it gives an equal script."""
    return yaml.safe_dump(to_dict(script), sort_keys=False, allow_unicode=True, width=110)


if __name__ == "__main__":
    print(json.dumps(json_schema(), indent=2))
