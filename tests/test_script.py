"""Scripts: every form is read alike, every mistake is one sentence."""

import json
import math
import re
from pathlib import Path

import jsonschema
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from streamvid.errors import UserError
from streamvid.script import (
    Script,
    Shot,
    load_script,
    parse_script,
    to_dict,
    to_yaml,
)
from streamvid.script_fields import (
    SCRIPT_FIELDS,
    SHOT_FIELDS,
    TRANSITIONS,
    json_schema,
)
from streamvid.timeline import format_timeline, timeline

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml")) + sorted((ROOT / "examples" / "formats").iterdir())

GOOD = """\
title: A day
model: diorama
method: longlive
width: 160
height: 96
fps: 16
seed: 7
overrides: {steps: 4}
shots:
  - prompt: >
      A large red ball
      rolls right
    duration: 10
  - prompt: "Night: it rains"
    at: 10
    duration: 2.5
    transition: recache
    seed: 8
    overrides: {steps: 2, window: {sink: 3}}
  - prompt: Snow
    at: 12.5
    duration: 4
"""


def starts_and_durations(script: Script) -> list[tuple[float, float]]:
    return [(shot.start, shot.duration) for shot in script.shots]


def check_sentence(message: str) -> None:
    """One sentence on one line."""
    assert "\n" not in message
    assert not message.endswith(".")
    assert not re.search(r"[a-z)']\. [A-Z]", message), message


def failure(text: str, kind: str = ".yaml", **options) -> str:
    """The message of a text that must be rejected."""
    with pytest.raises(UserError) as caught:
        parse_script(text, kind, source="file" + kind, **options)
    check_sentence(str(caught.value))
    return str(caught.value)


# --- the YAML and JSON form --------------------------------------------------------------------------


def test_yaml_form():
    script = parse_script(GOOD, ".yaml", source="day.yaml")
    assert (script.title, script.model, script.method) == ("A day", "diorama", "longlive")
    assert (script.width, script.height, script.fps, script.seed) == (160, 96, 16.0, 7)
    assert script.overrides == {"steps": 4}
    assert script.source == "day.yaml"
    assert [shot.prompt for shot in script.shots] == [
        "A large red ball rolls right",
        "Night: it rains",
        "Snow",
    ]
    assert starts_and_durations(script) == [(0, 10), (10, 2.5), (12.5, 4)]
    assert [shot.transition for shot in script.shots] == [None, "recache", None]
    assert script.shots[1].seed == 8
    assert script.shots[1].overrides == {"steps": 2, "window": {"sink": 3}}
    assert [shot.line for shot in script.shots] == [10, 14, 20]
    assert script.duration == 16.5


def test_mapping_json_and_yaml_read_alike(tmp_path):
    script = parse_script(GOOD, ".yaml")
    document = yaml.safe_load(GOOD)
    assert load_script(document) == script
    for name, text in {
        "a.json": json.dumps(document),
        "b.json": json.dumps(document, indent="\t"),
        "c.yml": GOOD.replace("\n", "\r\n"),
        "d.YAML": "\ufeff" + GOOD,
        "e.jsonl": "\n" + json.dumps(document) + "\n",
    }.items():
        (tmp_path / name).write_bytes(text.encode())
        assert load_script(tmp_path / name) == script
        assert load_script(str(tmp_path / name)) == script


def test_json_with_escapes_and_large_numbers():
    shot = '{"prompt": "a \\"fox\\", {walks} [home] \\ud83e\\udd8a", "duration": 1.5e1}'
    text = f'{{"shots": [{shot}], "seed": 1.0}}'
    script = parse_script(text, ".json")
    assert script.shots[0].prompt == 'a "fox", {walks} [home] \U0001f98a'
    assert script.duration == 15
    assert script.seed == 1 and isinstance(script.seed, int)


