"""Settings of a recorded stream: which options of the engine they stand for, and which follow from the others.

A setting without an entry in these tables is refused, never ignored.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from streamvid.errors import UserError
from streamvid.methods import Method
from streamvid.parity_case import Case
from streamvid.window import WindowPlanner

LATENT_KEYS = ("B", "F", "C", "H", "W", "tokens_per_frame")

SCHEDULE_OPTIONS = {
    "denoising_step_list": "denoising_steps",
    "warp": "warp",
    "timestep_shift": "shift",
    "num_train_timesteps": "num_train_timesteps",
    "sigma_min": "sigma_min",
    "extra_one_step": "extra_one_step",
}
SCHEDULE_KEYS = (*SCHEDULE_OPTIONS, "warped_denoising_steps")

# Key of `streaming` -> option of `Method`, taken as it is. Several kinds of stream name the same thing differently.
STREAMING_OPTIONS = {
    "frames_per_block": "frames_per_block",
    "sink_size": "sink",
    "sink_frames": "sink",
    "attention_frames": "window",
    "cache_frames": "cache_frames",
    "context_noise": "context_timestep",
    "ema_decay": "sink_decay",
    "budget_frames": "budget",
    "recent_frames": "recent",
    "score_fusion": "importance",
    "topc_max_reuse": "max_reuse",
}
# Keys that each kind of stream has: the first kind of which a key is there. Others are refused.
COMMON = ("frames_per_block", "blocks", "context_noise")
BLOCKWISE = (*COMMON, "local_attn_size", "sink_size", "cache_capacity_frames")
SWITCHED = ("global_sink", "switch_frame_indices")
COMPRESSION = (
    "budget_frames",
    "recent_frames",
    "score_fusion",
    "topc_max_reuse",
    "first_sink_rotation_literal",
)
MODES = {"deep sink only": (), "deep sink + participative compression": COMPRESSION}
# What follows from the other settings, and is checked (`check_derived`).
COUNTS = ("evictions", "windows", "switches_applied_at_frame")
# `cache.k_stored_after_rope` -> positions: what is stored tells how the reference places it.
POSITIONS = {True: "absolute", False: "cache_relative"}
LONGLIVE_SPAN = 21


def stream_method(case: Case) -> Method:
    """The engine's options for a case's `streaming` section."""
    given = case.settings.get("streaming")
    given = given if isinstance(given, dict) else {}
    family, keys = next(
        (family, keys) for family, mark, keys in FAMILIES if mark is None or not given.keys().isdisjoint(mark)
    )
    if "mode" in given:
        if given["mode"] not in MODES:
            raise case.missing(
                f"streaming.mode = {given['mode']!r}", f"a mode other than {' and '.join(MODES)}"
            )
        keys += MODES[given["mode"]]
    streaming = case.section("streaming", [*keys, *COUNTS], keys)
    options = {ours: streaming[key] for key, ours in STREAMING_OPTIONS.items() if key in streaming}
    options |= {"transition": "cross_only"}
    options |= family(case, streaming)
    if options["sink"] > options["frames_per_block"]:
        if "ema_decay" in streaming:
            options["sink_filling"] = "reward_forcing_release"
        elif _longlive(case):
            options["sink_filling"] = "longlive_release"
    return Method(name="recorded").with_overrides(options)


def _longlive(case: Case) -> bool:
    return "LongLive" in str(case.settings.get("reference", {}).get("project"))


def _rolling(case: Case, streaming: dict) -> dict[str, Any]:
    """Rolling Forcing, with the release's two windows for denoising and context."""
    levels = case.section("schedule", SCHEDULE_KEYS, ["denoising_step_list"])["denoising_step_list"]
    if streaming["rolling_window_blocks"] != len(levels):
        raise case.missing(
            f"streaming.rolling_window_blocks = {streaming['rolling_window_blocks']}",
            f"a rolling window of other than one block per level ({len(levels)})",
        )
    return {
        "sampler": "rolling",
        "positions": "sink_before_window",
        "context_window": "release",
        "denoising_steps": levels,
    }


