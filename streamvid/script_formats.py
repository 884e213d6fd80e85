"""Readers of script files: every form becomes one document of values that remember their lines.

A *document* has the shape of the YAML form (`shots`, each with `prompt`, `duration` or `at`, ...) whatever
it was read from: YAML, JSON, the one-line form, plain text, LongLive's JSONL, Scope's timeline. What the
fields may hold is decided in one place, `streamvid.script`; a reader only translates. What another program's
file asks for and streamvid has no counterpart of comes back as notes for the user, never dropped in silence.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import yaml

from streamvid.errors import UserError

DEFAULT_SHOT_SECONDS = 5
"""Seconds that a shot of the one-line or plain text form lasts where it names no length."""

LONGLIVE_FPS = 16
"""Frames per second of the model that LongLive's files are written for."""
LONGLIVE_FRAMES_PER_BLOCK = 3
"""Latent frames per block of that model; it switches at the first block that starts at or after the index."""
LONGLIVE_SEGMENT = 40
"""Latent frames per prompt where a file has no `switch_frame_indices` (also of the last prompt, always)."""

SCOPE_TIME_TOLERANCE = 0.1
"""Seconds by which an entry of Scope's timeline may end before or after the next one starts."""


@dataclass(frozen=True)
class Located:
    """A value of a script and the line (from 1) that it stands on; None where the script has no lines."""

    value: Any
    line: int | None = None


def locate(value: Any, line: int | None = None) -> Located:
    """Wrap plain nested lists and mappings, all of them on one line."""
    if isinstance(value, dict):
        return Located({str(key): locate(entry, line) for key, entry in value.items()}, line)
    if isinstance(value, (list, tuple)):
        return Located([locate(entry, line) for entry in value], line)
    return Located(value, line)


def plain(node: Located) -> Any:
    """The nested value without its lines."""
    if isinstance(node.value, dict):
        return {key: plain(entry) for key, entry in node.value.items()}
    if isinstance(node.value, list):
        return [plain(entry) for entry in node.value]
    return node.value


def problem(source: str, line: int | None, text: str) -> UserError:
    """The error to raise: one sentence on one line that starts with the place."""
    place = source if line is None else f"{source}, line {line}"
    return UserError(" ".join(f"{place}: {text}".split()))


def show(value: Any, longest: int = 60) -> str:
    """A value as an error message quotes it, shortened to `longest` characters."""
    if value is None:
        return "nothing"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, (list, tuple)):
        return "a list"
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= longest else text[: longest - 4] + "..." + text[-1]


# --- YAML and JSON, with lines --------------------------------------------------------------------


