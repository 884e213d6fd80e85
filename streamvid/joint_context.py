"""The context pass of a finished block and the first denoising step of the next, in one forward.

Of the forward's frames the first are the finished block's, clean; the others are the next block's, noisy. Each half attends
its own window, layer by layer: the finished block what it saw while it was denoised, then the next block its own, in which
the finished block's clean keys already lie. That is block-causal attention without a mask: exact, with nothing computed
that a mask would throw away, and every product outside of attention has twice the rows for one reading of the weights.

The next block's slots are those of frames that the finished block still attends. What lies there is set aside before it is
overwritten, so that a block that fails can be begun again.
"""

from __future__ import annotations

import math
from copy import copy
from typing import TYPE_CHECKING

import torch

from streamvid.context import ContextCache
from streamvid.errors import UserError
from streamvid.kernels.companions import PLAIN
from streamvid.window import BlockPlan

if TYPE_CHECKING:
    from streamvid.methods import Method

# tokens of a block up to which weights take longer to read than to multiply, so that one reading for two blocks pays
PAYS_UP_TO = 1024
CONTEXT_PASSES = ("auto", "joint", "separate")


def can_be_joint(cache: ContextCache) -> bool:
    """Whether a finished block's context pass may wait: nothing of the window changes but by keys written or evicted."""
    options = cache.options
    changes = options.fuse or options.budget is not None or options.joint_blocks > 1
    in_place = cache.in_place or cache.companions is not PLAIN  # kernels with bookkeeping of their own
    plain = cache.quantised is None and cache.past_bias == 1.0 and options.sink_filling == "clean"
    return plain and not changes and not in_place


class EvictedKeys:
    """Room for the keys and values of the slots that a block takes over, in all layers."""

    def __init__(self, cache: ContextCache):
        tokens = cache.options.frames_per_block * cache.tokens_per_frame
        layers, batch, _, heads, head_dim = cache.keys.shape
        self.keys = cache.keys.new_zeros(layers, batch, tokens, heads, head_dim)
        self.values = torch.zeros_like(self.keys)


def room_for(cache: ContextCache, method: Method, context_pass: str) -> EvictedKeys | None:
    """What a stream's joint context passes need; None where every block has its own.

    Raises:
        UserError: there is no such `context_pass`, or the method cannot have joint ones.
    """
    if context_pass not in CONTEXT_PASSES:
        raise UserError(
            f"context_pass = {context_pass!r} is not known: choose one of {', '.join(CONTEXT_PASSES)}"
        )
    can = method.sampler == "few_step" and not method.recompute and can_be_joint(cache)
    if context_pass == "joint" and not can:
        raise UserError(
            "context_pass = joint needs sampler = few_step and whole frames that stay as they were written (no "
            "recompute, sink_update, budget, past_bias, kv_dtype): take context_pass = auto"
        )
    pays = cache.tokens_per_frame * method.frames_per_block <= PAYS_UP_TO
    wanted = context_pass == "joint" or (context_pass == "auto" and pays)
    return EvictedKeys(cache) if wanted and can else None


class JointContext:
    """`AttentionContext` of both halves. One per block: `begin` takes the next block's plan.

    Args:
        cache: the stream's; the finished block was committed to it, with the keys of its last denoising step.
        unwritten: plan of the finished block.
        timestep: of the context pass.
        room: for what the next block overwrites.
    """

    def __init__(self, cache: ContextCache, unwritten: BlockPlan, timestep: float, room: EvictedKeys):
        self.cache, self.unwritten, self.timestep, self.room = cache, unwritten, timestep, room
        self.frames = len(unwritten.own)
        self.latents = cache.clean_latents(unwritten)
        self._sink = [
            (slot, frame, cache.rotated_at[frame])
            for frame, slot in cache.planner.slot_of.items()
            if slot < cache.sink_slots
        ]
        self._set_aside: list[int] = []  # layers

    def begin(self, plan: BlockPlan) -> None:
        """Prepare both halves."""
        self.cache.begin(self.unwritten)
        self.finished = copy(self.cache)  # with what `begin` made for it; the next `begin` makes new ones
        self.finished._begun = set()
        self.moves = self.cache.begin(plan, realign=False)

    def attend(
        self, layer: int, q_BLHD: torch.Tensor, k_BLHD: torch.Tensor, v_BLHD: torch.Tensor
    ) -> torch.Tensor:
        tokens = self.frames * self.cache.tokens_per_frame
        clean, noisy = (
            tuple(x[:, part] for x in (q_BLHD, k_BLHD, v_BLHD))
            for part in (slice(tokens), slice(tokens, None))
        )
        seen_by_finished = self.finished.attend(layer, *clean)
        self._move_on(layer)
        return torch.cat([seen_by_finished, self.cache.attend(layer, *noisy)], 1)

    def _move_on(self, layer: int) -> None:
        """From the finished block's window to the next one's: set aside what will be overwritten, turn the sink's keys."""
        for stored, room in self._rooms(layer):
            room.copy_(stored)
        self._set_aside.append(layer)
        for move in self.moves:
            self.cache.rotate_sink(*move, slice(layer, layer + 1))

    def _rooms(self, layer: int):
        """Own slots of the next block and the room for what lies there."""
        for source, target in self.cache.runs(layer):
            yield self.cache.keys[layer][:, target], self.room.keys[layer][:, source]
            yield self.cache.values[layer][:, target], self.room.values[layer][:, source]

    def restore(self) -> None:
        """The next block failed: bring back what it has overwritten, as it was before `begin`."""
        for layer in self._set_aside:
            for stored, room in self._rooms(layer):
                stored.copy_(room)
        self._set_aside.clear()
        for slot, frame, position in self._sink:
            if not math.isnan(position):  # a sink without a position is turned afresh for every block
                self.cache.rotate_sink(slot, self.cache.turn([position]))
            self.cache.rotated_at[frame] = self.cache.written_at[frame] = position