@pytest.mark.parametrize(
    ("shots", "total", "expected"),
    [
        ([{"duration": 4}, {"duration": 6}], None, [(0, 4), (4, 6)]),
        ([{"at": 0}, {"at": 4, "duration": 6}], None, [(0, 4), (4, 6)]),
        ([{}, {"at": 4}], 10, [(0, 4), (4, 6)]),
        ([{"duration": 4}, {"at": 4, "duration": 6}], 10, [(0, 4), (4, 6)]),
        ([{"duration": 4.0004}, {"at": 4, "duration": 6}], None, [(0, 4), (4, 6)]),
        ([{"duration": 0.1}, {"duration": 0.2}, {"duration": 1}], None, [(0, 0.1), (0.1, 0.2), (0.3, 1)]),
    ],
)
def test_times_by_duration_at_and_total(shots, total, expected):
    document = {"shots": [{"prompt": "x", **shot} for shot in shots]}
    if total is not None:
        document["duration"] = total
    assert starts_and_durations(load_script(document)) == expected


def test_transitions_and_options_may_be_passed_in():
    text = "shots: [{prompt: a, duration: 5, transition: blend, overrides: {steps: 4}}]"
    script = parse_script(text, ".yaml", transitions=("blend",), options={"steps"})
    assert script.shots[0].transition == "blend"
    message = failure(text, options={"stepps", "sink"}, transitions=("blend",))
    assert "unknown option 'steps', did you mean 'stepps'" in message
    message = failure(text, transitions=("cut", "shot"), options={"steps"})
    assert "transition is 'blend' but must be one of cut, shot; choose one of them" in message


# --- one line, plain text ----------------------------------------------------------------------------


def test_one_line_form():
    script = load_script("a fox walks [5s] | it  snows [2.5] | # a city at night [8s] | rain|a sea[1s#]")
    assert [shot.prompt for shot in script.shots] == [
        "a fox walks",
        "it snows",
        "a city at night",
        "rain",
        "a sea",
    ]
    assert [shot.duration for shot in script.shots] == [5, 2.5, 8, 5, 1]
    assert [shot.transition for shot in script.shots] == [None, None, "cut", None, "cut"]
    assert script.source == "one-line script"
    assert load_script("two words").duration == 5
    assert load_script("fox [5s]").shots[0].prompt == "fox"
    assert load_script("a sign [for sale]").shots[0].prompt == "a sign [for sale]"
    assert load_script("a fox reads notes.txt [3s]").duration == 3
    assert load_script("black/white [3s]").shots[0].prompt == "black/white"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["the script is empty"]),
        (" \n", ["the script is empty"]),
        ("a fox | | it snows", ["shot 2: prompt is empty"]),
        ("# [5s]", ["shot 1: prompt is empty"]),
        ("a fox [0s]", ["shot 1: duration is 0 but must be a number of seconds from 0.001"]),
        ("a fox [-2s] | snow", ["shot 1: duration is -2"]),
        ("a fox [5 sec]", ["shot 1: the length '[5 sec]' is not understood", "[5s]"]),
        ("a fox [1.2.3s]", ["shot 1: the length '[1.2.3s]' is not understood"]),
        ("a fox [5s] walks", ["shot 1: 'walks' follows the length [5s]"]),
        ("a fox [5s#] ; a subtitle | snow", ["; a subtitle", "subtitles"]),
        ("fox", ["fox: there is no such script file", "'fox [5s]'"]),
        ("nowhere/story", ["nowhere/story: there is no such script file", "'nowhere'"]),
        ("my story.yaml", ["my story.yaml: there is no such script file"]),
        ("x" * 5000 + " y", ["shot 1: prompt", "5002 characters", "at most 2000"]),
    ],
)
def test_one_line_errors(text, parts):
    with pytest.raises(UserError) as caught:
        load_script(text)
    check_sentence(str(caught.value))
    for part in parts:
        assert part in str(caught.value)


