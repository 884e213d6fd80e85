"""Presets and their options."""

import pytest

from streamvid.errors import UserError
from streamvid.methods import OPTION_NAMES, SHOT_OPTION_NAMES, Method, load_method, method_names

FOUR_STEPS = (1000.0, 750.0, 500.0, 250.0)
# DESIGN, "Methods as compositions": sampler, block, window, sink, positions, transition, and what else is not the default
PRESETS = {
    "self_forcing": ("few_step", 3, 21, 0, "absolute", "cross_only", {}),
    "causal_forcing_framewise": ("few_step", 1, 21, 0, "absolute", "cross_only", {}),
    "longlive": ("few_step", 3, 12, 3, "absolute", "recache", {}),
    "longlive_infinite": ("few_step", 3, 12, 3, "cache_relative", "recache", {}),
    "longlive2_multishot": (
        "few_step",
        8,
        32,
        8,
        "absolute",
        "shot",
        {
            "shot_offset": 8,
            "pin_shots": True,
            "solver": "unipc",
            "denoising_steps": (999.0, 749.25, 499.5, 249.75),
        },
    ),
    "streamdit": (
        "rolling",
        3,
        15,
        0,
        "absolute",
        "cross_only",
        {"micro_steps": 2, "denoising_steps": (1000.0, 875.0, 750.0, 625.0, 500.0, 375.0, 250.0, 125.0)},
    ),
    "rolling_forcing": ("rolling", 3, 21, 3, "sink_before_window", "cross_only", {}),
    "rolling_forcing_release": (
        "rolling",
        3,
        21,
        3,
        "sink_before_window",
        "cross_only",
        {"context_window": "release"},
    ),
    "reward_forcing": ("few_step", 3, 9, 3, "cache_relative", "cross_only", {"sink_update": "ema"}),
    "deep_sink": ("few_step", 3, 21, 10, "sink_before_window", "cross_only", {}),
    "deep_forcing": ("few_step", 3, 21, 10, "sink_before_window", "cross_only", {"budget": 16, "recent": 4}),
    "deep_forcing_release": (
        "few_step",
        3,
        21,
        10,
        "deep_forcing_release",
        "cross_only",
        {"budget": 16, "recent": 4, "first_sink_shift": 5},
    ),
    "infinity_rope": ("few_step", 3, 21, 3, "cache_relative", "flush", {}),
    "krea": (
        "few_step",
        3,
        6,
        1,
        "cache_relative",
        "blend(4, lerp)",
        {"recompute": True, "denoising_steps": (1000.0, 750.0, 500.0, 250.0, 0.0)},
    ),
    "memrope": (
        "few_step",
        3,
        12,
        5,
        "cache_relative",
        "cross_only",
        {"sink_update": "memory", "memory_decays": (0.99, 0.9)},
    ),
    "streamdiffusionv2": (
        "few_step",
        3,
        12,
        3,
        "cache_relative",
        "cross_only",
        {"sink_update": "adaptive", "refresh_below": 0.8},
    ),
    "flex": (
        "few_step",
        3,
        21,
        3,
        "absolute",
        "cross_only",
        {"trained_frames": 21, "rope_interpolation": 6.0, "noise_correlation": -0.2},
    ),
    "ultravico": ("few_step", 3, 42, 0, "absolute", "cross_only", {"trained_frames": 21, "far_scale": 0.9}),
    "causal_forcing_1step": (
        "few_step",
        1,
        21,
        0,
        "absolute",
        "cross_only",
        {"denoising_steps": (1000.0,), "first_denoising_steps": FOUR_STEPS},
    ),
    "causal_forcing_2step": (
        "few_step",
        1,
        21,
        0,
        "absolute",
        "cross_only",
        {"denoising_steps": (1000.0, 500.0), "first_denoising_steps": FOUR_STEPS},
    ),
    "streamvid_lean": ("few_step", 3, 9, 3, "cache_relative", "cross_only", {}),
    "streamvid_recache": ("few_step", 3, 9, 3, "cache_relative", "recache(causal, reencode)", {}),
    "lol": ("few_step", 3, 12, 3, "absolute", "recache", {"head_jitter": 0.5}),
    "streamingllm": ("few_step", 3, 21, 3, "cache_relative", "cross_only", {}),
}
NAMES = ("sampler", "frames_per_block", "window", "sink", "positions", "transition")
ROLLING_STEPS = (1000.0, 800.0, 600.0, 400.0, 200.0)


