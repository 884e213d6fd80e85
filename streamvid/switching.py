"""What happens at a prompt switch: policies of one signature, side by side.

A policy is called at a block boundary, after the new prompt's keys and values are known and before the block is planned:

    policy(cache, replay)

`replay(plan)` runs a context pass (t = 0, clean latents of the plan's own frames) under the new prompt.

| policy | sink | recent window | cross-attention | decoder |
|---|---|---|---|---|
| cross_only | old prompt's K/V | old prompt's K/V | new prompt | goes on |
| recache | old prompt's K/V | rewritten under the new prompt, block by block | new prompt | goes on |
| cut | emptied; the next block starts a scene of its own | emptied | new prompt | restarts |
"""

from __future__ import annotations

from collections.abc import Callable

from streamvid.context import ContextCache
from streamvid.errors import UserError
from streamvid.window import BlockPlan

Replay = Callable[[BlockPlan], None]


def cross_only(cache: ContextCache, replay: Replay) -> None:
    """Only cross-attention sees the new prompt; the old one lives on in the cached keys (Self Forcing and most releases)."""


def recache(cache: ContextCache, replay: Replay) -> None:
    """LongLive's KV-recache (section 3.1) as the paper means it: a true block-causal replay that keeps the sink."""
    for plan in cache.planner.replay():
        cache.begin(plan)
        replay(plan)


def cut(cache: ContextCache, replay: Replay) -> None:
    """A scene cut: nothing of what was shown is attended any more."""
    cache.planner.start_scene()


SWITCH_POLICIES: dict[str, Callable[[ContextCache, Replay], None]] = {
    "cross_only": cross_only,
    "recache": recache,
    "cut": cut,
}


def switch_policy(name: str) -> Callable[[ContextCache, Replay], None]:
    """The policy called `name`."""
    if name not in SWITCH_POLICIES:
        raise UserError(f"transition = {name!r} is not known: choose one of {', '.join(SWITCH_POLICIES)}")
    return SWITCH_POLICIES[name]