def test_plain_text():
    script = parse_script("// a comment\nA fox walks\n\n  # It snows [8s]\r\n a | b\n", ".txt")
    assert [shot.prompt for shot in script.shots] == ["A fox walks", "It snows", "a", "b"]
    assert [shot.duration for shot in script.shots] == [5, 8, 5, 5]
    assert [shot.line for shot in script.shots] == [2, 4, 5, 5]
    assert script.shots[1].transition == "cut"
    assert "file.txt, line 2: shot 2: duration is 0" in failure("a\nb [0s]", ".txt")
    assert "shots is an empty list" in failure("// nothing\n", ".txt")


# --- other programs' files ---------------------------------------------------------------------------


def test_longlive_switches_at_the_same_blocks_as_longlive():
    six = {"prompts": [f"p {index}" for index in range(6)]}
    for document in (
        six,
        {**six, "switch_frame_indices": [40, 80, 120, 160, 200]},
        {**six, "switch_frame_indices": "40, 80,120,160, 200"},
    ):
        script = parse_script(json.dumps(document), ".jsonl")
        plan = timeline(script, script.fps, 3)
        assert [3 * shot.first_block for shot in plan.shots] == [0, 42, 81, 120, 162, 201]
        assert plan.blocks == 80
        assert all(shot.start == shot.requested_start for shot in plan.shots)
    one = parse_script('{"prompts": ["a", "b"], "switch_frame_indices": 21}', ".jsonl")
    assert one.shots[1].start == (1 + 4 * 20) / 16
    assert parse_script('{"prompts": ["a"], "idx": 4}', ".json").notes == (
        "the fields idx have no counterpart here and are not used",
    )


def test_jsonl_line_is_chosen_by_its_number(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('\n{"prompts": ["one"]}\n{"prompts": ["two"]}\n{"prompts": [3]}\n')
    assert load_script(path).shots[0].prompt == "one"
    assert load_script(f"{path}#3").shots[0].prompt == "two"
    for number in (1, 9):
        with pytest.raises(UserError, match=f"#{number} names a line .* from #1 to #4"):
            load_script(f"{path}#{number}")
    with pytest.raises(UserError, match=r"prompts.jsonl, line 4: shot 1: prompt is 3 but must be text"):
        load_script(f"{path}#4")


@pytest.mark.parametrize(
    ("switches", "part"),
    [
        ("[40]", "switch_frame_indices has 1 entries for 3 prompts; give 2"),
        ("[40, 40]", "switch_frame_indices holds 40 but must be one block (3 latent frames) or more after"),
        ("[0, 40]", "switch_frame_indices holds 0 but"),
        ("[-4, 40]", "switch_frame_indices holds -4"),
        ('"40; 80"', "switch_frame_indices holds '40; 80'"),
        ("[true, 80]", "switch_frame_indices holds true"),
        ("null", "switch_frame_indices holds nothing"),
        ('{"a": 1}', "switch_frame_indices holds a mapping"),
    ],
)
def test_longlive_errors(switches, part):
    text = f'{{"prompts": ["a", "b", "c"],\n"switch_frame_indices": {switches}}}'
    message = failure(text, ".json")
    assert message.startswith("file.json, line 2: ") and part in message
    assert failure('{"prompts": []}', ".jsonl").startswith("file.jsonl, line 1: prompts must be a list")


def scope(*entries, **more) -> str:
    """A timeline; an entry is (start, end, {text: weight})."""
    prompts = [
        {"startTime": start, "endTime": end, "prompts": [{"text": t, "weight": w} for t, w in texts.items()]}
        for start, end, texts in entries
    ]
    return json.dumps({"prompts": prompts, **more}, indent=1)


def test_scope_timeline():
    settings = {
        "pipelineId": "longlive",
        "resolution": {"height": 480, "width": 832},
        "seed": 42,
        "denoisingSteps": [1000, 750],
        "manageCache": True,
    }
    entries = ((0, 11.4555, {"a": 100}), (11.4555, 24.16839999985695, {"b": 60, "c": 0}))
    script = parse_script(scope(*entries, settings=settings, version="2.0", exportedAt="x"), ".json")
    assert [shot.prompt for shot in script.shots] == ["a", "b"]
    assert starts_and_durations(script) == [(0, 11.4555), (11.4555, 12.7129)]
    assert (script.method, script.width, script.height, script.seed) == ("longlive", 832, 480, 42)
    assert script.notes == (
        "the settings denoisingSteps, manageCache have no counterpart here and are not used",
    )
    other = json.loads(scope((0, 2, {"a": 1}), settings={"pipelineId": "memflow"}))
    other["prompts"][0]["transitionSteps"] = 4
    notes = parse_script(json.dumps(other), ".json").notes
    assert "entry 1: the blend over 4 transitionSteps is not used" in notes[0] and "pipelineId" in notes[1]


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (scope((0, 5, {"a fox": 60, "a dog": 40})), "entry 1: 2 prompts have a weight above 0"),
        (scope((0, 5, {"a fox": 60, "a dog": 70})), "'a dog' (weight 70)"),
        (scope((0, 5, {"a": 0})), "entry 1: no prompt has a weight above 0"),
        (scope((0, 5, {"a": "x"})), "entry 1: a prompt has no text or no proper weight"),
        (scope((0, 5, {})), "entry 1: no prompt has a weight above 0"),
        (scope((3, 5, {"a": 1})), "entry 1: startTime is 3 but a timeline starts at 0"),
        (scope((0, 5, {"a": 1}), (6, 8, {"b": 1})), "entry 2: startTime is 6 but entry 1 ends at 5"),
        (scope((0, 5, {"a": 1}), (4, 8, {"b": 1})), "entry 2: startTime is 4 but entry 1 ends at 5"),
        (scope((0, 0, {"a": 1})), "entry 1: endTime 0 is not after startTime 0"),
        (scope((0, None, {"a": 1})), "entry 1: endTime is nothing but must be a number of seconds"),
        (scope((0, "5", {"a": 1})), "entry 1: endTime is '5' but"),
        (scope((0, 5, {"": 1})), "shot 1: prompt is empty"),
        (scope((0, 5, {"a": 1}), settings=3), "settings is 3 but must be a mapping"),
        ('{"prompts": [{"startTime": 0}, "x"]}', "entry 1: endTime is nothing"),
        ('{"prompts": ["x", {"startTime": 0}]}', "shot 2: prompt is a mapping but must be text"),
    ],
)
def test_scope_errors(text, part):
    message = failure(text, ".json")
    assert part in message
    assert re.match(r"file\.json, line \d+: ", message)