def _block_by_block(case: Case, streaming: dict) -> dict[str, Any]:
    """One window, one block after the other."""
    span, capacity = streaming["local_attn_size"], streaming["cache_capacity_frames"]
    window = min(span, capacity)  # a buffer shorter than the span is attended as a whole
    if span == -1:
        window = capacity
        if case.section("latent", LATENT_KEYS)["F"] > capacity:
            raise UserError(
                f"{case.folder}/case.json: latent.F exceeds streaming.cache_capacity_frames = {capacity}, "
                "and local_attn_size = -1 evicts nothing: give a window"
            )
        if _longlive(case):  # its attention span without a window is a constant, whatever the cache holds
            window = min(window, LONGLIVE_SPAN)
    after_rope = case.settings.get("cache", {}).get("k_stored_after_rope", True)
    if not isinstance(after_rope, bool):
        raise case.missing(f"cache.k_stored_after_rope = {after_rope!r}", "keys of both kinds in one cache")
    options = {"window": window, "positions": POSITIONS[after_rope]}
    return options | (_larger_buffer(case, streaming, window, after_rope) if window < capacity else {})


def _larger_buffer(case: Case, streaming: dict, window: int, after_rope: bool) -> dict[str, Any]:
    """A buffer that holds frames beside those that are attended: mostly, only what is attended matters."""
    capacity, frames = streaming["cache_capacity_frames"], case.settings["latent"]["F"]
    asked = f"streaming.cache_capacity_frames = {capacity}"
    if frames <= window:
        return {}
    if not after_rope:
        raise case.missing(
            asked, f"ranks or evictions of a buffer that is larger than the {window} frames attended"
        )
    if _longlive(case):  # the sink is attended wherever it is
        if streaming["local_attn_size"] != -1 and not streaming.get("global_sink", True):
            raise case.missing(
                asked, f"a new sink in a buffer that is larger than the {window} frames attended"
            )
        return {}
    if frames > capacity and capacity - window < streaming["sink_size"]:
        raise case.missing(asked, "a buffer whose last frames, which are attended, hold part of the sink")
    return {"sink": 0}  # Self Forcing attends the end of its buffer


def _averaged(case: Case, streaming: dict) -> dict[str, Any]:
    """Reward Forcing: evictions of another size than the sink overwrite it."""
    return _block_by_block(case, streaming) | {"sink_update": "ema_release"}


def _deep(case: Case, streaming: dict) -> dict[str, Any]:
    """Deep Forcing, which shortens its cache when that is full: a larger one would be another window."""
    window, capacity = streaming["local_attn_size"], streaming["cache_capacity_frames"]
    if -1 != window < capacity:
        raise case.missing(
            f"streaming.cache_capacity_frames = {capacity}",
            f"a deep sink in a cache larger than local_attn_size = {window}",
        )
    options = _block_by_block(case, streaming)
    if options["positions"] != "absolute":
        raise case.missing(
            "cache.k_stored_after_rope = False", "a deep sink whose keys are stored before RoPE"
        )
    options |= {"positions": "deep_forcing_release"}
    if "budget_frames" not in streaming:
        return options
    budget = streaming["budget_frames"]
    least = streaming["sink_size"] + streaming["recent_frames"]
    options["budget"] = max(min(budget, options["window"]), least)  # as the release bounds it
    return options | {"first_sink_shift": streaming["first_sink_rotation_literal"] - budget}


# What follows from which keys; which keys a stream then has.
FAMILIES: tuple[
    tuple[Callable[[Case, dict], dict[str, Any]], tuple[str, ...] | None, tuple[str, ...]], ...
] = (
    (
        _rolling,
        ("rolling_window_blocks",),
        (*COMMON, "rolling_window_blocks", "attention_frames", "sink_frames", "cache_frames"),
    ),
    (_averaged, ("ema_decay",), (*BLOCKWISE, "ema_decay")),
    (_deep, ("mode", *COMPRESSION), (*BLOCKWISE, "mode")),
    (_block_by_block, SWITCHED, (*BLOCKWISE, *SWITCHED)),
    (_block_by_block, None, BLOCKWISE),
)


