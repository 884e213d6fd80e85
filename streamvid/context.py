"""The context cache: preallocated keys and values of a stream's window, attended in place.

Attention does not care about the order of keys, so the window is a fixed buffer of slots; eviction is an index that moves,
never a copy. The block being denoised writes into the slots it will own and attends the buffer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from streamvid import sinks
from streamvid.compression import TokenLedger
from streamvid.kernels.attention import attention_backend
from streamvid.kernels.companions import PLAIN, companions
from streamvid.kernels.windowed import windowed_attention
from streamvid.kv_storage import QuantisedKV
from streamvid.rope import Rotation, rotate, rotation, temporal_frequencies
from streamvid.saving import copy_into, map_tensors
from streamvid.sink_fusion import fuse_evicted, keep_fused
from streamvid.window import BlockPlan, WindowOptions, WindowPlanner, WindowSlot
from streamvid.window_parts import (
    PlannedPart,
    Seen,
    contiguous_runs,
    key_mask,
    key_weights,
    plan_parts,
)

SINK_PRECISIONS = ("float32", "native")


class ContextCache:
    """Keys, values and clean latents of one stream's window.

    One forward runs between `begin(plan)` and the next; `commit(plan)` makes a finished block part of the window. Until
    then nothing that the block needs is lost: `begin` may be called again after a failure.

    Keys are kept rotated. Only relative positions matter to attention, so a plan's positions are shifted as a whole to where
    the latest finished frame already is; a sink slot that moves against it is rotated afresh from the raw key, which is kept
    for exactly those slots: re-alignment never accumulates rounding.

    With the backend triton the windowed-attention kernel reads all of that in place (streamvid.window_parts): dead slots are
    skipped, far keys and biases are weighed per frame, a sink that moved is turned on load and not written again, INT8 and
    FP8 are decoded on load.

    Args:
        layers, heads, head_dim: of the transformer.
        grid: token rows and columns of a latent frame.
        latent_shape: `(C, H, W)` of a latent frame, kept clean for replays.
        sink_update, sink_decay, memory_decays, refresh_below: how evicted frames change the sink (streamvid.sinks).
        sink_precision: of the averages: float32, or the cache's own, in which a decay near 1 does nothing in bfloat16.
        past_bias: factor on the attention weight of finished frames other than the first (Daydream Scope's log-bias), not
            in replays.
        trained_frames: distance from the block's last frame from which on a frame is far.
        far_decay, far_scale: factors on the attention weight and on the score of far frames.
        rope_interpolation, head_jitter: of `temporal_frequencies`.
        importance, max_reuse: of `TokenLedger`.
        kv_dtype: how finished frames are stored (streamvid.kv_storage).
    """

    def __init__(
        self,
        options: WindowOptions,
        layers: int,
        heads: int,
        head_dim: int,
        grid: tuple[int, int],
        latent_shape: tuple[int, int, int],
        batch: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        attention: str = "auto",
        sink_update: str = "ema",
        sink_decay: float = 0.999,
        memory_decays: Sequence[float] = (),
        refresh_below: float = 0.0,
        sink_precision: str = "float32",
        past_bias: float = 1.0,
        trained_frames: int | None = None,
        far_decay: float = 1.0,
        far_scale: float = 1.0,
        rope_interpolation: float = 1.0,
        head_jitter: float = 0.0,
        importance: str = "sum",
        max_reuse: int = 7,
        kv_dtype: str = "native",
    ):
        self.attention, self.companions = attention_backend(attention), companions(attention, device)
        self.in_place = attention == "triton"
        self.planner = WindowPlanner(options)
        self.options = options
        self.grid, self.head_dim, self.device = grid, head_dim, device
        self.tokens_per_frame = grid[0] * grid[1]
        self.sink_update = sinks.sink_update(sink_update, sink_decay, memory_decays, refresh_below)
        self.past_bias = past_bias
        self.trained_frames, self.far_decay, self.far_scale = trained_frames, far_decay, far_scale
        self.temporal = temporal_frequencies(head_dim, heads, trained_frames, rope_interpolation, head_jitter)
        self.quantised: QuantisedKV | None = None
        slots = options.slots
        if kv_dtype != "native":
            parts = (layers, batch, options.slots, self.tokens_per_frame, heads, head_dim)
            recent = 2 * options.frames_per_block if kv_dtype == "kivi2" else 0
            self.quantised = QuantisedKV(kv_dtype, parts, options.sink, recent, dtype, device)
            slots = 0
        shape = (layers, batch, slots * self.tokens_per_frame, heads, head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros_like(self.keys)
        self.sink_slots = 0 if options.positions == "absolute" and not options.fuse else options.sink
        precise = torch.float32 if options.fuse and sink_precision == "float32" else dtype
        raw_slots = 0 if self.in_place and not options.fuse else self.sink_slots
        sink_shape = (layers, batch, raw_slots * self.tokens_per_frame, heads, head_dim)
        self.raw_keys = torch.zeros(sink_shape, dtype=precise, device=device)
        # sinks of averages: the state with this block's evictions beside the state without them
        self.sink_values = torch.zeros(sink_shape if options.fuse else 0, dtype=precise, device=device)
        self.fused_keys, self.fused_values = (torch.zeros_like(t) for t in (self.raw_keys, self.sink_values))
        self.fused_for: int | None = None  # block
        self.fused_latents: dict[int, torch.Tensor] = {}  # by rank in the sink, as the block will leave them
        self.ledger: TokenLedger | None = None
        self.spare: tuple[torch.Tensor, torch.Tensor] | None = None
        if options.budget is not None:
            self.ledger = TokenLedger(
                options, self.keys, self.tokens_per_frame, importance, max_reuse, self.in_place
            )
            self.spare = torch.zeros_like(self.keys), torch.zeros_like(self.values)
        self.latents = torch.zeros(batch, options.window, *latent_shape, dtype=dtype, device=device)
        self.sink_latents = torch.zeros(batch, options.sink, *latent_shape, dtype=dtype, device=device)
        self.rotated_at: dict[int, float] = {}  # frame -> position at which its key is attended
        self.written_at: dict[int, float] = {}  # ... and is stored: elsewhere where it is turned on load
        self.reencoded: tuple[int, torch.Tensor] | None = (
            None  # a frame, and latents in the place of its clean ones
        )
        self._own: list[tuple[slice, slice]] = []
        self._frozen_runs = 0  # of `_own`: written by the first forward only
        self._rotation: Rotation
        self._query_rotation: Rotation
        self._length = 0
        self._mask: torch.Tensor | None = None
        self._key_scale: torch.Tensor | None = None
        self._parts: list[PlannedPart] = []
        self._decoded = False  # quantised layers have to be decoded before they are attended
        self._slots: tuple[torch.Tensor, torch.Tensor]  # of the block's frames: first forward, later ones
        self._raw_tokens = 0
        self._plan: BlockPlan
        self._begun: set[int] = set()  # layers that have seen the block's first forward

    @property
    def bytes(self) -> int:
        """Bytes of keys and values."""
        tensors = [self.keys, self.values, self.raw_keys, self.sink_values, *(self.spare or ())]
        if self.options.fuse:
            tensors += [self.fused_keys, self.fused_values]
        quantised = 0 if self.quantised is None else self.quantised.bytes
        return quantised + sum(t.numel() * t.element_size() for t in tensors)

    def begin(self, plan: BlockPlan, realign: bool = True) -> list[tuple[int, Rotation]]:
        """Prepare the forwards of a block: rotation of its tokens, slots to write, keys that have to be re-aligned.

        Returns:
            With `realign=False`, slots of the sink whose keys the caller has to rotate afresh from `raw_keys`, and by what.
        """
        self._plan = plan
        anchor = self._anchor(plan)
        self._rotation = self._query_rotation = self.turn(slot.position + anchor for slot in plan.own)
        if plan.queries_ahead:
            ahead = anchor + plan.queries_ahead
            self._query_rotation = self.turn(slot.position + ahead for slot in plan.own)
        slots = [slot.slot for slot in plan.own]
        frozen = contiguous_runs(slots[: plan.frozen], self.tokens_per_frame)
        self._own = frozen + contiguous_runs(slots, self.tokens_per_frame, plan.frozen)
        self._frozen_runs = len(frozen)
        if self.companions is not PLAIN:
            unfrozen = [-1] * plan.frozen + slots[plan.frozen :]
            first, later = (torch.tensor(s, dtype=torch.int32, device=self.device) for s in (slots, unfrozen))
            self._slots = first, later
        self._begun.clear()
        if self.options.fuse:
            fuse_evicted(self, plan, anchor)
        if self.quantised is not None:  # now that evicted frames have been read
            self.quantised.begin([slot.slot for slot in plan.own], list(self.planner.slot_of.values()))
        if self.ledger is not None:
            self.ledger.begin(plan)
        moves: list[tuple[int, Rotation]] = []
        for slot in self.shown_sink(plan) if not self.options.fuse else ():
            position = slot.position + anchor
            if self.rotated_at[slot.frame] != position:  # also where it is NO_POSITION
                if realign:
                    self._realign(slot, position, anchor)
                else:
                    moves.append((slot.slot, self.turn([position], anchor)))
                    self.rotated_at[slot.frame] = self.written_at[slot.frame] = position
        own = {slot.frame: slot.position + anchor for slot in plan.own}
        self.rotated_at |= own
        self.written_at |= own
        self._choose_keys(plan, anchor)
        # raw keys are needed only while the block lies in slots that may be re-aligned
        raw_slots = [slot for slot in plan.own if slot.slot < self.sink_slots]
        self._raw_tokens = min(len(raw_slots) * self.tokens_per_frame, self.raw_keys.shape[2])
        return moves

    def shown_sink(self, plan: BlockPlan) -> list[WindowSlot]:
        """Finished frames of the sink whose positions may move."""
        return [slot for slot in plan.window if slot.slot < self.sink_slots and slot not in plan.own]

    def _anchor(self, plan: BlockPlan) -> float:
        """What to add to a plan's positions so that the latest finished frame stays where its key is rotated."""
        for slot in reversed(plan.window):
            if slot.frame >= 0 and slot.slot >= self.sink_slots and slot not in plan.own:
                return self.rotated_at[slot.frame] - slot.position
        # a replay rewrites frames where they were: compressed tokens, which stay, are relative to that
        own = plan.own[0]
        stays = own.frame in self.planner.slot_of
        return (self.rotated_at.get(own.frame, own.frame) if stays else own.frame) - own.position

    def turn(self, positions: Iterable[float], anchor: float = 0.0) -> Rotation:
        """Of the tokens of frames; one at NO_POSITION is as before rotation, where positions begin at `anchor`."""
        places = list(positions)
        at = [anchor if math.isnan(position) else position for position in places]
        by = rotation(at, *self.grid, self.head_dim, self.device, self.temporal)
        for index, position in enumerate(places):
            if math.isnan(position):  # nor has it a row and a column
                flat = rotation([anchor], 1, 1, self.head_dim, self.device, self.temporal)
                by.cos[self._span(index)], by.sin[self._span(index)] = flat
        return by

    def _span(self, slot: int) -> slice:
        return slice(slot * self.tokens_per_frame, (slot + 1) * self.tokens_per_frame)

    def _stored(self, slot: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a slot in all layers; those of the sink may be written to."""
        if self.quantised is not None:
            return self.quantised.span(slot)
        return self.keys[:, :, self._span(slot)], self.values[:, :, self._span(slot)]

    def rotate_sink(self, slot: int, by: Rotation, layers: slice = slice(None)) -> None:
        """Write a sink slot's keys, in all layers or some: its raw ones, rotated."""
        span = self._span(slot)
        self._stored(slot)[0][layers].copy_(rotate(self.raw_keys[layers, :, span], by))

    def _realign(self, slot: WindowSlot, position: float, anchor: float) -> None:
        """Attend a sink slot at a new position: its raw key is rotated there in all layers, or all keys on load."""
        self.rotated_at[slot.frame] = position
        if not self.in_place:
            self.rotate_sink(slot.slot, self.turn([position], anchor))
            self.written_at[slot.frame] = position

    def _choose_keys(self, plan: BlockPlan, anchor: float) -> None:
        """How far the buffer is attended, and the mask or bias of its keys, and their scale; or the parts that are."""
        self._length = (max(slot.slot for slot in plan.window) + 1) * self.tokens_per_frame
        replay = plan.own[0].frame in self.planner.slot_of
        past_bias = 1.0 if replay else self.past_bias
        weights = key_weights(plan, past_bias, self.trained_frames, self.far_decay, self.far_scale)
        self._mask = self._key_scale = None
        if self.in_place:
            self._parts = self._plan_parts(plan, anchor, *weights)
        else:
            self._mask, self._key_scale = key_mask(
                plan, *weights, self.tokens_per_frame, self.keys.dtype, self.device
            )

    def _plan_parts(
        self, plan: BlockPlan, anchor: float, bias: dict[int, float], gain: dict[int, float]
    ) -> list[PlannedPart]:
        """The window as the kernel reads it. Two bits are not decoded on load, nor is a block whose first frames stay as
        they are in the cache: then all slots lie in the scratch buffer."""
        own = [slot.slot for slot in plan.own]
        quantised = self.quantised
        self._decoded = quantised is not None and (not quantised.decoded_on_load or plan.frozen > 0)
        seen = []
        for slot in plan.window:
            buffer, index = "window", slot.slot
            if quantised is not None and not self._decoded and slot.slot not in own:
                buffer, index = quantised.where(slot.slot)
            turn = None if slot.frame < 0 else self._on_load(slot.frame, anchor)
            weights = bias.get(slot.slot, 0.0), gain.get(slot.slot, 1.0)
            seen.append(Seen(buffer, index, *weights, turn))
        seen += [Seen("empty", index) for index in range(plan.empty)]
        return plan_parts(seen, self.tokens_per_frame, self.device)

    def _on_load(self, frame: int, anchor: float = 0.0) -> Rotation | None:
        """What turns a frame's stored keys to where they are attended: one angle for its tokens, or each its own."""
        here, there = self.written_at[frame], self.rotated_at[frame]
        if here == there or math.isnan(here):
            return None
        if not math.isnan(there):
            return rotation([there - here], 1, 1, self.head_dim, self.device, self.temporal)
        (cos, sin), (to_cos, to_sin) = self.turn([here]), self.turn([there], anchor)
        return Rotation(cos * to_cos + sin * to_sin, cos * to_sin - sin * to_cos)

    def attend(
        self, layer: int, q_BLHD: torch.Tensor, k_BLHD: torch.Tensor, v_BLHD: torch.Tensor
    ) -> torch.Tensor:
        """Write the block's keys and values into its slots, then attend the window (`AttentionContext`)."""
        return self._attend(layer, *self.write(layer, q_BLHD, k_BLHD, v_BLHD))

    def attend_projected(self, layer: int, q_BLC, k_BLC, v_BLC, norm_q, norm_k) -> torch.Tensor:
        """`attend` of projections and the norms of queries and keys: in the steady state one pass writes them."""
        one_pass = self.companions.norm_rotate_write
        plain = one_pass is PLAIN.norm_rotate_write or torch.compiler.is_compiling()
        # a compression needs the block's keys beside the window
        compresses = self._plan.compressed_from and layer not in self._begun
        if plain or self._raw_tokens or compresses:
            q, k, v = (x.unflatten(-1, (-1, self.head_dim)) for x in (norm_q(q_BLC), norm_k(k_BLC), v_BLC))
            return self.attend(layer, q, k, v)
        into = self._storage(layer)
        weights, turns = (norm_q.weight, norm_k.weight), (self._query_rotation, self._rotation)
        slots = self._slots[layer in self._begun]
        query = one_pass(q_BLC, k_BLC, v_BLC, weights, norm_q.eps, turns, into, slots)
        if self.ledger is not None:
            self.ledger.remember(layer, query)
        return self._attend(layer, query, *self._written(layer, *into))

    def _attend(
        self, layer: int, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        """Attention of rotated queries over the window, whose front (or all but quantised slots of it) is given."""
        if not self.in_place:
            return self.attention(*self.seen(query, keys, values), self._mask)
        parts = []
        for part in self._parts:
            if part.buffer == "window":
                parts.append(part.of(keys, values))
            elif part.buffer == "empty":  # zero keys and values, which take no memory
                shape = (len(query), self._plan.empty * self.tokens_per_frame, *query.shape[2:])
                nothing = query.new_zeros(1, 1, 1, self.head_dim).expand(shape)
                parts.append(part.of(nothing, nothing))
            elif self.quantised is not None:
                parts.append(part.of(*self.quantised.buffer(part.buffer, layer)))
        return windowed_attention(query, parts, backend="triton").out_BLHD

    def write(
        self, layer: int, q_BLHD: torch.Tensor, k_BLHD: torch.Tensor, v_BLHD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Write the block's keys and values into its slots: its rotated query, and keys and values of the window."""
        query, key = rotate(q_BLHD, self._query_rotation), rotate(k_BLHD, self._rotation)
        if self.ledger is not None and self.spare is not None:
            if self._plan.compressed_from and layer not in self._begun:
                stored, spare = (
                    (self.keys[layer], self.values[layer]),
                    (self.spare[0][layer], self.spare[1][layer]),
                )
                self.ledger.compress(layer, self._plan, query, (key, v_BLHD), stored, spare)
            self.ledger.remember(layer, query)
        keys, values = self._storage(layer)
        for source, target in self.runs(layer):
            keys[:, target] = key[:, source]
            values[:, target] = v_BLHD[:, source]
            if self._raw_tokens and target.start < self.raw_keys.shape[2]:
                stop = min(target.stop, self.raw_keys.shape[2])
                kept = slice(source.start, source.start + stop - target.start)
                self.raw_keys[layer][:, target.start : stop] = k_BLHD[:, kept]
                if self.options.fuse:
                    self.sink_values[layer][:, target.start : stop] = v_BLHD[:, kept]
        return query, *self._written(layer, keys, values)

    def _storage(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Buffers of a layer that the block's keys and values are written to, slot by slot."""
        if self.quantised is not None:
            return self.quantised.layer(layer, decoded=self._decoded or not self.in_place)
        if self.spare is not None and self._plan.compressed_from:
            return self.spare[0][layer], self.spare[1][layer]
        return self.keys[layer], self.values[layer]

    def _written(self, layer: int, keys: torch.Tensor, values: torch.Tensor):
        """The block's are in the buffers: the front of them that is attended."""
        if self.quantised is not None:
            self.quantised.keep(layer, [slot.slot for slot in self._plan.own])
        self._begun.add(layer)
        return keys[:, : self._length], values[:, : self._length]

    def runs(self, layer: int) -> list[tuple[slice, slice]]:
        """Token slices (in the block, in the buffer) that the next forward writes."""
        first = layer not in self._begun
        if (
            first
            and self._plan.compressed_from
            and self.options.recent_frames < self.options.frames_per_block
        ):
            return []  # compression has written what stays of the block
        return self._own[0 if first else self._frozen_runs :]

    def seen(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query, keys and values as attention takes them: far keys scaled, empty frames beside them."""
        if self._key_scale is not None:
            keys = keys * self._key_scale
        if self._plan.empty:
            missing = (0, 0, 0, 0, 0, self._plan.empty * self.tokens_per_frame)
            keys, values = F.pad(keys, missing), F.pad(values, missing)
        return query, keys, values

    def commit(self, plan: BlockPlan, latents_BCFHW: torch.Tensor) -> None:
        """The block's keys are those of its context pass: it joins the window with its clean latents."""
        clean = latents_BCFHW.transpose(1, 2).to(self.latents.dtype)
        for index, frame in enumerate(plan.frames):
            self.latents[:, frame % self.options.window] = clean[:, index]
            if frame - self.planner.sink_start < self.options.sink:
                self.sink_latents[:, frame - self.planner.sink_start] = clean[:, index]
        keep_fused(self)
        if self.ledger is not None and self.spare is not None:
            if plan.compressed_from:
                (self.keys, self.values), self.spare = self.spare, (self.keys, self.values)
            self.ledger.commit(plan)
        self.planner.commit(plan)
        self._forget_positions()

    def clean_latents(self, plan: BlockPlan) -> torch.Tensor:
        """Clean latents `[B, C, F, H, W]` of the plan's own frames, for a replay."""
        start, sink = self.planner.sink_start, self.options.sink
        other = dict([self.reencoded] if self.reencoded is not None else [])
        frames = [
            other[frame].to(self.latents)
            if frame in other
            else self.sink_latents[:, frame - start]
            if frame - start < sink
            else self.latents[:, frame % self.options.window]
            for frame in plan.frames
        ]
        return torch.stack(frames, 2)

    def reanchor(self) -> None:
        """The latest frames become the window and the oldest of them the sink; their keys have yet to be written."""
        frames = self.planner.latest_frames
        if frames:
            self.planner.reanchor(frames)
            if self.ledger is not None:
                self.ledger.reanchor(frames)
            sink = frames[: self.options.sink]
            self.sink_latents[:, : len(sink)] = self.latents[:, [f % self.options.window for f in sink]]

    def clear(self) -> None:
        """Back to the beginning: an empty window, block 0."""
        self.planner = WindowPlanner(self.options)
        self.rotated_at, self.written_at = {}, {}
        self.fused_for, self.fused_latents = None, {}
        for part in (self.ledger, self.quantised):
            if part is not None:
                part.clear()

    def state_dict(self, compact: bool = False) -> dict[str, Any]:
        """All that outlives a block (streamvid.saving).

        A `compact` state leaves out what can be made anew from clean latents, to be loaded with `rebuild`: keys and values
        but those of a sink of averages.
        """
        names = ["latents", "sink_latents"]
        if self.options.fuse:
            names += ["raw_keys", "sink_values"]
        fused_for = None if compact else self.fused_for
        if not compact:
            names += ["keys", "values"] + ["raw_keys"] * (not self.options.fuse)
            # a block that failed has overwritten what it fused
            names += ["fused_keys", "fused_values"] * (fused_for is not None)
        return {
            "tensors": {name: getattr(self, name) for name in names},
            "planner": self.planner.state_dict(),
            "rotated_at": dict(self.rotated_at),
            "written_at": dict(self.written_at),
            "fused_for": fused_for,
            "fused_latents": dict(self.fused_latents) if fused_for is not None else {},
            "ledger": None if compact or self.ledger is None else self.ledger.state_dict(),
            "quantised": None if compact or self.quantised is None else self.quantised.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        copy_into(vars(self), state["tensors"])
        self.planner.load_state_dict(state["planner"])
        self.rotated_at, self.written_at = dict(state["rotated_at"]), dict(state["written_at"])
        self.fused_for, self.fused_latents = state["fused_for"], dict(state["fused_latents"])
        for part, saved in ((self.ledger, state["ledger"]), (self.quantised, state["quantised"])):
            if part is not None and saved is not None:
                part.load_state_dict(saved)

    def snapshot(self) -> dict[str, Any]:
        """A copy of the state, to go back to by `load_state_dict`. Not for the steady state: it clones the window."""
        return map_tensors(self.state_dict(), torch.clone)

    def rebuild(self, replay: Callable[[BlockPlan], None]) -> None:
        """After a compact state was loaded: write the window anew from clean latents, as a recache that rewrites the sink.

        What is gone: single tokens that a compression kept of older frames (the latest whole frames stand in for them),
        pinned frames that have left the window, and the prompts that older keys were written under.
        """
        self.planner.keep_whole_frames()
        if self.ledger is not None:
            self.ledger.reanchor(self.planner.live_frames)
        for plan in self.planner.replay(with_sink=not self.options.fuse):
            self.begin(plan)
            replay(plan)
        self._forget_positions()

    def _forget_positions(self) -> None:
        """Of frames that are no longer in the window."""
        for at in (self.rotated_at, self.written_at):
            for frame in at.keys() - self.planner.slot_of.keys():
                del at[frame]

    def latest_latents(self) -> torch.Tensor:
        """Clean latents `[B, C, F, H, W]` of the scene's last frames, as many as a window holds."""
        return self.latents[
            :, [frame % self.options.window for frame in self.planner.latest_frames]
        ].transpose(1, 2)

    def stored(
        self, layer: int, frames: Sequence[int], rotated: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of `frames` in the order given, `[B, L, H, D]` (copies, for inspection).

        Keys are rotated at their position, or with `rotated=False` turned back to what they were before.
        """
        pairs = [self._stored(self.planner.slot_of[frame]) for frame in frames]
        keys, values = (torch.cat([pair[part][layer] for pair in pairs], 1) for part in (0, 1))
        for index, by in enumerate(self._on_load(frame) for frame in frames if rotated):
            if by is not None:
                keys[:, self._span(index)] = rotate(keys[:, self._span(index)], by)
        if not rotated:
            by = self.turn(self.written_at[frame] for frame in frames)
            keys = rotate(keys, Rotation(by.cos, -by.sin))
        return keys, values