# --- mistakes ----------------------------------------------------------------------------------------

# name: (text, parts of the message); these are also wrong for the JSON Schema
BAD = {
    "unknown field": (
        "seeed: 3\nshots: [{prompt: a, duration: 5}]",
        ["line 1: unknown field 'seeed'", "'seed'"],
    ),
    "unknown shot field": ("shots:\n- {promt: a, duration: 5}", ["line 2: shot 1: unknown field 'promt'"]),
    "nothing near": (
        "zzz: 3\nshots: [{prompt: a, duration: 5}]",
        ["unknown field 'zzz'; remove it", "title"],
    ),
    "no shots": ("title: x", ["line 1: shots is missing", "shots: ..."]),
    "empty shots": ("title: x\nshots: []", ["line 2: shots is an empty list"]),
    "shots of nothing": ("shots:", ["line 1: shots is nothing but must be a list"]),
    "shots as text": ("shots: a fox", ["line 1: shots is 'a fox' but must be a list"]),
    "shot as text": ("shots:\n- a fox", ["line 2: shot 1 is 'a fox' but must be a mapping", "prompt: ..."]),
    "list at the top": ("- prompt: a", ["line 1: the script is a list but must be a mapping"]),
    "text at the top": ("a fox walks", ["the script is 'a fox walks' but must be a mapping"]),
    "no prompt": ("shots:\n- duration: 5", ["line 2: shot 1: prompt is missing"]),
    "empty prompt": ("shots:\n- {prompt: ' ', duration: 5}", ["line 2: shot 1: prompt is empty"]),
    "prompt is a number": (
        "shots:\n- {prompt: 5, duration: 5}",
        ["shot 1: prompt is 5 but must be text", "quotes"],
    ),
    "prompt is yes": ("shots:\n- {prompt: yes, duration: 5}", ["prompt is true but must be text"]),
    "prompt of nothing": ("shots:\n- {prompt: , duration: 5}", ["prompt is nothing but must be text"]),
    "overlong prompt": (
        f"shots:\n- {{prompt: {'ab ' * 700}, duration: 5}}",
        ["line 2: shot 1: prompt 'ab ab", "has 2099 characters but may have at most 2000"],
    ),
    "zero duration": (
        "shots:\n- prompt: a\n  duration: 0",
        ["line 3: shot 1: duration is 0 but must be a number of seconds from 0.001 to 1000000"],
    ),
    "negative duration": ("shots:\n- {prompt: a, duration: -5}", ["line 2: shot 1: duration is -5 but"]),
    "infinite duration": ("shots:\n- {prompt: a, duration: .inf}", ["shot 1: duration is inf but"]),
    "duration with unit": (
        "shots:\n- {prompt: a, duration: 5s}",
        ["duration is '5s' but", "without quotes or unit"],
    ),
    "duration is true": ("shots:\n- {prompt: a, duration: true}", ["duration is true but must be a number"]),
    "negative at": ("shots:\n- {prompt: a, at: -1, duration: 2}", ["shot 1: at is -1 but"]),
    "unknown transition": (
        "shots:\n- {prompt: a, duration: 5, transition: recash}",
        [
            "shot 1: transition is 'recash' but must be one of cross_only, recache, flush, blend, shot, cut",
            "did you mean 'recache'",
        ],
    ),
    "transition is a number": ("shots:\n- {prompt: a, duration: 5, transition: 1}", ["transition is 1 but"]),
    "fractional seed": (
        "seed: 1.5\nshots: [{prompt: a, duration: 5}]",
        ["line 1: seed is 1.5 but", "whole number"],
    ),
    "negative seed": ("seed: -1\nshots: [{prompt: a, duration: 5}]", ["line 1: seed is -1 but"]),
    "huge seed": (f"seed: {10**30}\nshots: [{{prompt: a, duration: 5}}]", ["line 1: seed is 10000"]),
    "fps of 0": (
        "fps: 0\nshots: [{prompt: a, duration: 5}]",
        ["line 1: fps is 0 but must be a number from 1 to 240"],
    ),
    "width alone": ("width: 64\nshots: [{prompt: a, duration: 5}]", ["width is 64 but height is not given"]),
    "height too small": (
        "width: 64\nheight: 4\nshots: [{prompt: a, duration: 5}]",
        ["line 2: height is 4 but must be a number of pixels from 16 to 8192"],
    ),
    "overrides of a list": (
        "shots: [{prompt: a, duration: 5}]\noverrides: [1]",
        ["line 2: overrides is a list but must be a mapping"],
    ),
    "override without a name": (
        "shots: [{prompt: a, duration: 5}]\noverrides: {'': 1}",
        ["line 2: overrides: unknown option ''"],
    ),
    "title of nothing": (
        "title:\nshots: [{prompt: a, duration: 5}]",
        ["line 1: title is nothing but must be text"],
    ),
}

