"""Presets and their options."""

import pytest

from streamvid.errors import UserError
from streamvid.methods import OPTION_NAMES, SHOT_OPTION_NAMES, Method, load_method, method_names

# DESIGN, "Methods as compositions": block, window, sink, positions, transition
PRESETS = {
    "self_forcing": (3, 21, 0, "absolute", "cross_only"),
    "longlive": (3, 12, 3, "absolute", "recache"),
    "longlive_infinite": (3, 12, 3, "cache_relative", "recache"),
}


@pytest.mark.parametrize("name", method_names())
def test_every_preset_can_be_loaded_and_cites_its_source(name):
    method = load_method(name)
    assert method.name == name and len(method.source) > 20
    assert method.window_options().window == method.window


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_those_of_the_papers(name):
    method = load_method(name)
    options = (method.frames_per_block, method.window, method.sink, method.positions, method.transition)
    assert options == PRESETS[name]
    assert method.denoising_steps is None and method.context_timestep == 0


def test_overrides_change_single_options():
    method = load_method("longlive", {"window": 9, "denoising_steps": [1000, 500]})
    assert (method.window, method.sink, method.denoising_steps) == (9, 3, (1000.0, 500.0))
    assert method.with_overrides({}) is method
    assert method.with_overrides({"denoising_steps": None}).denoising_steps is None
    assert method.with_overrides({"context_timestep": 20}).context_timestep == 20.0
    assert set(SHOT_OPTION_NAMES) <= set(OPTION_NAMES) and "name" not in OPTION_NAMES


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"windw": 9},
            r"option windw is not known \(did you mean window\?\): choose from frames_per_block, window",
        ),
        ({"name": "mine"}, "option name is not known"),
        ({"window": 9.5}, r"window = 9\.5 must be a whole number"),
        ({"window": True}, "window = True must be a whole number"),
        ({"sink": "three"}, "sink = 'three' must be a whole number"),
        ({"positions": 3}, "positions = 3 must be a name"),
        ({"positions": "polar"}, "positions = 'polar' is not known: choose one of absolute, cache_relative"),
        ({"transition": "fade"}, "transition = 'fade' is not known: choose one of cross_only, recache, cut"),
        ({"denoising_steps": "fast"}, "denoising_steps = 'fast' must be a list of numbers, e.g."),
        ({"denoising_steps": [True]}, r"denoising_steps = \[True\] must be a list of numbers"),
        ({"denoising_steps": []}, r"denoising_steps = \[\] must be a list of numbers"),
        ({"context_timestep": "0"}, "context_timestep = '0' must be a number"),
        ({"context_timestep": 2000}, r"context_timestep = 2000\.0 must be between 0 and 1000"),
        ({"window": 5}, "window = 5 cannot hold sink = 3 and a block of 3 .* give a window of at least 6"),
    ],
)
def test_impossible_options_are_named(overrides, message):
    with pytest.raises(UserError, match=message):
        load_method("longlive", overrides)


def test_an_unknown_method_is_named_with_the_nearest():
    with pytest.raises(
        UserError, match=r"method = 'longlife' is not known \(did you mean longlive\?\): choose one of"
    ):
        load_method("longlife")
    with pytest.raises(UserError, match="transition = 'fade'"):
        Method(transition="fade")