def check_derived(case: Case, method: Method, switches: dict[int, str]) -> None:
    """Refuse what a reference recorded beside its settings and what does not follow from them."""
    streaming, cache = case.settings["streaming"], case.settings.get("cache", {})
    blocks, tokens = streaming["blocks"], case.settings["latent"]["tokens_per_frame"]
    rolling = method.sampler == "rolling"
    rolls = [] if rolling else cache_rolls(method, blocks, tokens)
    follows = {
        ("streaming", "windows"): blocks + len(method.denoising_steps or ()) - 1 if rolling else None,
        ("streaming", "evictions"): None if rolling else len(rolls),
        ("streaming", "switches_applied_at_frame"): [
            at * method.frames_per_block for at in switches if at < blocks
        ],
        ("cache", "layers"): case.settings["model"]["num_layers"],
        ("cache", "tokens_per_frame"): tokens,
        ("cache", "v_has_rope"): False,
    }
    if method.sink:
        rotations = [roll["sink_rotation_frames"] for roll in rolls]
        follows["cache", "sink_rotation_frames_per_roll"] = rotations
    rows = [
        (f"{section}.{key}", case.settings[section][key], value)
        for (section, key), value in follows.items()
        if key in case.settings.get(section, {})
    ]
    recorded = cache.get("rolls", len(rolls))
    if isinstance(recorded, list):
        rows += [
            (f"cache.rolls[{number}].{key}", entry[key], value)
            for number, (entry, roll) in enumerate(zip(recorded, rolls, strict=False))
            for key, value in roll.items()
            if key in entry
        ]
        recorded = len(recorded)
    rows.append(("the number of cache.rolls", recorded, len(rolls)))
    for name, value, expected in rows:
        if value != expected:
            raise UserError(
                f"{case.folder}/case.json: {name} is {value!r}, and the other settings give {expected!r}: "
                "record the case again"
            )


def cache_rolls(method: Method, blocks: int, tokens: int) -> list[dict[str, Any]]:
    """Every time that a stream's window loses something, as a reference records it."""
    planner, sink_at = WindowPlanner(method.window_options()), 0.0
    rolls: list[dict[str, Any]] = []
    for block in range(blocks):
        stored = len(planner.live_frames) + len(planner.compressed) + method.frames_per_block
        plan = planner.plan()
        if plan.evicted or plan.compressed_from:
            roll: dict[str, Any] = {
                "roll": len(rolls),
                "block": block,
                "tokens_before": stored * tokens,
                "tokens_after": len(plan.window) * tokens,
            }
            if method.sink:  # without one there is nothing to rotate, whatever was recorded
                roll["sink_rotation_frames"] = plan.window[0].position - sink_at
                sink_at = plan.window[0].position
            rolls.append(roll)
        planner.commit(plan)
    return rolls


def switch_policies(case: Case) -> dict[int, str]:
    """Block -> policy of LongLive's released recache, at the first block that starts at or after each switch."""
    streaming = case.settings["streaming"]
    frames = streaming.get("switch_frame_indices", [])
    if not frames:
        return {}
    sink = "keep_once_full" if streaming["global_sink"] else "reanchor"
    if streaming["local_attn_size"] == -1:  # all of the stream is replayed, and the sink is where it was
        sink = "reencode"
    blocks: list[int] = []
    for frame in frames:
        block = -(-frame // streaming["frames_per_block"])
        blocks.append(max(block, blocks[-1] + 1) if blocks else block)  # one switch per block
    return dict.fromkeys(blocks, f"recache(bidirectional, {sink})")