# These are beyond a JSON Schema: syntax, and values that contradict each other.
WORSE = {
    "empty": ("", ["the script is empty"]),
    "comments only": ("# nothing here\n", ["the script is empty"]),
    "not a number": ("shots:\n- {prompt: a, duration: .nan}", ["line 2: shot 1: duration is nan but"]),
    "duplicate key": (
        "shots:\n- prompt: a\n  duration: 5\n  prompt: b",
        ["line 4: the field 'prompt' is given twice (first on line 2)"],
    ),
    "broken YAML": (
        "title: a\nshots:\n- prompt: A fox: it walks",
        ["line 3: the YAML is not valid", "in quotes"],
    ),
    "unclosed": ("shots: [{prompt: a", ["the YAML is not valid"]),
    "tab": ("shots:\n\t- prompt: a", ["line 2: the YAML is not valid"]),
    "two documents": ("shots: []\n---\nshots: []", ["line 2: the YAML is not valid"]),
    "alias": ("title: &a x\nmodel: *a", ["line 2: the YAML is not valid (the alias *a is not supported)"]),
    "loop": ("shots: &a [*a]", ["line 1: the YAML is not valid (the alias *a"]),
    "unprintable": ("title: a\nmodel: \x00", ["line 2: the character '\\x00' is not allowed"]),
    "list as key": ("? [a]\n: b", ["line 1: a field name must be a word"]),
    "deep": ("a: " + "[" * 1000, ["nested too deep"]),
    "control character": ('shots: [{prompt: "a\\u0001b", duration: 5}]', ["control character '\\x01'"]),
    "half a character": ('shots: [{prompt: "a\\uD800b", duration: 5}]', ["control character '\\ud800'"]),
    "first shot late": (
        "shots:\n- {prompt: a, at: 2, duration: 5}",
        ["line 2: shot 1: at is 2 but the first shot must"],
    ),
    "shots in disorder": (
        "shots:\n- {prompt: a}\n- {prompt: b, at: 8}\n- {prompt: c,\n   at: 4, duration: 1}",
        ["line 5: shot 3: at is 4 but shot 2 starts at 8"],
    ),
    "at twice": (
        "shots:\n- {prompt: a}\n- {prompt: b, at: 8}\n- {prompt: c, at: 8, duration: 1}",
        ["line 4: shot 3: at is 8 but shot 2 starts at 8"],
    ),
    "contradiction": (
        "shots:\n- {prompt: a, duration: 5}\n- {prompt: b, at: 4, duration: 5}",
        ["line 3: shot 2: at is 4 but shot 1 starts at 0 and has duration 5, so it ends at 5"],
    ),
    "no end": ("shots:\n- {prompt: a}", ["line 2: shot 1: it has no end; give it a duration"]),
    "no end in the middle": (
        "shots:\n- {prompt: a}\n- {prompt: b, duration: 5}",
        ["line 2: shot 1: it has no end; give it a duration or give shot 2 an at"],
    ),
    "total too short": (
        "duration: 5\nshots:\n- {prompt: a, duration: 6}\n- {prompt: b}",
        ["line 1: the script's duration is 5 but shot 2 starts at 6"],
    ),
    "total contradicts": (
        "duration: 9\nshots:\n- {prompt: a, duration: 6}\n- {prompt: b, duration: 5}",
        ["line 1: the script's duration is 9 but shot 2 starts at 6 and has duration 5, so it ends at 11"],
    ),
    "too long": (
        "shots:\n- {prompt: a, duration: 600000}\n- {prompt: b, duration: 600000}",
        ["line 3: shot 2: it ends at second 1200000 but a script may last at most 1000000"],
    ),
}


