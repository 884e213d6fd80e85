"""The table of stages, with stages of known behaviour."""

import json

import numpy as np
import pytest
import torch

from streamvid.errors import UserError
from streamvid.evaluation import stage_table
from streamvid.evaluation.stage_table import StageRow, by_prompt, gain, measure, read_rows, table
from streamvid.world.prompts import parse
from streamvid.world.scene import ATTRIBUTES, Scene

SIZES = torch.tensor([len(values) for values in ATTRIBUTES.values()])
asked = []  # (model, part) of every group that was answered


def answers_of(model, options):
    """`good` is always right, `bad` has every second video's motion wrong, `late` switches after its first window."""

    def answer(group):
        asked.append((model, group.part))
        texts = group.then or group.texts
        labels = torch.tensor([Scene(**{"weather": "clear", **parse(t)}).labels() for t in texts])
        windows = labels[:, None].repeat(1, 1 if group.part == "start" else 2, 1)
        if model == "bad":
            windows[::2, :, 3] = (windows[::2, :, 3] + 1) % SIZES[3]
        if model == "late" and group.then:
            old = [Scene(**{"weather": "clear", **parse(t)}).labels() for t in group.texts]
            windows[:, 0] = torch.tensor(old)
        return windows

    return answer


@pytest.fixture(autouse=True)
def stages(monkeypatch):
    asked.clear()
    monkeypatch.setattr(stage_table, "answers_of", answers_of)
    monkeypatch.setattr(stage_table, "load_pipeline", lambda model: model)
    monkeypatch.setattr(stage_table, "shipped_probe", lambda: None)
    monkeypatch.setattr(stage_table, "settings", lambda pipe, *rest: {"weights": pipe})
    monkeypatch.setattr(stage_table, "is_there", lambda model: model != "absent")


def run(rows, folder, **changes):
    return measure(rows, 6, (0, 1), folder, batch=4, **changes)


def test_gains_are_over_the_stage_before_and_absent_stages_are_left_out(tmp_path):
    rows = [
        StageRow("one", "bad", ("start",)),
        StageRow("two", "absent"),
        StageRow("three", "good", ("start", "switch")),
        StageRow("four", "late", ("switch",)),
    ]
    written = []
    found = run(rows, tmp_path, write=lambda result: written.append(json.loads(json.dumps(result))))
    one, three, four = found["stages"]
    assert [row["name"] for row in found["stages"]] == ["one", "three", "four"]
    assert one["start"]["attributes"]["motion"] == 0.5 and "gain" not in one["start"]
    # six prompts, of which every second lacks one of seven attributes
    change = three["start"]["gain"]
    assert change["over"] == "one" and change["difference"] == pytest.approx(0.5 / 7, abs=1e-4)
    assert change["low"] < change["difference"] < change["high"]
    assert four["switch"]["soon"]["changed"]["accuracy"] == 0.0 and four["switch"]["mean"] == 1.0
    assert four["switch"]["gain"] == {"over": "three", "difference": 0.0, "low": 0.0, "high": 0.0, "p": 1.0}
    assert len(written) == 4 and written[0]["stages"][0]["start"] == one["start"]  # after every part
    lines = table(found).splitlines()
    assert len({line.count("|") for line in lines}) == 1 and len(lines) == 5
    assert "+0.071" in lines[3] and "| one |" in lines[2]


def test_a_table_that_is_stopped_goes_on(tmp_path):
    rows = [StageRow("one", "good", ("start",))]
    first = run(rows, tmp_path)
    assert len(asked) == 3
    assert run(rows, tmp_path)["stages"] == first["stages"] and len(asked) == 3
    (tmp_path / "one" / "start" / "1.json").unlink()
    run(rows, tmp_path)
    assert len(asked) == 4
    run([StageRow("one", "bad", ("start",))], tmp_path)  # other weights
    assert len(asked) == 7


def test_shares_are_per_prompt_over_seeds():
    right = torch.zeros(4, 2, 7)
    right[0, 1] = 1  # prompt 0, first seed, last window
    right[3, 1, :3] = 1  # prompt 1, second seed
    np.testing.assert_allclose(by_prompt(right, 2, 2), [0.5, 3 / 14])
    assert gain(np.array([0.1, 0.2, 0.3]), np.array([0.2, 0.3, 0.4]))["difference"] == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stages: [{name: a, model: b, fox: 1}]", "stages.fox is not an option: choose from name, model"),
        ("stages: [{name: a, model: b, parts: [fox]}]", "stages: a: part 'fox' is not known"),
        ("stages: [{name: a, model: b, parts: [minute], clip_steps: 4}]", "choose from start"),
        ("fox: 1", "cannot be read .KeyError.: give a YAML file with a list `stages`"),
    ],
)
def test_mistakes_are_one_sentence(text, message, tmp_path):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        read_rows(tmp_path / "x.yaml")