class _YamlLoader(yaml.SafeLoader):
    """Safe YAML without aliases, with which a few lines could unfold into gigabytes."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.MarkedYAMLError(
                problem=f"the alias *{event.anchor} is not supported", problem_mark=event.start_mark
            )
        return super().compose_node(parent, index)


def read_yaml(text: str, source: str) -> Located:
    """Parse one YAML document; duplicate keys, aliases and tags of other types are errors."""
    try:
        loader = _YamlLoader(text)
        node = loader.get_single_node()
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        character = text[error.position : error.position + 1]
        reason = f"the character {character!r} is not allowed in YAML; remove it"
        raise problem(source, line, reason) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line_number = None if mark is None else mark.line + 1
        fix = "check the indentation there and put text with a colon in quotes"
        reason = f"the YAML is not valid ({error.problem or error.context}); {fix}"
        raise problem(source, line_number, reason) from None
    if node is None:
        return Located(None, 1)
    return _from_yaml(loader, node, node.start_mark.line + 1, source)


def _from_yaml(loader: _YamlLoader, node: yaml.Node, line: int, source: str) -> Located:
    if isinstance(node, yaml.MappingNode):
        mapping: dict[str, Located] = {}
        for key_node, value_node in node.value:
            key_line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                reason = "a field name must be a word, not a list or a mapping; rename it"
                raise problem(source, key_line, reason)
            _add(mapping, key_node.value, _from_yaml(loader, value_node, key_line, source), source)
        return Located(mapping, line)
    if isinstance(node, yaml.SequenceNode):
        entries = [_from_yaml(loader, entry, entry.start_mark.line + 1, source) for entry in node.value]
        return Located(entries, line)
    try:
        value = loader.construct_object(node)
    except (yaml.YAMLError, ValueError):
        value = node.value
    # Dates and other YAML types mean nothing in a script: take them as the text that was written.
    return Located(value if isinstance(value, (str, int, float, type(None))) else node.value, line)


def _add(mapping: dict[str, Located], key: str, entry: Located, source: str) -> None:
    if key in mapping:
        earlier = mapping[key].line
        text = f"the field {show(key)} is given twice (first on line {earlier}); remove one of the two"
        raise problem(source, entry.line, text)
    mapping[key] = entry


_JSON_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\],:]|[^\s{}\[\],:"]+')


def read_json(text: str, source: str, first_line: int = 1) -> Located:
    """Parse one JSON value; `first_line` is the line of the file that `text` starts on."""
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        reason = f"the JSON is not valid ({error.msg}); check the commas, quotes and brackets there"
        raise problem(source, first_line + error.lineno - 1, reason) from None
    except ValueError:  # an integer of thousands of digits
        raise problem(source, first_line, "the JSON holds a number that is too long; shorten it") from None
    tokens = _json_tokens(text, first_line)
    token, line = next(tokens)
    return _from_json(tokens, token, line, source)


def _json_tokens(text: str, line: int) -> Iterator[tuple[str, int]]:
    position = 0
    for match in _JSON_TOKEN.finditer(text):
        line += text.count("\n", position, match.start())
        position = match.start()
        yield match.group(), line


def _from_json(tokens: Iterator[tuple[str, int]], token: str, line: int, source: str) -> Located:
    """Build the value that starts with `token`; the text is known to be valid JSON."""
    if token == "{":
        mapping: dict[str, Located] = {}
        for token, key_line in tokens:
            if token == "}":
                break
            if token == ",":
                continue
            key = json.loads(token)
            next(tokens)  # the colon
            value_token, _ = next(tokens)
            _add(mapping, key, _from_json(tokens, value_token, key_line, source), source)
        return Located(mapping, line)
    if token == "[":
        entries: list[Located] = []
        for token, entry_line in tokens:
            if token == "]":
                break
            if token != ",":
                entries.append(_from_json(tokens, token, entry_line, source))
        return Located(entries, line)
    return Located(json.loads(token), line)


# --- one line, plain text -------------------------------------------------------------------------

_LENGTH = re.compile(r"\[\s*([-+]?[\d.]+)\s*s?\s*(#?)\s*\]", re.IGNORECASE)
_LENGTH_LIKE = re.compile(r"\[\s*[-+]?[\d.,][^\]]*\]$")


def has_marks(text: str) -> bool:
    """Whether `text` has a mark of the one-line form: a `|` or a length such as `[5s]`."""
    return "|" in text or _LENGTH.search(text) is not None


def one_line_document(text: str, source: str) -> Located:
    """`a fox walks [5s] | it snows [10s] | # a city at night [8s]`; `#` in front or `[8s#]` is a cut."""
    shots = [_one_shot(part, None, source, number) for number, part in enumerate(text.split("|"), start=1)]
    return Located({"shots": Located(shots)})


def plain_text_document(text: str, source: str) -> Located:
    """One prompt a line, as in the one-line form; blank lines and those that start with `//` are skipped."""
    shots: list[Located] = []
    for line, content in enumerate(text.split("\n"), start=1):
        if content.strip() and not content.lstrip().startswith("//"):
            for part in content.split("|"):
                shots.append(_one_shot(part, line, source, len(shots) + 1))
    return Located({"shots": Located(shots, 1)}, 1)


def _one_shot(part: str, line: int | None, source: str, number: int) -> Located:
    text = part.strip()
    cut = text.startswith("#")
    text = text.removeprefix("#").strip()
    duration: float = DEFAULT_SHOT_SECONDS
    match = _LENGTH.search(text)
    if match is not None:
        if match.end() != len(text):
            after = show(text[match.end() :].strip(), 30)
            fix = "start the next shot with '|' and leave out subtitles"
            raise problem(source, line, f"shot {number}: {after} follows the length {match.group()}; {fix}")
        text = text[: match.start()].rstrip()
        cut = cut or match.group(2) == "#"
        try:
            duration = float(match.group(1))
            duration = int(duration) if duration.is_integer() else duration
        except ValueError:
            match = None
    if match is None and (wrong := _LENGTH_LIKE.search(part.strip())):
        fix = "write seconds, for example [5s] or [2.5s]"
        reason = f"the length {show(wrong.group(), 30)} is not understood"
        raise problem(source, line, f"shot {number}: {reason}; {fix}")
    fields = {"prompt": Located(text, line), "duration": Located(duration, line)}
    if cut:
        fields["transition"] = Located("cut", line)
    return Located(fields, line)


# --- other programs' files ------------------------------------------------------------------------


def foreign_document(node: Located, source: str) -> tuple[Located, list[str]] | None:
    """The document of a LongLive or Scope file and notes on what it lost; None for a script of our own."""
    if not isinstance(node.value, dict) or "prompts" not in node.value or "shots" in node.value:
        return None
    prompts = node.value["prompts"]
    if not isinstance(prompts.value, list) or not prompts.value:
        raise problem(source, prompts.line, "prompts must be a list of at least one prompt; add one")
    if isinstance(prompts.value[0].value, dict):
        return _scope_document(node, source)
    return _longlive_document(node, source)


def _longlive_document(node: Located, source: str) -> tuple[Located, list[str]]:
    """`{"prompts": [...], "switch_frame_indices": [40, 80]}`, the indices in latent frames."""
    prompts = node.value["prompts"].value
    line = node.line
    if "switch_frame_indices" in node.value:
        switches = _switch_indices(node.value["switch_frame_indices"], source)
        line = node.value["switch_frame_indices"].line
    else:
        switches = [LONGLIVE_SEGMENT * index for index in range(1, len(prompts))]
    if len(switches) != len(prompts) - 1:
        count = f"switch_frame_indices has {len(switches)} entries for {len(prompts)} prompts"
        raise problem(source, line, f"{count}; give {len(prompts) - 1}, one fewer than there are prompts")
    block = LONGLIVE_FRAMES_PER_BLOCK
    starts = [0] + [-(-switch // block) * block for switch in switches]
    for index, (earlier, later) in enumerate(pairwise(starts)):
        if later <= earlier:
            rule = f"but must be one block ({block} latent frames) or more after the switch before it"
            reason = f"switch_frame_indices holds {switches[index]} {rule}; give a larger index"
            raise problem(source, line, reason)
    total = (switches[-1] if switches else 0) + LONGLIVE_SEGMENT
    shots = []
    for prompt, start in zip(prompts, starts, strict=True):
        seconds = Located(_latent_seconds(start), prompt.line)
        shots.append(Located({"prompt": prompt, "at": seconds}, prompt.line))
    document = {
        "fps": Located(LONGLIVE_FPS, line),
        "duration": Located(_latent_seconds(-(-total // block) * block), line),
        "shots": Located(shots, node.line),
    }
    return Located(document, node.line), _unused(node, ("prompts", "switch_frame_indices"), "fields")


def _latent_seconds(latent_frame: int) -> float:
    """Media second at which a latent frame starts (the first is 1 pixel frame, the others 4 each)."""
    return max(0, 4 * latent_frame - 3) / LONGLIVE_FPS


def _switch_indices(node: Located, source: str) -> list[int]:
    values = plain(node)
    if isinstance(values, str):
        values = [part.strip() for part in values.split(",") if part.strip()]
    elif not isinstance(values, list):
        values = [values]
    indices = []
    for value in values:
        if isinstance(value, bool) or not re.fullmatch(r"\d{1,9}", str(value)):
            fix = "give whole latent frames, for example [40, 80] or '40, 80'"
            raise problem(source, node.line, f"switch_frame_indices holds {show(value)}; {fix}")
        indices.append(int(value))
    return indices


def _scope_document(node: Located, source: str) -> tuple[Located, list[str]]:
    """Scope's exported timeline: entries with `startTime` and `endTime` in seconds and weighted prompts."""
    entries = node.value["prompts"].value
    notes: list[str] = []
    shots: list[Located] = []
    end = 0.0
    for number, entry in enumerate(entries, start=1):
        where = f"entry {number}"
        if not isinstance(entry.value, dict):
            reason = f"{where} is {show(entry.value)} but must be a mapping with startTime; rewrite it"
            raise problem(source, entry.line, reason)
        start = _scope_number(entry, "startTime", source, where)
        if abs(start - end) > SCOPE_TIME_TOLERANCE:
            before = f"entry {number - 1} ends at {end:g}" if number > 1 else "a timeline starts at 0"
            reason = f"{where}: startTime is {start:g} but {before}; make the two equal"
            raise problem(source, entry.line, reason)
        end = _scope_number(entry, "endTime", source, where)
        if end <= start:
            text = f"{where}: endTime {end:g} is not after startTime {start:g}; give it a later end"
            raise problem(source, entry.line, text)
        start = 0.0 if number == 1 else start
        shot = {"prompt": _only_prompt(entry, source, where), "at": Located(start, entry.line)}
        shots.append(Located(shot, entry.line))
        steps = entry.value.get("transitionSteps")
        if steps is not None and steps.value:
            blend = f"the blend over {show(steps.value)} transitionSteps"
            notes.append(f"{where}: {blend} is not used, the prompt switches at once")
    document = {"duration": Located(end, entries[-1].line), "shots": Located(shots, node.line)}
    settings = node.value.get("settings", Located({}))
    if not isinstance(settings.value, dict):
        reason = f"settings is {show(settings.value)} but must be a mapping; rewrite it"
        raise problem(source, settings.line, reason)
    used = []
    if "seed" in settings.value:
        document["seed"] = settings.value["seed"]
        used.append("seed")
    resolution = settings.value.get("resolution", Located({}))
    if isinstance(resolution.value, dict):
        used.append("resolution")
        document |= {name: resolution.value[name] for name in ("width", "height") if name in resolution.value}
    if settings.value.get("pipelineId", Located(None)).value == "longlive":
        document["method"] = Located("longlive", settings.value["pipelineId"].line)
        used.append("pipelineId")
    notes += _unused(settings, tuple(used), "settings")
    notes += _unused(node, ("prompts", "settings", "version", "exportedAt"), "fields")
    return Located(document, node.line), notes


