"""Participative compression: a full window shrinks to what recent queries attend most (Deep Forcing, section 3.3).

Works token by token and layer by layer, so that every layer keeps tokens of its own. The window planner says when, from
which slots and how many; here it is decided which.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from streamvid.kernels.windowed import Part, key_importance
from streamvid.saving import copy_into
from streamvid.window import BlockPlan, WindowOptions
from streamvid.window_parts import contiguous_runs

KeyValue = tuple[torch.Tensor, torch.Tensor]


def summed_importance(queries_BRHD: torch.Tensor, keys_BLHD: torch.Tensor) -> torch.Tensor:
    """Score `[B, L]` of every key: its product with the sum of the queries, over all heads."""
    return torch.einsum("bhd,blhd->bl", queries_BRHD.sum(1), keys_BLHD)


def largest_importance(queries_BRHD: torch.Tensor, keys_BLHD: torch.Tensor) -> torch.Tensor:
    """Score `[B, L]` of every key: its largest product with one query, over all heads."""
    return torch.einsum("brhd,blhd->brl", queries_BRHD, keys_BLHD).amax(1)


IMPORTANCE: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "sum": summed_importance,
    "max": largest_importance,
}


class TokenLedger:
    """Which token lies where, how often it was chosen, and the latest queries, of one stream.

    Compression writes into a second set of buffers, which takes over when the block is committed: a block that fails
    leaves the first set as it was.

    Args:
        importance: one of `IMPORTANCE`.
        max_reuse: a token is chosen at most so many times.
        in_place: tokens are scored by the kernel of `streamvid.kernels.windowed`, which has no importance `max`.
    """

    def __init__(
        self,
        options: WindowOptions,
        keys: torch.Tensor,
        tokens_per_frame: int,
        importance: str = "sum",
        max_reuse: int = 7,
        in_place: bool = False,
    ):
        layers, batch, tokens, heads, head_dim = keys.shape
        self.options, self.tokens_per_frame = options, tokens_per_frame
        self.importance, self.max_reuse = IMPORTANCE[importance], max_reuse
        self.in_place = in_place and importance == "sum"
        self.ids = torch.full((layers, batch, tokens), -1, dtype=torch.long, device=keys.device)
        self.uses = torch.zeros_like(self.ids)
        self.spare_ids, self.spare_uses = self.ids.clone(), self.uses.clone()
        tail = (options.whole_frames - options.frames_per_block) * tokens_per_frame
        self.queries = torch.zeros(layers, batch, tail, heads, head_dim, dtype=keys.dtype, device=keys.device)
        self.queries_before = torch.zeros_like(self.queries)  # the block that is being made
        self.begun: int | None = None
        self.scores: dict[int, torch.Tensor] = {}  # layer -> of the last compression, for inspection
        self.selected: dict[int, torch.Tensor] = {}

    def begin(self, plan: BlockPlan) -> None:
        """A block starts, or starts again after it failed."""
        if self.begun == plan.block:
            self.queries.copy_(self.queries_before)
        else:
            self.queries_before.copy_(self.queries)
        self.begun = plan.block

    def clear(self) -> None:
        """Forget everything."""
        self.ids.fill_(-1)
        for tensor in (self.uses, self.queries, self.queries_before):
            tensor.zero_()
        self.begun = None

    def state_dict(self) -> dict[str, Any]:
        names = ("ids", "uses", "queries", "queries_before")
        return {"tensors": {name: getattr(self, name) for name in names}, "begun": self.begun}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        copy_into(vars(self), state["tensors"])
        self.begun = state["begun"]

    def remember(self, layer: int, q_BLHD: torch.Tensor) -> None:
        """The tail of this forward's queries, rotated, counts at the next compression."""
        tail = self.queries.shape[2]
        if tail:
            joined = torch.cat([self.queries[layer], q_BLHD], 1)
            self.queries[layer] = joined[:, joined.shape[1] - tail :]

    def compress(
        self,
        layer: int,
        plan: BlockPlan,
        q_BLHD: torch.Tensor,
        own: KeyValue,
        buffer: KeyValue,
        into: KeyValue,
    ) -> None:
        """Of `buffer` and the block's `own` keys and values, write sink, chosen and recent tokens to the front of `into`."""
        stored = self._tokens(plan.compressed_from)
        videos, new = own[0].shape[:2]
        ids = torch.cat([self.ids[layer][:, stored], self._own_ids(plan).expand(videos, -1)], 1)
        uses = torch.cat([self.uses[layer][:, stored], torch.zeros_like(ids[:, len(stored) :])], 1)

        per_frame, options = self.tokens_per_frame, self.options
        sink, recent = (n * per_frame for n in (options.sink, options.recent_frames))
        chosen = (options.budget or 0) * per_frame - sink - recent
        queries = torch.cat([self.queries[layer], q_BLHD], 1)
        queries = queries[:, max(0, queries.shape[1] - recent) :]
        products = self._products(queries, plan, buffer, own)
        scores = products.float() / (own[0].shape[-1] ** 0.5 * own[0].shape[-2])
        candidates = scores[:, sink : scores.shape[1] - recent]
        candidates = candidates.masked_fill(
            uses[:, sink : scores.shape[1] - recent] >= self.max_reuse, float("-inf")
        )
        best = candidates.topk(chosen, 1).indices.sort(1).values + sink
        self.scores[layer], self.selected[layer] = scores, best

        everyone = torch.arange(ids.shape[1], device=ids.device).expand(videos, -1)
        kept = torch.cat([everyone[:, :sink], best, everyone[:, ids.shape[1] - recent :]], 1)
        uses = uses.scatter_add(1, best, torch.ones_like(best))
        length = kept.shape[1]
        tail = min(recent, new)  # the end of the block is the end of what is kept
        for source, of_block, target in zip(buffer, own, into, strict=True):
            index = kept[:, : length - tail]
            if tail < new:  # the rest of the block has to be chosen
                source = torch.cat([source[:, stored], of_block], 1)
            else:
                index = stored[index]
            index = index[..., None, None].expand(-1, -1, *source.shape[2:])
            target[:, : length - tail] = source.gather(1, index)
            target[:, length - tail : length] = of_block[:, new - tail :]
        self.spare_ids[layer][:, :length] = ids.gather(1, kept)
        self.spare_uses[layer][:, :length] = uses.gather(1, kept)

    def _products(
        self, queries: torch.Tensor, plan: BlockPlan, buffer: KeyValue, own: KeyValue
    ) -> torch.Tensor:
        """Importance `[B, L]` of the tokens stored and of the block's own."""
        stored = self._tokens(plan.compressed_from)
        if not self.in_place:
            of_stored = self.importance(queries, buffer[0][:, stored])
            return torch.cat([of_stored, self.importance(queries, own[0].to(buffer[0].dtype))], 1)
        runs = [run for _, run in contiguous_runs(sorted(plan.compressed_from), self.tokens_per_frame)]
        ranges = ([[run.start, run.stop - run.start] for run in runs], [[0, own[0].shape[1]]])
        parts = [
            Part(*pair, torch.tensor(some, dtype=torch.int32, device=queries.device))
            for pair, some in zip((buffer, own), ranges, strict=True)
        ]
        of_buffer, of_own = key_importance(queries.sum(1), parts, "triton")
        return torch.cat([of_buffer[:, stored], of_own], 1)

    def reanchor(self, frames: Sequence[int]) -> None:
        """The buffer begins with these frames, none of whose tokens was chosen yet."""
        own = self._tokens(range(len(frames)))
        self.ids[:, :, own] = self._tokens(frames)
        self.uses[:, :, own] = 0

    def commit(self, plan: BlockPlan) -> None:
        """The block is finished."""
        if plan.compressed_from:
            self.ids, self.spare_ids = self.spare_ids, self.ids
            self.uses, self.spare_uses = self.spare_uses, self.uses
        own = self._tokens([slot.slot for slot in plan.own])
        self.ids[:, :, own] = self._own_ids(plan)
        self.uses[:, :, own] = 0

    def _tokens(self, slots) -> torch.Tensor:
        """Token indices of slots, in their order."""
        first = torch.tensor(list(slots), device=self.ids.device) * self.tokens_per_frame
        return (first[:, None] + torch.arange(self.tokens_per_frame, device=self.ids.device)).flatten()

    def _own_ids(self, plan: BlockPlan) -> torch.Tensor:
        return self._tokens(plan.frames)
