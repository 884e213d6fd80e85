"""The bars of the embedded model, from results of known content."""

import json

import pytest

from benchmarks import diorama_pages
from benchmarks.diorama_pages import Bar


@pytest.mark.parametrize(
    ("value", "low", "high", "verdict"),
    [
        (0.97, 0.96, 0.98, "met"),
        (0.96, 0.94, 0.98, "met, within chance"),
        (0.94, 0.92, 0.949, "not met"),
        (0.94, 0.92, 0.96, "not met, within chance"),
        (1.2, 1.16, 1.3, "not met"),
        (1.2, 1.1, 1.3, "not met, within chance"),
        (1.1, 1.0, 1.2, "met, within chance"),
    ],
)
def test_verdicts(value, low, high, verdict):
    assert Bar("?", value, low, high, "", lowest=0.95, highest=1.15).verdict == verdict


@pytest.fixture
def docs(monkeypatch, tmp_path):
    """A folder with an adherence alone, and what writes other results beside it."""
    source = diorama_pages.DOCS / "diorama_adherence.json"
    adherence = json.loads(source.read_text())
    adherence["start"]["mean"] = 0.995
    adherence["minute"] = {"mean": 0.997, "interval": 0.003}
    (tmp_path / source.name).write_text(json.dumps(adherence))
    monkeypatch.setattr(diorama_pages, "DOCS", tmp_path)

    def write(name, result):
        whole = {"release": adherence["release"], **result}
        (tmp_path / f"diorama_{name}.json").write_text(json.dumps(whole))

    return write


def liveliness(right, flow=1.0, **moments):
    """A result of `streamvid.evaluation.liveliness` with these shares of right attributes per prompt."""

    def row(right, flow):
        told = {"ratio": flow, "low": flow - 0.05, "high": flow + 0.05}
        whole = {"prompts": len(right), "generated": flow, "rendered": 1.0, **told}
        return {
            "generated": flow,
            "rendered": 1.0,
            "against_rendered": told,
            "against_start": told,
            "by_motion": {},
            "by_weather": {"clear": whole},
            "right": {"mean": sum(right) / len(right), "low": 0.0, "high": 1.0},
            "by_prompt": {"right": right},
        }

    rows = {"start": row(right, flow)} | {name: row(*told) for name, told in moments.items()}
    return {"model": "diorama", "command": "?", "prompts": len(right), "seeds": [0], "moments": rows}


def named(text):
    (bar,) = [bar for bar in diorama_pages.bars() if text in bar.asked]
    return bar


def test_what_is_not_stored_is_not_told(docs):
    asked = [bar.asked for bar in diorama_pages.bars()]
    assert len(asked) == 5 and not any("10 min" in text or "1.5 s" in text for text in asked)
    assert named("60 s against").value == pytest.approx(0.002)
    adherence = diorama_pages.stored("adherence")
    del adherence["minute"]
    docs("adherence", adherence)
    assert "60 s against" not in " ".join(bar.asked for bar in diorama_pages.bars())


def test_two_steps_and_ten_minutes_are_paired_by_prompt(docs):
    docs("motion", liveliness([1.0, 0.8, 0.9]))
    docs("two_steps", liveliness([0.9, 0.7, 0.8]))
    docs("long", liveliness([1.0, 0.9], ten_minutes=([1.0, 0.9], 0.7)))
    two, ten = named("2 steps"), named("10 min against")
    assert two.value == pytest.approx(-0.1) and two.verdict == "not met" and two.of == "3 prompts"
    assert (ten.value, ten.verdict) == (
        0.0,
        "met, within chance",
    )  # two prompts without a difference prove little
    assert ten.low == pytest.approx(-3 / 14)
    assert named("flow at 10 min").verdict == "not met" and named("flow of rendered").verdict == "met"
    assert "2 steps: 3 held-out prompts" in diorama_pages.motion_lines()


def test_bars_of_other_weights_are_not_told(docs):
    docs("motion", liveliness([1.0, 0.8]))
    docs("two_steps", {**liveliness([0.9, 0.7]), "release": "another"})
    docs("long", {**liveliness([1.0, 0.9], ten_minutes=([1.0, 0.9], 0.7)), "release": "another"})
    asked = " ".join(bar.asked for bar in diorama_pages.bars())
    assert "flow of rendered" in asked and "2 steps" not in asked and "10 min" not in asked


def test_a_switch_is_judged_by_its_early_window(docs):
    soon = {
        "changed": {"accuracy": 0.94, "count": 96, "interval": 0.04},
        "kept": {"accuracy": 0.99, "count": 352, "interval": 0.001},
    }
    docs("switch", {"prompts": 128, "first": 64, "seeds": [0], "switch": {"soon": soon}})
    changed, kept = named("changed within"), named("kept")
    assert changed.verdict == "not met, within chance" and changed.of == "64 prompts x 1 seeds, 96 attributes"
    assert kept.value == pytest.approx(0.99 - 0.995) and kept.verdict == "met"


def test_diversity_is_told_by_variable(docs):
    told = {"mean": 0.3, "low": 0.28, "high": 0.32}
    rows = {
        "hills": {"prompts": 24, "differs": told, "expected": 0.5, "between": told},
        "sun_x": {
            "prompts": 20,
            "differs": {"mean": 0.66, "low": 0.62, "high": 0.7},
            "expected": 2 / 3,
            "between": told,
        },
    }
    part = {"variables": rows, "spread": {"mean": 0.8, "low": 0.7, "high": 0.9}}
    result = {
        "command": "?",
        "model_name": "diorama",
        "prompts": 24,
        "seeds": 8,
        "model": part,
        "control": {**part, "read_right": 1.0},
    }
    docs("diversity", result)
    assert named("hills").verdict == "not met" and named("sun_x").verdict == "met"
    assert named("sun_x").of == "20 prompts x 8 seeds"
    lines = diorama_pages.diversity_lines()
    assert "| hills | 24 | 0.30 [0.28, 0.32] | 0.50 |" in lines and "by 0.80 [0.70, 0.90] of what" in lines
