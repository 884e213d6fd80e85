"""Methods: named compositions of independent options, read from `configs/methods/*.yaml`."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from importlib import resources
from typing import Any

import yaml

from streamvid.errors import UserError
from streamvid.switching import switch_policy
from streamvid.window import WindowOptions


@dataclass(frozen=True)
class Method:
    """How a stream is generated, apart from the model.

    Args:
        name, source: of the preset; source is the paper or release it reproduces.
        frames_per_block, window, sink, positions: what a block attends (`WindowOptions`), in latent frames.
        denoising_steps: levels of the few-step sampler before warping; None takes those of the model's scheduler.
        context_timestep: timestep of the context pass (the releases' `context_noise`; no noise is added).
        transition: prompt-switch policy where a script or a live prompt names none (streamvid.switching).
    """

    name: str = "custom"
    source: str = ""
    frames_per_block: int = 3
    window: int = 12
    sink: int = 3
    positions: str = "absolute"
    denoising_steps: tuple[float, ...] | None = None
    context_timestep: float = 0.0
    transition: str = "recache"

    def __post_init__(self) -> None:
        switch_policy(self.transition)
        self.window_options()  # refuses impossible windows before anything is allocated
        if not 0 <= self.context_timestep <= 1000:
            raise UserError(
                f"context_timestep = {self.context_timestep} must be between 0 and 1000; 0 is usual"
            )

    def window_options(self) -> WindowOptions:
        return WindowOptions(self.frames_per_block, self.window, self.sink, self.positions)

    def with_overrides(self, overrides: Mapping[str, Any]) -> Method:
        """This method with some options changed.

        Raises:
            UserError: an option does not exist or its value is impossible.
        """
        changes = {name: _typed(name, value) for name, value in overrides.items()}
        return replace(self, **changes) if changes else self


OPTION_NAMES = tuple(f.name for f in fields(Method) if f.name not in ("name", "source"))
# Options that may change while a stream runs: a shot of a script may override them.
SHOT_OPTION_NAMES = ("denoising_steps",)


def method_names() -> list[str]:
    """Names of the shipped presets."""
    return sorted(
        entry.name.removesuffix(".yaml") for entry in _folder().iterdir() if entry.name.endswith(".yaml")
    )


def load_method(name: str, overrides: Mapping[str, Any] | None = None) -> Method:
    """The preset called `name`, with `overrides` of single options.

    Raises:
        UserError: no such preset, or an impossible option.
    """
    if name not in method_names():
        raise UserError(
            f"method = {name!r} is not known{_nearest(name, method_names())}: choose one of {', '.join(method_names())}"
        )
    values = yaml.safe_load((_folder() / f"{name}.yaml").read_text())
    return (
        Method(name=name, source=values.pop("source")).with_overrides(values).with_overrides(overrides or {})
    )


def _folder():
    return resources.files("streamvid.configs") / "methods"


def _typed(name: str, value: Any) -> Any:
    if name not in OPTION_NAMES:
        raise UserError(
            f"option {name} is not known{_nearest(name, OPTION_NAMES)}: choose from {', '.join(OPTION_NAMES)}"
        )
    if name == "denoising_steps":
        levels = value if isinstance(value, Sequence) and not isinstance(value, str) else None
        if value is None:
            return None
        if not levels or not all(isinstance(v, int | float) and not isinstance(v, bool) for v in levels):
            raise UserError(
                f"denoising_steps = {value!r} must be a list of numbers, e.g. [1000, 750, 500, 250]"
            )
        return tuple(float(v) for v in levels)
    if name == "context_timestep":
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise UserError(f"context_timestep = {value!r} must be a number")
        return float(value)
    wanted: type = str if name in ("positions", "transition") else int
    if not isinstance(value, wanted) or isinstance(value, bool):
        raise UserError(f"{name} = {value!r} must be {'a name' if wanted is str else 'a whole number'}")
    return value


def _nearest(name: str, known: Sequence[str]) -> str:
    match = difflib.get_close_matches(name, known, 1)
    return f" (did you mean {match[0]}?)" if match else ""