@pytest.mark.parametrize("name", [*BAD, *WORSE])
def test_mistakes_name_file_line_field_and_value(name):
    text, parts = {**BAD, **WORSE}[name]
    message = failure(text)
    assert message.startswith("file.yaml")
    for part in parts:
        assert part in message


@pytest.mark.parametrize("name", BAD)
def test_schema_and_loader_agree_on_mistakes(name):
    document = yaml.safe_load(BAD[name][0])
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document, json_schema())
    if isinstance(document, dict) and ".inf" not in BAD[name][0]:
        failure(json.dumps(document, indent=1), ".json")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (
            '{"shots": [\n{"prompt": "a",\n "prompt": "b"}]}',
            "line 3: the field 'prompt' is given twice (first on line 2)",
        ),
        ('{"shots": [\n{"prompt": "a",}]}', "line 2: the JSON is not valid"),
        ('{"shots": [', "line 1: the JSON is not valid"),
        ('{"shots": [{"prompt": "a",\n\t"duration":\n NaN}]}', "line 2: shot 1: duration is nan"),
        ('{"shots": [{"prompt": "a\\u0000", "duration": 1}]}', "holds the control character '\\x00'"),
        ('{"seed": ' + "1" * 5000 + "}", "a number that is too long"),
        ("[" * 100_000, "nested too deep"),
        ("  ", "file.json: the script is empty"),
        ("3", "the script is 3 but must be a mapping"),
    ],
)
def test_json_mistakes(text, part):
    assert part in failure(text, ".json")


