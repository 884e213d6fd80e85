"""Transitions: scripts, streams, the schema and the documents know the same ones."""

import re
from pathlib import Path

import jsonschema
import pytest

from streamvid.errors import UserError
from streamvid.script import load_script
from streamvid.script_fields import TRANSITIONS, json_schema
from streamvid.switching import SWITCH_POLICIES, switch_policy

DOCUMENT = Path(__file__).parents[1] / "docs" / "scripts.md"

TRANSITION_FORMS = [
    *TRANSITIONS,
    "recache(bidirectional)",
    "recache(causal , reanchor )",
    "recache(bidirectional,keep_once_full)",
    "blend(8)",
    "blend(12, slerp)",
    "blend(1,lerp)",
]
NO_TRANSITIONS = [
    "recache(sideways)",
    "recache(reanchor)",
    "recache(causal, keep, keep)",
    "recache()",
    "blend(0)",
    "blend(-1)",
    "blend(slerp)",
    "blend(4, cubic)",
    "blend(4, slerp, 2)",
    "cut(3)",
    "cross_only(causal)",
    "recache(causal",
    "Recache",
    "cut, recache",
]


@pytest.mark.parametrize("transition", [*TRANSITION_FORMS, *NO_TRANSITIONS])
def test_scripts_and_streams_know_the_same_transitions(transition):
    shot = {"prompt": "a", "duration": 5, "transition": transition}
    schema, known = jsonschema.Draft202012Validator(json_schema()), transition in TRANSITION_FORMS
    assert schema.is_valid({"shots": [shot]}) == known
    if known:
        switch_policy(transition)
        assert load_script({"shots": [shot]}).shots[0].transition == transition
    else:
        with pytest.raises(UserError):
            switch_policy(transition)
        with pytest.raises(UserError, match="shot 1: transition") as raised:
            load_script({"shots": [shot]})
        assert "\n" not in str(raised.value)


def test_options_of_a_transition_that_do_not_exist_are_told_from_an_unknown_one():
    shot = {"prompt": "a", "duration": 5}
    with pytest.raises(
        UserError, match=r"shot 1: transition 'recache\(sideways\)' has options that do not exist; wr"
    ):
        load_script({"shots": [shot | {"transition": "recache(sideways)"}]})
    with pytest.raises(
        UserError, match="transition is 'fade' but must be one of cross_only, recache, flush, blend"
    ):
        load_script({"shots": [shot | {"transition": "fade"}]})


def test_the_document_lists_every_transition():
    section = DOCUMENT.read_text().split("### Transitions")[1].split("\n## ")[0]
    listed = re.findall(r"^\| `([^`]+)`", section, re.MULTILINE)
    assert [re.match(r"\w+", name)[0] for name in listed] == list(TRANSITIONS) == list(SWITCH_POLICIES)
    for name in listed:
        switch_policy(name)
    for option in (
        "causal",
        "bidirectional",
        "keep",
        "keep_once_full",
        "reencode",
        "reanchor",
        "lerp",
        "slerp",
    ):
        assert f"`{option}`" in section
