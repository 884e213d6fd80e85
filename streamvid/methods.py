"""Methods: named compositions of independent options, read from `configs/methods/*.yaml`."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from importlib import resources
from typing import Any

import yaml

from streamvid.compression import IMPORTANCE
from streamvid.context import SINK_PRECISIONS
from streamvid.errors import UserError
from streamvid.kv_storage import KV_DTYPES
from streamvid.positions import POSITIONS
from streamvid.sampler import SAMPLERS, SOLVERS, FewStepSampler, RollingSampler, Sampler
from streamvid.sinks import SINK_UPDATES
from streamvid.switching import switch_policy
from streamvid.window import SINK_FILLINGS, WindowOptions

CHOICES = {
    "sampler": SAMPLERS,
    "solver": SOLVERS,
    "sink_update": SINK_UPDATES,
    "sink_precision": SINK_PRECISIONS,
    "sink_filling": SINK_FILLINGS,
    "positions": tuple(POSITIONS),
    "importance": tuple(IMPORTANCE),
    "kv_dtype": KV_DTYPES,
    "context_window": ("same", "release"),
}

# An option that only counts beside another one -> what to set, and whether it counts.
COUNTS_WITH: dict[str, tuple[str, Callable[[Method], bool]]] = {
    "sink_decay": ("sink_update = ema", lambda m: m.sink_update in ("ema", "ema_release")),
    "memory_decays": ("sink_update = memory", lambda m: m.sink_update == "memory"),
    "refresh_below": ("sink_update = adaptive", lambda m: m.sink_update == "adaptive"),
    "sink_precision": ("sink_update = ema", lambda m: m.sink_update != "static"),
    "sink_filling": (
        "sampler = few_step and a sink above frames_per_block",
        lambda m: m.sampler == "few_step" and m.sink > m.frames_per_block,
    ),
    "recent": ("a budget", lambda m: m.budget is not None),
    "importance": ("a budget", lambda m: m.budget is not None),
    "max_reuse": ("a budget", lambda m: m.budget is not None),
    "first_sink_shift": (
        "positions = deep_forcing_release",
        lambda m: m.positions == "deep_forcing_release",
    ),
    "shot_offset": ("other positions", lambda m: m.positions != "cache_relative"),
    "solver": ("sampler = few_step", lambda m: m.sampler == "few_step"),
    "micro_steps": ("sampler = rolling", lambda m: m.sampler == "rolling"),
    "context_window": ("sampler = rolling", lambda m: m.sampler == "rolling"),
    "cache_frames": ("sampler = rolling", lambda m: m.sampler == "rolling"),
    "reencode": ("recompute = True and sink = 0", lambda m: m.recompute and m.sink == 0),
    "first_denoising_steps": ("sampler = few_step", lambda m: m.sampler == "few_step"),
    "far_decay": ("trained_frames", lambda m: m.trained_frames is not None),
    "far_scale": ("trained_frames", lambda m: m.trained_frames is not None),
    "rope_interpolation": ("trained_frames", lambda m: m.trained_frames is not None),
    "trained_frames": (
        "far_scale, far_decay or rope_interpolation",
        lambda m: not m.far_scale == m.far_decay == m.rope_interpolation == 1.0,
    ),
}


@dataclass(frozen=True)
class Method:
    """How a stream is generated, apart from the model.

    Args:
        name, source: of the preset; source is the paper or release it reproduces.
        sampler, solver, micro_steps: how blocks come out of noise (streamvid.sampler).
        frames_per_block, window, sink: what a block attends (`WindowOptions`), in latent frames.
        sink_update: static, or how evicted frames change the sink: ema, ema_release, memory, adaptive (streamvid.sinks).
        sink_decay, sink_precision: share of the sink that stays at each average, and the precision it is kept in.
        sink_filling: how a sink larger than a block is seen until the stream has filled it (streamvid.window).
        memory_decays: with memory, the share that stays of each of the last sink frames, slow ones first.
        refresh_below: with adaptive, cosine similarity of latents below which an evicted frame replaces a sink frame.
        positions: at which temporal positions frames are seen (streamvid.positions).
        budget, recent: a full window is compressed to so many frames, of which so many recent ones stay whole.
        importance, max_reuse: how compression ranks tokens (streamvid.compression), and how often it may choose one.
        first_sink_shift: positions that the sink moves at the first eviction, with positions = deep_forcing_release.
        shot_offset, pin_shots: positions skipped at a new shot; whether its first frames stay in the window.
        past_bias: factor in (0, 1] on the attention weight of past frames other than the first (Daydream Scope).
        trained_frames: latent frames of the videos that the weights were trained on; what counts as far and as slow.
        far_scale: factor in (0, 1] on the attention scores of frames seen `trained_frames` or further away (UltraViCo).
        far_decay: the same on their attention weight, so that negative scores count less too.
        rope_interpolation: how much the temporal frequencies that training saw too little of are slowed down (FLEX).
        head_jitter: how much the heads' temporal frequencies differ, as a share of the base (LoL).
        noise_correlation: of the noise of neighbouring frames in a block, negative for antiphase noise (FLEX).
        denoising_steps: levels of the few-step sampler before warping; None takes those of the model's scheduler.
        first_denoising_steps: other levels for the first block of a stream or scene (Causal-Forcing's one and two steps).
        recompute: before every block its past is written anew from clean latents; no context passes (Krea).
        reencode: the oldest frame of that past comes from its pixels, encoded anew as a picture (Krea, without its
            keep_first_frame).
        context_timestep: timestep of the context pass (the releases' `context_noise`; no noise is added).
        context_window: what the context pass of the rolling sampler sees: the same as denoising, or what the release shows.
        cache_frames: frames that the rolling sampler's cache holds at most, as the release counts them; None: sink + window.
        kv_dtype: how keys and values of finished frames are stored (streamvid.kv_storage).
        transition: prompt-switch policy where a script or a live prompt names none (streamvid.switching).
    """

    name: str = "custom"
    source: str = ""
    sampler: str = "few_step"
    solver: str = "renoise"
    micro_steps: int = 1
    frames_per_block: int = 3
    window: int = 12
    sink: int = 3
    sink_update: str = "static"
    sink_decay: float = 0.999
    sink_precision: str = "float32"
    sink_filling: str = "clean"
    memory_decays: tuple[float, ...] = (0.99, 0.9)
    refresh_below: float = 0.8
    positions: str = "absolute"
    budget: int | None = None
    recent: int | None = None
    importance: str = "sum"
    max_reuse: int = 7
    first_sink_shift: int = 0
    shot_offset: int = 0
    pin_shots: bool = False
    past_bias: float = 1.0
    trained_frames: int | None = None
    far_scale: float = 1.0
    far_decay: float = 1.0
    rope_interpolation: float = 1.0
    head_jitter: float = 0.0
    noise_correlation: float = 0.0
    denoising_steps: tuple[float, ...] | None = None
    first_denoising_steps: tuple[float, ...] | None = None
    recompute: bool = False
    reencode: bool = False
    context_timestep: float = 0.0
    context_window: str = "same"
    cache_frames: int | None = None
    kv_dtype: str = "native"
    transition: str = "recache"

    def __post_init__(self) -> None:
        switch_policy(self.transition)
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise UserError(
                    f"{name} = {getattr(self, name)!r} is not known: choose one of {', '.join(choices)}"
                )
        if self.micro_steps < 1:
            raise UserError(f"micro_steps = {self.micro_steps} must be at least 1")
        self.window_options()  # refuses impossible windows before anything is allocated
        if not 0 <= self.context_timestep <= 1000:
            raise UserError(
                f"context_timestep = {self.context_timestep} must be between 0 and 1000; 0 is usual"
            )
        if not 0 <= self.sink_decay <= 1:
            raise UserError(f"sink_decay = {self.sink_decay} must be between 0 and 1; 0.999 is usual")
        if not self.memory_decays or not all(0 <= decay <= 1 for decay in self.memory_decays):
            raise UserError(
                f"memory_decays = {list(self.memory_decays)} must be numbers between 0 and 1, e.g. [0.99, 0.9]"
            )
        if not -1 <= self.refresh_below <= 1:
            raise UserError(f"refresh_below = {self.refresh_below} must be between -1 and 1; 0.8 is usual")
        if not 0 < self.past_bias <= 1:
            raise UserError(f"past_bias = {self.past_bias} must be above 0 and at most 1, which is no bias")
        if not 0 < self.far_decay <= 1:
            raise UserError(f"far_decay = {self.far_decay} must be above 0 and at most 1, which is no decay")
        if not 0 < self.far_scale <= 1:
            raise UserError(
                f"far_scale = {self.far_scale} must be above 0 and at most 1, which scales nothing"
            )
        if self.trained_frames is not None and self.trained_frames < 1:
            raise UserError(f"trained_frames = {self.trained_frames} must be at least 1")
        if self.rope_interpolation < 1:
            raise UserError(
                f"rope_interpolation = {self.rope_interpolation} must be at least 1, which changes nothing"
            )
        if not 0 <= self.head_jitter < 1:
            raise UserError(f"head_jitter = {self.head_jitter} must be at least 0 and below 1; 0.5 is much")
        if not -1 < self.noise_correlation < 1:
            raise UserError(f"noise_correlation = {self.noise_correlation} must be between -1 and 1")
        first = self.first_denoising_steps or (1000,)
        if first[0] > 1000 or first[-1] < 0 or sorted({*first}, reverse=True) != [*first]:
            raise UserError(
                f"first_denoising_steps = {list(first)} must be descending numbers from 1000 to 0, e.g. [1000, 500]"
            )
        if self.max_reuse < 1:
            raise UserError(f"max_reuse = {self.max_reuse} must be at least 1")
        if self.recompute and (
            self.sampler == "rolling" or self.sink_update != "static" or self.budget or self.pin_shots
        ):
            raise UserError(
                "recompute = True writes whole frames of the past anew, which excludes sampler = rolling, a sink_update, a "
                "budget and pin_shots: leave it out or change them"
            )
        if self.kv_dtype != "native" and self.budget:
            raise UserError(
                f"kv_dtype = {self.kv_dtype!r} stores whole frames and a budget keeps single tokens: leave one of them out"
            )
        if self.shot_offset < 0:
            raise UserError(
                f"shot_offset = {self.shot_offset} must not be negative: give 0 to skip no positions"
            )
        for name, (other, counts) in COUNTS_WITH.items():
            value = getattr(self, name)
            if value != _DEFAULTS[name] and not counts(self):
                raise UserError(f"{name} = {value!r} would have no effect: set {other}, or leave {name} out")

    def window_options(self, levels: int | None = None) -> WindowOptions:
        """The window, with as many jointly denoised blocks as the sampler has `levels`, if it denoises jointly."""
        known = levels or (len(self.denoising_steps) if self.denoising_steps else self.micro_steps)
        if known % self.micro_steps:
            raise UserError(
                f"micro_steps = {self.micro_steps} does not divide the {known} denoising steps: every block of the window "
                "must be as many levels ahead of the next"
            )
        return WindowOptions(
            self.frames_per_block,
            self.window,
            self.sink,
            self.positions,
            joint_blocks=known // self.micro_steps if self.sampler == "rolling" else 1,
            fuse=self.sink_update != "static",
            fuse_release=self.sink_update == "ema_release",
            memories=len(self.memory_decays) if self.sink_update == "memory" else 0,
            budget=self.budget,
            recent=self.recent,
            first_sink_shift=self.first_sink_shift,
            shot_offset=self.shot_offset,
            pin_shots=self.pin_shots,
            sink_filling=self.sink_filling,
            cache_frames=self.cache_frames,
        )

    def new_sampler(self) -> Sampler:
        """The sampler of one stream."""
        if self.sampler == "rolling":
            return RollingSampler(self.micro_steps, self.context_window == "release")
        return FewStepSampler(self.solver, self.recompute, self.first_denoising_steps)

    def cache_options(self) -> dict[str, Any]:
        """What `ContextCache` takes beside the window."""
        return {
            "sink_update": self.sink_update,
            "sink_decay": self.sink_decay,
            "memory_decays": self.memory_decays,
            "refresh_below": self.refresh_below,
            "sink_precision": self.sink_precision,
            "past_bias": self.past_bias,
            "trained_frames": self.trained_frames,
            "far_scale": self.far_scale,
            "far_decay": self.far_decay,
            "rope_interpolation": self.rope_interpolation,
            "head_jitter": self.head_jitter,
            "importance": self.importance,
            "max_reuse": self.max_reuse,
            "kv_dtype": self.kv_dtype,
        }

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
    kind = str(_TYPES[name])
    if value is None and "None" in kind:
        return None
    if kind.startswith("tuple"):
        numbers = value if isinstance(value, Sequence) and not isinstance(value, str) else None
        if not numbers or not all(isinstance(v, int | float) and not isinstance(v, bool) for v in numbers):
            example = "[1000, 750, 500, 250]" if name.endswith("denoising_steps") else "[0.99, 0.9]"
            raise UserError(f"{name} = {value!r} must be a list of numbers, e.g. {example}")
        return tuple(float(v) for v in numbers)
    wanted, what = next(known for key, known in _KINDS.items() if kind.startswith(key))
    if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
        raise UserError(f"{name} = {value!r} must be {what}")
    return float(value) if kind == "float" else value


_TYPES = {f.name: f.type for f in fields(Method)}
_DEFAULTS = {f.name: f.default for f in fields(Method)}
_KINDS: dict[str, tuple[Any, str]] = {
    "int": (int, "a whole number"),
    "float": (int | float, "a number"),
    "bool": (bool, "true or false"),
    "str": (str, "a name"),
}


def _nearest(name: str, known: Sequence[str]) -> str:
    match = difflib.get_close_matches(name, known, 1)
    return f" (did you mean {match[0]}?)" if match else ""
