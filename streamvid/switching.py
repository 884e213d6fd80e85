"""What happens at a prompt switch: policies of one signature, side by side.

A policy is called at a block boundary, after the new prompt's keys and values are known and before the block is planned:

    policy(cache, replay)

`replay(plan)` runs a context pass (t = 0, clean latents of the plan's own frames) under the new prompt. A policy is named
with its options in brackets where they are not the first of their kind: `recache(bidirectional, reanchor)`, `blend(4)`.

| policy | sink | recent window | cross-attention | decoder |
|---|---|---|---|---|
| cross_only | old prompt's K/V | old prompt's K/V | new prompt | goes on |
| recache(causal, keep) | old prompt's K/V | rewritten under the new prompt, block by block | new prompt | goes on |
| recache(bidirectional, ...) | | rewritten in one forward in which all frames see each other | | |
| recache(..., keep_once_full) | rewritten too while all of the stream fits the window | rewritten | new prompt | goes on |
| recache(..., reencode) | rewritten too | rewritten | new prompt | goes on |
| recache(..., reanchor) | the oldest frames of the window take its place, rewritten | rewritten | new prompt | goes on |
| flush | old prompt's K/V | all but the last latent frame forgotten | new prompt | goes on |
| blend(blocks, lerp or slerp) | old prompt's K/V | old prompt's K/V | from old to new over so many blocks | goes on |
| shot | old prompt's K/V | old prompt's K/V, positions jump by `shot_offset` | new prompt | goes on |
| cut | emptied; the next block starts a scene of its own | emptied | new prompt | restarts |
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from streamvid.context import ContextCache
from streamvid.errors import UserError
from streamvid.script_fields import OPTIONS_PATTERN
from streamvid.window import BlockPlan, WindowPlanner

Replay = Callable[[BlockPlan], None]
ORDERS = ("causal", "bidirectional")
SINKS = ("keep", "keep_once_full", "reencode", "reanchor")


@dataclass(frozen=True)
class SwitchPolicy:
    """A policy with its options.

    Attributes:
        apply: what it does to the cache.
        blocks: over how many blocks the prompt changes.
        mix: the prompt's embedding on the way, from the old, the new and the share of the new.
        restarts_decoder: whether the next block is the first of a video of its own.
        rewrites: whether the policy writes the keys of recent frames anew.
    """

    apply: Callable[[ContextCache, Replay], None]
    blocks: int = 1
    mix: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor] = torch.lerp
    restarts_decoder: bool = False
    rewrites: bool = False

    def forgets(self, planner: WindowPlanner, plan: BlockPlan) -> bool:
        """Whether no block to come will see the keys that the latest block, of `plan`, has now."""
        in_sink = plan.own[0].frame < planner.sink_start + planner.options.sink
        return self.restarts_decoder or (self.rewrites and not in_sink)


def cross_only(cache: ContextCache, replay: Replay) -> None:
    """Only cross-attention sees the new prompt; the old one lives on in the cached keys (Self Forcing and most releases)."""


def recache(cache: ContextCache, replay: Replay, order: str, sink: str) -> None:
    """LongLive's KV-recache (section 3.1). As the paper means it, (causal, keep): a true block-causal replay that keeps the
    sink. The release runs one bidirectional forward, (bidirectional, keep_once_full) with its `global_sink` and
    (bidirectional, reanchor) without."""
    planner = cache.planner
    if sink == "reanchor":
        cache.reanchor()
    fits = planner.next_frame - planner.sink_start <= planner.options.window
    with_sink = sink in ("reencode", "reanchor") or (sink == "keep_once_full" and fits)
    plans = planner.replay_at_once(with_sink) if order == "bidirectional" else planner.replay(with_sink)
    for plan in plans:
        cache.begin(plan)
        replay(plan)


def flush(cache: ContextCache, replay: Replay) -> None:
    """Infinity-RoPE's KV flush: sink and last latent frame stay, so that the new prompt meets little of the old."""
    cache.planner.forget(keep_last=1)


def shot(cache: ContextCache, replay: Replay) -> None:
    """A new shot of the same scene (LongLive 2): what was shown stays attended, `shot_offset` positions further away."""
    cache.planner.start_shot()


def cut(cache: ContextCache, replay: Replay) -> None:
    """A scene cut: nothing of what was shown is attended any more."""
    cache.planner.start_scene()


def slerp(old: torch.Tensor, new: torch.Tensor, share: float) -> torch.Tensor:
    """Between two embeddings `[..., D]` along the arc, row by row; rows that (nearly) point one way go straight."""
    a, b = (torch.nn.functional.normalize(x.float(), dim=-1) for x in (old, new))
    angle = (a * b).sum(-1, keepdim=True).clamp(-1, 1).acos()
    sine = angle.sin()
    arc = (((1 - share) * angle).sin() * old + (share * angle).sin() * new) / sine.clamp_min(1e-6)
    return torch.where(sine > 1e-3, arc, torch.lerp(old.float(), new.float(), share)).to(old.dtype)


MIXES: dict[str, Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]] = {
    "lerp": torch.lerp,
    "slerp": slerp,
}


def _recache(order: str = "causal", sink: str = "keep") -> SwitchPolicy:
    if order not in ORDERS or sink not in SINKS:
        raise ValueError(f"recache takes one of {', '.join(ORDERS)} and one of {', '.join(SINKS)}")
    return SwitchPolicy(partial(recache, order=order, sink=sink), rewrites=True)


def _blend(blocks: str = "4", mix: str = "lerp") -> SwitchPolicy:
    if not blocks.isdecimal() or int(blocks) < 1 or mix not in MIXES:
        raise ValueError(f"blend takes a number of blocks and one of {', '.join(MIXES)}")
    return SwitchPolicy(cross_only, int(blocks), MIXES[mix])


SWITCH_POLICIES: dict[str, Callable[..., SwitchPolicy]] = {
    "cross_only": lambda: SwitchPolicy(cross_only),
    "recache": _recache,
    "flush": lambda: SwitchPolicy(flush),
    "blend": _blend,
    "shot": lambda: SwitchPolicy(shot),
    "cut": lambda: SwitchPolicy(cut, restarts_decoder=True),
}


def switch_policy(name: str) -> SwitchPolicy:
    """The policy that `name` says, such as `recache` or `blend(8, slerp)`."""
    match = (
        re.fullmatch(rf"({'|'.join(SWITCH_POLICIES)}){OPTIONS_PATTERN}", name)
        if isinstance(name, str)
        else None
    )
    if match is None:
        raise UserError(
            f"transition = {name!r} is not known: choose one of {', '.join(SWITCH_POLICIES)}, "
            "some with options, e.g. recache(bidirectional) or blend(8, slerp)"
        )
    options = [part.strip() for part in (match[2] or "()")[1:-1].split(",") if part.strip()]
    try:
        return SWITCH_POLICIES[match[1]](*options)
    except (TypeError, ValueError) as error:
        reason = str(error) if isinstance(error, ValueError) else f"{match[1]} takes fewer options"
        raise UserError(f"transition = {name!r} has options that do not exist: {reason}") from error
