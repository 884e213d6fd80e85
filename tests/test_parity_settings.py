"""Recorded streams: every one of their settings is heeded, and what follows from others is checked."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from streamvid.errors import UserError
from streamvid.parity import main, run_case
from streamvid.parity_case import Case
from streamvid.parity_settings import stream_method

GOLDEN = Path(__file__).parent / "golden"


def settings_of(name: str) -> dict:
    return json.loads((GOLDEN / name / "case.json").read_text())


def changed(tmp_path: Path, name: str, **sections: dict) -> Path:
    """A copy of a case with other settings; None takes one away."""
    folder = tmp_path / name
    shutil.copytree(GOLDEN / name, folder)
    settings = settings_of(name)
    for section, values in sections.items():
        settings[section].update(values)
        settings[section] = {key: value for key, value in settings[section].items() if value is not None}
    (folder / "case.json").write_text(json.dumps(settings))
    return folder


FAILS = None  # replayed, and out of tolerance
COMMON = {
    "frames_per_block": (4, "do not match the noise"),
    "blocks": (9, "do not match the noise"),
    "context_noise": (50.0, FAILS),
}
LONGLIVE = COMMON | {
    "local_attn_size": (9, FAILS),
    "sink_size": (2, FAILS),
    "cache_capacity_frames": (15, "frames_in_slots has 12 frames"),
}
NOT_DEEP = "a deep sink in a cache larger than local_attn_size"
# every setting of a case -> another value, and what becomes of it
CHANGES = {
    "longlive_infinite": LONGLIVE
    | {
        "local_attn_size": (9, "ranks or evictions of a buffer that is larger than the 9 frames attended"),
        "cache_capacity_frames": (15, "ranks or evictions of a buffer that is larger than the 12 frames"),
    },
    "longlive_recache_global_sink": LONGLIVE
    | {
        "global_sink": (False, FAILS),
        "switch_frame_indices": ([10, 19], "frame is \\[12, 24\\], and the other settings give \\[12, 21\\]"),
        "switches_applied_at_frame": ([12, 27], "is \\[12, 27\\], and the other settings give \\[12, 24\\]"),
    },
    "longlive_recache_no_global_sink": LONGLIVE
    | {
        "local_attn_size": (9, "a new sink in a buffer that is larger than the 9 frames attended"),
        "cache_capacity_frames": (15, "a new sink in a buffer that is larger than the 12 frames attended"),
        "global_sink": (True, FAILS),
        "switch_frame_indices": ([7, 21], "frame is \\[9, 24\\], and the other settings give \\[9, 21\\]"),
        "switches_applied_at_frame": ([7, 24], "is \\[7, 24\\], and the other settings give \\[9, 24\\]"),
    },
    "rolling_forcing": COMMON
    | {
        "frames_per_block": (5, "do not match the noise"),
        "rolling_window_blocks": (4, "a rolling window of other than one block per level"),
        "windows": (18, "streaming.windows is 18, and the other settings give 19"),
        "attention_frames": (18, FAILS),
        "cache_frames": (27, "frames_in_slots has 24 frames"),
        "sink_frames": (2, FAILS),
    },
    "reward_forcing": COMMON
    | {
        "local_attn_size": (6, "ranks or evictions of a buffer that is larger than the 6 frames attended"),
        "sink_size": (2, FAILS),
        "cache_capacity_frames": (12, "ranks or evictions of a buffer that is larger than the 9 frames"),
        "ema_decay": (0.99, FAILS),
        "evictions": (8, "streaming.evictions is 8, and the other settings give 7"),
    },
    "deep_forcing_ds": COMMON
    | {
        "local_attn_size": (9, NOT_DEEP),
        "sink_size": (5, FAILS),
        "cache_capacity_frames": (15, NOT_DEEP),
        "mode": ("deep sink + participative compression", "streaming.budget_frames is not there"),
    },
    "deep_forcing_short_window": COMMON
    | {
        "frames_per_block": (2, "do not match the noise"),
        "local_attn_size": (9, NOT_DEEP),
        "sink_size": (4, FAILS),
        "cache_capacity_frames": (15, NOT_DEEP),
        "mode": ("deep sink only", "streaming.budget_frames = 10 is not known"),
        "budget_frames": (11, "rolls\\[0\\].tokens_after is 60, and the other settings give 66"),
        "recent_frames": (4, FAILS),
        "score_fusion": ("max", FAILS),
        "topc_max_reuse": (1, FAILS),
        "first_sink_rotation_literal": (12, "rotation_frames is 11, and the other settings give 2.0"),
    },
}


def refusal(folder: Path, message: str, capsys) -> None:
    with pytest.raises(UserError, match=message) as raised:
        run_case(folder)
    assert "\n" not in str(raised.value)
    assert main([folder]) == 2
    assert str(folder) in capsys.readouterr().err


@pytest.mark.parametrize("name", CHANGES)
def test_every_setting_of_a_case_is_among_the_changes(name):
    streaming = settings_of(name)["streaming"]
    assert CHANGES[name].keys() == streaming.keys()
    assert all(value != streaming[key] for key, (value, _) in CHANGES[name].items())


@pytest.mark.parametrize(("name", "key"), [(name, key) for name in CHANGES for key in CHANGES[name]])
def test_no_setting_is_ignored(tmp_path, name, key, capsys):
    value, message = CHANGES[name][key]
    folder = changed(tmp_path, name, streaming={key: value})
    if message is FAILS:
        assert main([folder]) == 1
        assert "FAILED" in capsys.readouterr().out
    else:
        refusal(folder, message, capsys)


@pytest.mark.parametrize(
    ("name", "sections"),
    [
        # as above, where what was recorded beside them would refuse them first
        (
            "reward_forcing",
            {
                "streaming": {"local_attn_size": 6, "cache_capacity_frames": 6, "evictions": 8},
                "cache": {"frames_in_slots": None},
            },
        ),
        ("reward_forcing", {"streaming": {"ema_decay": None, "evictions": None}}),
        ("reward_forcing", {"cache": {"k_stored_after_rope": True}}),
        ("deep_forcing_short_window", {"streaming": {"budget_frames": 11}, "cache": {"rolls": None}}),
        (
            "deep_forcing_short_window",
            {"streaming": {"first_sink_rotation_literal": 20}, "cache": {"rolls": None}},
        ),
        ("deep_forcing", {"streaming": {"topc_max_reuse": 8}}),  # the limit of 7 is reached
        ("longlive_infinite", {"cache": {"k_stored_after_rope": True}}),
        (
            "longlive_recache_global_sink",
            {"streaming": {"switch_frame_indices": [7, 24], "switches_applied_at_frame": [9, 24]}},
        ),
        ("rolling_forcing", {"schedule": {"denoising_step_list": [1000, 800, 600, 400, 300]}}),
        ("rolling_forcing", {"streaming": {"cache_frames": 22}, "cache": {"frames_in_slots": None}}),
        ("deep_forcing_short_window", {"streaming": {"recent_frames": 2}}),
    ],
)
def test_another_setting_is_out_of_tolerance(tmp_path, name, sections, capsys):
    assert main([changed(tmp_path, name, **sections)]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_a_switch_is_rounded_up_to_a_block(tmp_path):
    """Frames 10 to 12 are one and the same switch."""
    folder = changed(tmp_path, "longlive_recache_global_sink", streaming={"switch_frame_indices": [11, 22]})
    assert main([folder]) == 0


@pytest.mark.parametrize(
    ("name", "sections", "message"),
    [
        # keys of another kind of stream
        ("longlive_sink", {"streaming": {"mode": "deep"}}, "a mode other than deep sink only and deep sink"),
        ("longlive_sink", {"streaming": {"budget_frames": 6}}, "streaming.budget_frames = 6 is not known"),
        ("longlive_sink", {"streaming": {"rolling_window_blocks": 4}}, "local_attn_size = 12 is not known"),
        (
            "longlive_sink",
            {"streaming": {"global_sink": True}},
            "streaming.switch_frame_indices is not there",
        ),
        ("longlive_sink", {"streaming": {"windows": 12}}, "windows is 12, and the other settings give None"),
        (
            "rolling_forcing",
            {"streaming": {"evictions": 7}},
            "evictions is 7, and the other settings give None",
        ),
        ("rolling_forcing", {"streaming": {"ema_decay": 0.9}}, "streaming.ema_decay = 0.9 is not known"),
        (
            "reward_forcing",
            {"streaming": {"mode": "deep sink only"}},
            "streaming.mode = 'deep .* is not known",
        ),
        (
            "deep_forcing_ds",
            {"streaming": {"score_fusion": "sum"}},
            "streaming.score_fusion = 'sum' is not known",
        ),
        # values that no option has
        (
            "deep_forcing_short_window",
            {"streaming": {"score_fusion": "mean"}},
            "importance = 'mean' is not known",
        ),
        (
            "deep_forcing_short_window",
            {"streaming": {"recent_frames": 0}},
            "recent = 0 must hold the block of 3",
        ),
        ("deep_forcing_ds", {"cache": {"k_stored_after_rope": False}}, "keys are stored before RoPE"),
        ("reward_forcing", {"streaming": {"ema_decay": 1.5}}, "sink_decay = 1.5 must be between 0 and 1"),
        ("reward_forcing", {"streaming": {"sink_size": 0}}, "sink = 0 leaves evicted frames nothing"),
        ("rolling_forcing", {"streaming": {"cache_frames": 23}}, "frames_in_slots has 24 frames"),
        ("rolling_forcing", {"streaming": {"cache_frames": 5}}, "cache_frames = 5 and window = 21 must both"),
        (
            "rolling_forcing",
            {"schedule": {"denoising_step_list": [1000, 500]}},
            "one block per level \\(2\\)",
        ),
        (
            "longlive_sink",
            {"reference": {"project": "?"}, "streaming": {"local_attn_size": 10}},
            "part of the sink",
        ),
        # what does not follow
        (
            "deep_forcing",
            {"cache": {"rolls": []}},
            "number of cache.rolls is 0, and the other settings give 11",
        ),
        (
            "deep_forcing_ds",
            {"cache": {"rolls": 9}},
            "number of cache.rolls is 9, and the other settings give 8",
        ),
        (
            "deep_forcing_ds",
            {"cache": {"sink_rotation_frames_per_roll": [3] * 8}},
            r"per_roll is \[3, 3.*give \[0\.0, 3\.0",
        ),
        ("longlive_infinite", {"cache": {"layers": 3}}, "cache.layers is 3, and the other settings give 2"),
        ("longlive_infinite", {"cache": {"v_has_rope": True}}, "cache.v_has_rope is True"),
        (
            "longlive_recache_global_sink",
            {"streaming": {"switch_frame_indices": None}},
            "streaming.switch_frame_indices is not there",
        ),
        ("longlive_recache_global_sink", {"prompts": {"segments": 2}}, "is 2, and the switches give 3"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, name, sections, message, capsys):
    refusal(changed(tmp_path, name, **sections), message, capsys)


def test_a_roll_that_is_another_is_refused(tmp_path, capsys):
    rolls = settings_of("deep_forcing")["cache"]["rolls"]
    rolls[3]["block"] += 1
    folder = changed(tmp_path, "deep_forcing", cache={"rolls": rolls})
    refusal(folder, "rolls\\[3\\].block is 14, and the other settings give 13", capsys)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("deep_forcing_short_window", "cache/1/token_id"),
        ("deep_forcing_short_window", "pc/5/0/selected"),
        ("deep_forcing_short_window", "pc/0/1/scores"),
        ("longlive_recache_no_global_sink", "cache_after_switch/1/0/v"),
        ("rolling_forcing", "x0/18"),
        ("rolling_forcing", "cache/0/k"),
    ],
)
def test_every_kind_of_tensor_is_compared(tmp_path, name, tensor):
    folder = changed(tmp_path, name)
    outputs = load_file(folder / "outputs.safetensors")
    outputs[tensor][0, -1] += 1
    save_file(outputs, folder / "outputs.safetensors")
    assert [row.name for row in run_case(folder) if not row.ok] == [tensor]


def test_which_options_stand_for_a_case():
    """By name: settings of the references -> options of methods."""

    def options(name):
        method = stream_method(Case(GOLDEN / name))
        return (
            method.sampler,
            method.positions,
            method.sink_update,
            method.window,
            method.sink,
            method.budget,
        )

    assert options("self_forcing") == ("few_step", "absolute", "static", 21, 0, None)
    assert options("longlive_infinite") == ("few_step", "cache_relative", "static", 12, 3, None)
    assert options("rolling_forcing") == ("rolling", "sink_before_window", "static", 21, 3, None)
    assert options("reward_forcing") == ("few_step", "cache_relative", "ema_release", 9, 3, None)
    assert options("deep_forcing") == ("few_step", "deep_forcing_release", "static", 21, 10, 16)