def test_every_preset_is_here():
    assert method_names() == sorted(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_those_of_the_papers(name):
    *options, others = PRESETS[name]
    method = load_method(name)
    assert method.name == name and len(method.source) > 20
    steps = {"denoising_steps": ROLLING_STEPS} if method.sampler == "rolling" else {}
    expected = Method(name, method.source, **dict(zip(NAMES, options, strict=True)), **steps | others)
    assert method == expected


@pytest.mark.parametrize("name", PRESETS)
def test_the_window_of_every_preset_fits(name):
    method = load_method(name)
    window = method.window_options()
    assert (window.window, window.sink) == (method.window, method.sink) and window.slots >= method.window
    assert window.joint_blocks == {"streamdit": 4}.get(name, 5 if method.sampler == "rolling" else 1)


def test_overrides_change_single_options():
    method = load_method("longlive", {"window": 9, "denoising_steps": [1000, 500]})
    assert (method.window, method.sink, method.denoising_steps) == (9, 3, (1000.0, 500.0))
    assert method.with_overrides({}) is method
    assert method.with_overrides({"denoising_steps": None}).denoising_steps is None
    assert method.with_overrides({"context_timestep": 20}).context_timestep == 20.0
    assert load_method("deep_forcing", {"budget": None, "recent": None}).window_options().budget is None
    assert set(SHOT_OPTION_NAMES) <= set(OPTION_NAMES) and "name" not in OPTION_NAMES


def test_a_rolling_window_has_one_block_per_level():
    assert load_method("rolling_forcing", {"denoising_steps": [1000, 500]}).window_options().joint_blocks == 2
    method = load_method("rolling_forcing", {"denoising_steps": None})
    assert method.window_options(levels=4).joint_blocks == 4


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"windw": 9},
            r"option windw is not known \(did you mean window\?\): choose from sampler, solver, micro_steps, ",
        ),
        ({"name": "mine"}, "option name is not known"),
        ({"window": 9.5}, r"window = 9\.5 must be a whole number"),
        ({"window": True}, "window = True must be a whole number"),
        ({"window": None}, "window = None must be a whole number"),
        ({"sink": "three"}, "sink = 'three' must be a whole number"),
        ({"budget": 3.5}, r"budget = 3\.5 must be a whole number"),
        ({"pin_shots": 1}, "pin_shots = 1 must be true or false"),
        ({"positions": 3}, "positions = 3 must be a name"),
        (
            {"positions": "polar"},
            "positions = 'polar' is not known: choose one of absolute, cache_relative, sink_bef",
        ),
        ({"sampler": "euler"}, "sampler = 'euler' is not known: choose one of few_step, rolling"),
        (
            {"sink_update": "mean"},
            "sink_update = 'mean' is not known: choose one of static, ema, ema_release, memory, adaptive",
        ),
        ({"sink_precision": "half"}, "sink_precision = 'half' is not known: choose one of float32, native"),
        ({"sink_filling": "zeros"}, "sink_filling = 'zeros' is not known: choose one of clean, longlive_"),
        ({"importance": "mean"}, "importance = 'mean' is not known: choose one of sum, max"),
        ({"context_window": "all"}, "context_window = 'all' is not known: choose one of same, release"),
        (
            {"transition": "fade"},
            "transition = 'fade' is not known: choose one of cross_only, recache, flush, blend",
        ),
        ({"transition": "blend(x)"}, r"transition = 'blend\(x\)' has options that do not exist: blend takes"),
        ({"denoising_steps": "fast"}, "denoising_steps = 'fast' must be a list of numbers, e.g."),
        ({"denoising_steps": [True]}, r"denoising_steps = \[True\] must be a list of numbers"),
        ({"denoising_steps": []}, r"denoising_steps = \[\] must be a list of numbers"),
        ({"context_timestep": "0"}, "context_timestep = '0' must be a number"),
        ({"context_timestep": 2000}, r"context_timestep = 2000\.0 must be between 0 and 1000"),
        ({"past_bias": 0}, r"past_bias = 0\.0 must be above 0 and at most 1"),
        ({"past_bias": 2}, r"past_bias = 2\.0 must be above 0 and at most 1"),
        ({"far_decay": 0, "trained_frames": 9}, r"far_decay = 0\.0 must be above 0 and at most 1"),
        ({"far_scale": 0, "trained_frames": 9}, r"far_scale = 0\.0 must be above 0 and at most 1"),
        ({"far_scale": 0.5}, r"far_scale = 0\.5 would have no effect: set trained_frames"),
        ({"first_denoising_steps": [500, 1000]}, r"first_denoising_steps = \[500\.0, 1000\.0\] must be desc"),
        ({"first_denoising_steps": [1200]}, r"first_denoising_steps = \[1200\.0\] must be descending"),
        ({"far_decay": 0.5}, r"far_decay = 0\.5 would have no effect: set trained_frames"),
        ({"rope_interpolation": 2}, r"rope_interpolation = 2\.0 would have no effect: set trained_frames"),
        ({"rope_interpolation": 0.5, "trained_frames": 9}, r"rope_interpolation = 0\.5 must be at least 1"),
        ({"trained_frames": 0, "far_decay": 0.5}, "trained_frames = 0 must be at least 1"),
        ({"trained_frames": 21}, "trained_frames = 21 would have no effect: set far_scale, far_decay or"),
        ({"head_jitter": 1}, r"head_jitter = 1\.0 must be at least 0 and below 1"),
        ({"head_jitter": -0.1}, r"head_jitter = -0\.1 must be at least 0 and below 1"),
        ({"noise_correlation": -1}, r"noise_correlation = -1\.0 must be between -1 and 1"),
        ({"sink_update": "ema", "sink_decay": 1.1}, r"sink_decay = 1\.1 must be between 0 and 1"),
        ({"sink_decay": 0.5}, r"sink_decay = 0\.5 would have no effect: set sink_update = ema"),
        (
            {"memory_decays": [0.5]},
            r"memory_decays = \(0\.5,\) would have no effect: set sink_update = memory",
        ),
        ({"memory_decays": [], "sink_update": "memory"}, r"memory_decays = \[\] must be a list of numbers"),
        (
            {"memory_decays": [1.5], "sink_update": "memory"},
            r"memory_decays = \[1\.5\] must be numbers between 0",
        ),
        (
            {"memory_decays": [0.9] * 4, "sink_update": "memory"},
            "sink = 3 cannot hold 4 memory frames: give a larger sink",
        ),
        ({"refresh_below": 0.5}, r"refresh_below = 0\.5 would have no effect: set sink_update = adaptive"),
        ({"refresh_below": 2, "sink_update": "adaptive"}, r"refresh_below = 2\.0 must be between -1 and 1"),
        ({"shot_offset": -1}, "shot_offset = -1 must not be negative: give 0"),
        ({"kv_dtype": "int4"}, "kv_dtype = 'int4' is not known: choose one of native, int8, fp8, kivi2"),
        (
            {"kv_dtype": "int8", "window": 21, "budget": 16},
            "kv_dtype = 'int8' stores whole frames and a budget",
        ),
        ({"solver": "euler"}, "solver = 'euler' is not known: choose one of renoise, unipc"),
        ({"micro_steps": 2}, "micro_steps = 2 would have no effect: set sampler = rolling"),
        ({"micro_steps": 0}, "micro_steps = 0 must be at least 1"),
        ({"max_reuse": 0}, "max_reuse = 0 must be at least 1"),
        ({"window": 5}, "window = 5 cannot hold sink = 3 and a block of 3 .* give a window of at least 6"),
    ],
)
def test_impossible_options_are_named(overrides, message):
    with pytest.raises(UserError, match=message) as error:
        load_method("longlive", overrides)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        (
            "rolling_forcing",
            {"first_denoising_steps": [1000]},
            r"first_denoising_steps = \(1000.0,\) would have no effect: set sampler = few_step",
        ),
        ("rolling_forcing", {"micro_steps": 2}, "micro_steps = 2 does not divide the 5 denoising steps"),
        (
            "rolling_forcing",
            {"solver": "unipc"},
            "solver = 'unipc' would have no effect: set sampler = few_step",
        ),
        (
            "rolling_forcing",
            {"window": 17},
            "window = 17 cannot hold sink = 3 and 5 blocks of 3 .* at least 18",
        ),
        (
            "rolling_forcing",
            {"denoising_steps": [9, 8, 7, 6, 5, 4, 3]},
            "window = 21 .* 7 blocks .* at least 24",
        ),
        (
            "reward_forcing",
            {"sink": 0},
            "sink = 0 leaves .* nothing to be fused into: give a sink or sink_update = s",
        ),
        ("deep_forcing", {"budget": 13}, r"budget = 13 must lie between sink \+ recent = 14 and window = 21"),
        ("deep_forcing", {"budget": 22}, r"budget = 22 must lie between sink \+ recent = 14 and window = 21"),
        (
            "deep_forcing",
            {"recent": 2},
            "recent = 2 must hold the block of 3 latent frames itself: give at least",
        ),
        (
            "deep_forcing",
            {"sampler": "rolling", "denoising_steps": [9, 1]},
            "budget = 16 .* joint blocks.*: leave",
        ),
        ("deep_forcing", {"sink_update": "ema"}, "budget = 16 .* a fused sink.*: leave the budget out"),
        (
            "deep_forcing",
            {"positions": "cache_relative"},
            "budget = 16 .* positions = cache_relative: leave the",
        ),
        (
            "deep_forcing",
            {"pin_shots": True, "sink": 6},
            "budget = 16 .* pinned shots.*: leave the budget out",
        ),
        (
            "longlive2_multishot",
            {"window": 23},
            "window = 23 cannot hold sink = 8 and a block of 8 .* at least 24",
        ),
        (
            "longlive2_multishot",
            {"positions": "cache_relative"},
            "positions = cache_relative moves pinned .*: use",
        ),
        # options that would do nothing
        (
            "deep_forcing",
            {"budget": None},
            "recent = 4 would have no effect: set a budget, or leave recent out",
        ),
        ("longlive", {"importance": "max"}, "importance = 'max' would have no effect: set a budget"),
        (
            "longlive",
            {"sink_filling": "longlive_release"},
            "sink_filling = 'longlive_release' would have no effect: set sampler = few_step and a sink above",
        ),
        ("longlive", {"max_reuse": 3}, "max_reuse = 3 would have no effect: set a budget"),
        ("longlive", {"sink_decay": 0.9}, r"sink_decay = 0\.9 would have no effect: set sink_update = ema"),
        (
            "longlive",
            {"sink_precision": "native"},
            "sink_precision = 'native' would have no effect: set sink_upd",
        ),
        (
            "longlive",
            {"first_sink_shift": 5},
            "first_sink_shift = 5 would have no effect: set positions = deep_",
        ),
        (
            "longlive",
            {"context_window": "release"},
            "context_window = 'release' would have no effect: set sampler",
        ),
        ("longlive", {"cache_frames": 24}, "cache_frames = 24 would have no effect: set sampler = rolling"),
        (
            "longlive_infinite",
            {"shot_offset": 8},
            "shot_offset = 8 would have no effect: set other positions",
        ),
    ],
)
def test_options_that_do_not_go_together_are_named(name, overrides, message):
    with pytest.raises(UserError, match=message) as error:
        load_method(name, overrides)
    assert "\n" not in str(error.value)


def test_an_unknown_method_is_named_with_the_nearest():
    with pytest.raises(
        UserError, match=r"method = 'longlife' is not known \(did you mean longlive\?\): choose one of"
    ):
        load_method("longlife")
    with pytest.raises(UserError, match="transition = 'fade'"):
        Method(transition="fade")