def _scope_number(entry: Located, name: str, source: str, where: str) -> float:
    node = entry.value.get(name, Located(None, entry.line))
    if isinstance(node.value, bool) or not isinstance(node.value, (int, float)) or not 0 <= node.value < 1e9:
        text = f"{where}: {name} is {show(node.value)} but must be a number of seconds, 0 or more; correct it"
        raise problem(source, node.line, text)
    return float(node.value)


def _only_prompt(entry: Located, source: str, where: str) -> Located:
    """The one prompt of an entry that has a weight above 0; several (a blend) are an error."""
    prompts = entry.value.get("prompts", Located(None, entry.line))
    candidates = prompts.value if isinstance(prompts.value, list) else []
    weighted: list[tuple[float, Located]] = []
    for candidate in candidates:
        fields = candidate.value if isinstance(candidate.value, dict) else {}
        weight = fields.get("weight", Located(100, candidate.line)).value
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or "text" not in fields:
            fix = "give it a text and a weight that is a number"
            raise problem(source, candidate.line, f"{where}: a prompt has no text or no proper weight; {fix}")
        if weight > 0:
            weighted.append((weight, fields["text"]))
    if not weighted:
        raise problem(source, prompts.line, f"{where}: no prompt has a weight above 0; give it one")
    weight, text = max(weighted, key=lambda pair: pair[0])
    if len(weighted) > 1:
        keep = f"keep one, for example the heaviest, {show(text.value, 40)} (weight {weight:g})"
        reason = f"{len(weighted)} prompts have a weight above 0 and blends are not supported"
        raise problem(source, prompts.line, f"{where}: {reason}; {keep}")
    return text


def _unused(node: Located, used: tuple[str, ...], what: str) -> list[str]:
    names = [name for name in node.value if name not in used]
    return [f"the {what} {', '.join(names)} have no counterpart here and are not used"] if names else []
