"""The field's questions, with arms of known behaviour."""

import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from streamvid.errors import UserError
from streamvid.evaluation import findings
from streamvid.evaluation.findings import Question, answers, main, read_questions
from streamvid.evaluation.method_table import COLUMNS
from streamvid.methods import load_method
from streamvid.models import model_method

ROOT = Path(__file__).resolve().parents[2]
FILE = """
arms:
  - {name: plain, model: diorama}
  - {name: no sink, model: diorama, overrides: {sink: 0}}
  - {name: later, model: runs/absent}
questions:
  - {ask: "Do sinks prevent drift?", arms: [plain, no sink], measures: [drift, end]}
  - {ask: "And later?", arms: [plain, later], measures: [end]}
"""


def test_the_shipped_questions_name_methods_that_exist():
    arms, questions = read_questions(ROOT / "configs" / "stages" / "diorama_findings.yaml")
    for arm in arms:
        load_method(arm.method or "longlive_infinite", arm.overrides)
    assert model_method("diorama") == "longlive_infinite" and len(questions) == 17
    assert {name for question in questions for name in question.arms} == {arm.name for arm in arms}
    assert all(arm.needs for arm in arms if arm.model.startswith("runs/"))
    text = (ROOT / "docs" / "findings.md").read_text()
    assert all(mark in text for mark in findings.MARKS)


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """Videos in no time: without a sink the drift is 2 more, the end 0.25 less for every second case."""
    calls = []

    def rows_of(arm):
        def rows(jobs, arm=arm):
            calls.append(arm.name)
            worse = arm.overrides.get("sink") == 0
            return [
                dict.fromkeys(COLUMNS, 1.0)
                | {
                    "drift": 5.0 + 2 * worse + seed % 1000 / 10,
                    "end": 1.0 - 0.25 * (worse and seed // 1000 % 2),
                }
                for _, seed in jobs
            ]

        return rows

    monkeypatch.setattr(findings, "rows_of", rows_of)
    monkeypatch.setattr(findings, "weights_of", lambda model: "weights")
    (tmp_path / "questions.yaml").write_text(FILE)
    arguments = [str(tmp_path / "questions.yaml"), "--prompts", "8", "--seeds", "0", "1", "--batch", "5"]
    arguments += ["--parts", str(tmp_path / "parts"), "--output", str(tmp_path / "findings.json")]
    arguments += ["--table", str(tmp_path / "table.json")]
    return calls, partial(main, arguments), tmp_path


def test_answers_are_differences_from_the_first_arm(quick):
    calls, ask, folder = quick
    ask()
    found = json.loads((folder / "findings.json").read_text())
    first, second = found["questions"]
    drift, end = first["comparisons"]
    assert (drift["measure"], drift["difference"], drift["low"], drift["high"]) == ("drift", 2.0, 2.0, 2.0)
    assert end["difference"] == pytest.approx(-0.125) and end["low"] < -0.125 < end["high"] <= 0
    assert drift["p"] < 0.05 and drift["p_holm"] == pytest.approx(2 * drift["p"], abs=1e-4)
    assert second["comparisons"] == [] and second["missing"] == ["later"]
    assert [arm["name"] for arm in found["arms"]] == ["plain", "no sink"]
    assert found["arms"][1]["measures"]["drift"]["mean"] == pytest.approx(7.05)
    assert len(calls) == 2 * 4
    ask()  # all is kept
    assert len(calls) == 8


def test_the_page_gets_the_answers_and_keeps_the_rest(quick):
    _, ask, folder = quick
    page = folder / "page.md"
    page.write_text("before\n<!-- findings:start -->\nformer\n<!-- findings:end -->\nafter\n")
    main_with_page = partial(ask.func, [*ask.args[0], "--page", str(page)])
    main_with_page()
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "former" not in text
    assert (
        "### Do sinks prevent drift?" in text and "| no sink, difference | +2.000 [+2.000, +2.000]*" in text
    )
    assert "Not measured yet: later." in text
    page.write_text("no marks")
    with pytest.raises(UserError, match="has no marks: add <!-- findings:start -->"):
        main_with_page()


def table_of(**changes):
    """A stored table of methods in which longlive_infinite drifts by 9."""
    shares = dict.fromkeys(COLUMNS, [0.5] * 8) | {"drift": [9.0] * 8}
    means = {name: {"mean": values[0], "interval": 0.0} for name, values in shares.items()}
    row = {"method": "longlive_infinite", "by_prompt": shares, **means}
    return {"model": "diorama", "prompts": 8, "seeds": [0, 1], "methods": [row], **changes}


def test_presets_come_from_the_table_of_methods(quick):
    """`plain` is one; `no sink` has an override and is measured."""
    calls, ask, folder = quick
    (folder / "table.json").write_text(json.dumps(table_of()))
    ask()
    assert set(calls) == {"no sink"}
    found = json.loads((folder / "findings.json").read_text())
    assert found["arms"][0]["measures"]["drift"]["mean"] == 9.0
    assert found["questions"][0]["comparisons"][0]["difference"] == pytest.approx(7.05 - 9)


@pytest.mark.parametrize("changes", [{"model": "other"}, {"prompts": 9}, {"seeds": [0]}, {"methods": []}])
def test_a_table_of_something_else_is_not_taken(changes, quick):
    calls, ask, folder = quick
    (folder / "table.json").write_text(json.dumps(table_of(**changes)))
    ask()
    assert "plain" in calls


def test_with_stored_nothing_is_made_and_what_is_missing_is_named(quick, monkeypatch):
    calls, ask, folder = quick
    stored = partial(ask.func, [*ask.args[0], "--stored"])
    (folder / "table.json").write_text(json.dumps(table_of()))
    stored()
    found = json.loads((folder / "findings.json").read_text())
    assert not calls and found["questions"][0]["missing"] == ["no sink"]
    ask()
    made = len(calls)
    stored()
    found = json.loads((folder / "findings.json").read_text())
    assert len(calls) == made and found["questions"][0]["missing"] == []
    shutil.rmtree(folder / "parts")  # what they said stands in the answers
    stored()
    again = json.loads((folder / "findings.json").read_text())
    assert len(calls) == made and again == found
    monkeypatch.setattr(findings, "weights_of", lambda model: "other weights")
    stored()
    found = json.loads((folder / "findings.json").read_text())
    assert len(calls) == made and found["questions"][0]["missing"] == ["no sink"]


def test_an_arm_of_fewer_prompts_is_compared_on_these(quick):
    calls, ask, folder = quick
    text = FILE.replace("overrides: {sink: 0}", "overrides: {sink: 0}, prompts: 3").replace(
        "model: runs/absent", "model: runs/absent, needs: make chain"
    )
    (folder / "questions.yaml").write_text(text)
    ask()
    assert calls.count("no sink") == 2 and calls.count("plain") == 4  # batches of 5 of 6 and of 16 videos
    found = json.loads((folder / "findings.json").read_text())
    drift, end = found["questions"][0]["comparisons"]
    assert drift["prompts"] == 3 and drift["difference"] == 2.0
    assert end["difference"] == pytest.approx(-0.25 / 3, abs=1e-4)
    lines = findings.page_lines(found)
    assert any(line.startswith("| no sink, difference (3 prompts) | +2.000") for line in lines)
    assert "Not measured yet: later (`make chain`)." in lines


def test_answers_are_told_in_words():
    shares = {name: np.linspace(0, 1, 20).tolist() for name in COLUMNS}
    less = {**shares, "drift": [value - 0.5 for value in shares["drift"]]}
    found = answers([Question("?", ("a", "b"), ("drift", "end"))], {"a": shares, "b": less})
    assert findings._told(found[0], ["b"]) == ["- b, against a: less drift; not told apart: end."]
    same = answers([Question("?", ("a", "b"), ("end",))], {"a": shares, "b": shares})
    assert findings._told(same[0], ["b"]) == ["- b, against a: no difference that can be told."]


def test_seeds_of_a_prompt_stay_together(quick):
    """Two seeds that differ by chance are one prompt each: no false certainty."""
    _, ask, folder = quick
    ask()
    found = json.loads((folder / "findings.json").read_text())
    assert found["questions"][0]["comparisons"][0]["prompts"] == 8  # of 16 videos


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("no sink]", "fox]"), "'fox' is not known: choose from later, no sink, plain"),
        (("[drift, end]", "[fox]"), "'fox' is not known: choose from"),
        (("overrides", "fox"), "arms.fox is not an option"),
        (("questions:", "fox:"), "cannot be read .KeyError."),
    ],
)
def test_mistakes_are_one_sentence(change, message, tmp_path):
    (tmp_path / "x.yaml").write_text(FILE.replace(*change))
    with pytest.raises(UserError, match=message):
        read_questions(tmp_path / "x.yaml")