def test_mistakes_with_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("story.yaml").write_text(GOOD)
    Path("notes.md").write_text("x")
    Path("plain").write_text("x")
    Path("folder").mkdir()
    Path("latin.txt").write_bytes("a fox\nein Bär\n".encode("latin-1"))
    Path("utf16.yaml").write_bytes(GOOD.encode("utf-16"))
    Path("empty.json").write_bytes(b"")
    for name, part in {
        "storry.yaml": "storry.yaml: there is no such script file; did you mean 'story.yaml'",
        "nowhere/story.yaml": "there is not even a folder 'nowhere'",
        "zzz.json": "zzz.json: there is no such script file; check its name and folder",
        "zzz.jsonl#4": "zzz.jsonl: there is no such script file",
        "folder": "folder: a script must be a file and this is a folder",
        "notes.md": "notes.md: its name ends in '.md' but must end in one of .yaml, .yml, .json,",
        "plain": "plain: its name has no suffix but must end in one of",
        "latin.txt": "latin.txt, line 2: the byte 0xe4 is not UTF-8 text; save the file as UTF-8",
        "utf16.yaml": "utf16.yaml, line 1: the byte 0xff is not UTF-8 text",
        "empty.json": "empty.json: the script is empty",
    }.items():
        with pytest.raises(UserError) as caught:
            load_script(name)
        check_sentence(str(caught.value))
        assert part in str(caught.value)
    with pytest.raises(UserError, match="there is no such script file"):
        load_script(Path("a fox [5s]"))
    unreadable = Path("story.yaml")
    monkeypatch.setattr(
        Path, "read_bytes", lambda self: (_ for _ in ()).throw(PermissionError(13, "Permission denied"))
    )
    with pytest.raises(UserError, match=r"story.yaml: the script cannot be read \(Permission denied\)"):
        load_script(unreadable)


@st.composite
def nearly_good(draw) -> str:
    """The good script with a stretch of it replaced."""
    text = draw(st.sampled_from([GOOD, json.dumps(yaml.safe_load(GOOD))]))
    start = draw(st.integers(0, len(text)))
    return (
        text[:start]
        + draw(st.text("{}[]:,-# \n\"'|5.aé", max_size=4))
        + text[start + draw(st.integers(0, 4)) :]
    )


@given(st.text(max_size=60) | nearly_good(), st.sampled_from([".yaml", ".json", ".jsonl", ".txt", "line"]))
@settings(max_examples=150, deadline=None)
def test_no_text_gives_anything_but_a_script_or_one_sentence(text, kind):
    try:
        script = parse_script(text, kind)
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert script.shots and script.duration > 0


# --- round trips -------------------------------------------------------------------------------------

words = (
    st.text(min_size=1, max_size=30)
    .map(lambda text: " ".join(text.split()))
    .filter(lambda text: text and text.isprintable())
)
names = st.text("abcdefghijklmnopqrstuvwxyz_", min_size=1, max_size=8)
seconds = st.integers(1000, 100_000_000).map(lambda microseconds: microseconds / 1e6)
options = st.dictionaries(
    names,
    st.one_of(st.integers(), st.booleans(), words, st.floats(-10, 10), st.lists(st.integers())),
    max_size=2,
)
seeds = st.none() | st.integers(0, 2**63 - 1)


@st.composite
def scripts(draw) -> Script:
    shots = []
    start = 0.0
    for _ in range(draw(st.integers(1, 6))):
        transition = draw(st.sampled_from([None, *TRANSITIONS]))
        shot = Shot(draw(words), start, draw(seconds), transition, draw(seeds), draw(options))
        shots.append(shot)
        start = shot.end
    width, height = draw(st.sampled_from([(None, None), (160, 96), (8192, 16)]))
    return Script(
        shots=tuple(shots),
        title=draw(st.none() | words),
        model=draw(st.none() | words),
        method=draw(st.none() | words),
        width=width,
        height=height,
        fps=draw(st.sampled_from([None, 16.0, 23.976])),
        seed=draw(seeds),
        overrides=draw(options),
    )


@given(scripts())
@settings(max_examples=50, deadline=None)
def test_round_trip_through_every_form(script):
    assert parse_script(to_yaml(script), ".yaml") == script
    assert parse_script(json.dumps(to_dict(script)), ".json") == script
    assert load_script(to_dict(script)) == script
    jsonschema.validate(to_dict(script), json_schema())


def test_yaml_is_readable():
    script = load_script("a fox walks [5s] | # a city: night [8s]")
    first = "- prompt: a fox walks\n  duration: 5\n"
    second = "- prompt: 'a city: night'\n  duration: 8\n  transition: cut\n"
    assert to_yaml(script) == "shots:\n" + first + second


# --- schema, examples, documentation -----------------------------------------------------------------


def test_shipped_schema_is_the_generated_one():
    shipped = json.loads((ROOT / "configs" / "script.schema.json").read_text())
    assert shipped == json_schema(), "run: python -m streamvid.script > configs/script.schema.json"
    jsonschema.Draft202012Validator.check_schema(shipped)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_load_and_play(path):
    script = load_script(path)
    plan = timeline(script, 16, 3)
    assert plan.blocks >= len(script.shots) > 1
    assert parse_script(to_yaml(script), ".yaml") == script
    if path.suffix in (".yaml", ".json") and path.name != "scope.json":
        jsonschema.validate(yaml.safe_load(path.read_text()), json_schema())


def test_the_story_is_long_enough_and_changes_little_at_a_time():
    prompts = pytest.importorskip("streamvid.world.prompts")
    assert load_script(ROOT / "examples" / "story.yaml").duration >= 64
    assert len(load_script(ROOT / "examples" / "story.yaml").shots) >= 7
    for path in EXAMPLES:
        before = None
        for shot in load_script(path).shots:
            assert not prompts.unknown_words(shot.prompt), shot.prompt
            scene = {"weather": "clear", **prompts.parse(shot.prompt)}
            assert len(scene) == 7, shot.prompt
            if before is not None and shot.transition != "cut":
                assert 1 <= sum(scene[name] != before[name] for name in scene) <= 2, shot.prompt
            before = scene


def test_documentation_has_every_field_and_true_examples():
    text = (ROOT / "docs" / "scripts.md").read_text()
    for spec in (*SCRIPT_FIELDS, *SHOT_FIELDS):
        row = next(
            line
            for line in text.splitlines()
            if line.startswith(f"| `{spec.name}` ") and f"| {spec.help} |" in line
        )
        if math.isfinite(spec.maximum) and spec.name != "seed":
            assert f"{spec.minimum} to {spec.maximum}" in row
        assert ("required" in row) == spec.required
        for choice in spec.choices:
            assert f"`{choice}`" in row
    fox = load_script("a fox walks [5s] | it snows [10s] | # a city at night [8s]")
    assert format_timeline(timeline(fox, 16, 3)) in text
    block = re.search(r"```yaml\n(.*?)```", text, re.DOTALL).group(1)
    assert len(parse_script(block, ".yaml").shots) == 3
    spoilt = "shots:\n- {prompt: a, duration: 5}\n- {%s}"
    for wrong in ("prompt: b, duration: -5", "promt: b, duration: 5"):
        message = failure(spoilt % wrong).removeprefix("file.yaml, line 3: ")
        assert message in text
