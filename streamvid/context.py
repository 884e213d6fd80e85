"""The context cache: preallocated keys and values of a stream's window, attended in place.

Attention does not care about the order of keys, so the window is a fixed buffer of slots; eviction is an index that moves,
never a copy. The block being denoised writes into the slots it will own and attends the buffer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from streamvid.kernels.attention import attention_backend
from streamvid.rope import Rotation, rotate, rotation
from streamvid.window import BlockPlan, WindowOptions, WindowPlanner


class CacheSnapshot(NamedTuple):
    """Keys, values and raw keys, the window and the rotations at one moment."""

    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    planner: WindowPlanner
    rotated_at: dict[int, float]


class ContextCache:
    """Keys, values and clean latents of one stream's window.

    One forward runs between `begin(plan)` and the next; `commit(plan)` makes a finished block part of the window.

    Keys are kept rotated. Only relative positions matter to attention, so a plan's positions are anchored to the frame
    index of its own block; a slot whose anchored position moved (a re-aligned sink) is rotated afresh from the raw key,
    which is kept for exactly those slots: re-alignment never accumulates rounding.

    Args:
        layers, heads, head_dim: of the transformer.
        grid: token rows and columns of a latent frame.
        latent_shape: `(C, H, W)` of a latent frame, kept clean for replays.
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
    ):
        self.planner = WindowPlanner(options)
        self.options = options
        self.grid, self.head_dim, self.device = grid, head_dim, device
        self.tokens_per_frame = grid[0] * grid[1]
        tokens = options.slots * self.tokens_per_frame
        self.keys = torch.zeros(layers, batch, tokens, heads, head_dim, dtype=dtype, device=device)
        self.values = torch.zeros_like(self.keys)
        self.sink_slots = 0 if options.positions == "absolute" else options.sink
        self.raw_keys = torch.zeros(
            layers,
            batch,
            self.sink_slots * self.tokens_per_frame,
            heads,
            head_dim,
            dtype=dtype,
            device=device,
        )
        self.latents = torch.zeros(batch, options.slots, *latent_shape, dtype=dtype, device=device)
        self.rotated_at: dict[int, float] = {}  # slot -> position its stored key is rotated at
        self.attention = attention_backend(attention)
        self._own: list[tuple[slice, slice]] = []
        self._rotation: Rotation
        self._length = 0
        self._mask: torch.Tensor | None = None
        self._raw_tokens = 0

    @property
    def bytes(self) -> int:
        """Bytes of keys and values."""
        return sum(t.numel() * t.element_size() for t in (self.keys, self.values, self.raw_keys))

    def begin(self, plan: BlockPlan) -> None:
        """Prepare the forwards of a block: rotation of its tokens, slots to write, keys that have to be re-aligned."""
        anchor = plan.own[0].frame - plan.own[0].position
        own_slots = {slot.slot for slot in plan.own}
        self._rotation = rotation(
            [slot.position + anchor for slot in plan.own], *self.grid, self.head_dim, self.device
        )
        self._own = contiguous_runs([slot.slot for slot in plan.own], self.tokens_per_frame)
        for slot in plan.window:
            position = slot.position + anchor
            if slot.slot not in own_slots and self.rotated_at[slot.slot] != position:
                self._realign(slot.slot, position)
        self.rotated_at.update({slot.slot: slot.position + anchor for slot in plan.own})
        attended = sorted(slot.slot for slot in plan.window)
        self._length = (attended[-1] + 1) * self.tokens_per_frame
        self._mask = None
        if len(attended) <= attended[-1]:  # dead slots in between
            alive = torch.zeros(attended[-1] + 1, dtype=torch.bool, device=self.device)
            alive[attended] = True
            self._mask = alive.repeat_interleave(self.tokens_per_frame)
        # raw keys are needed only while the block lies in slots that may be re-aligned
        raw_slots = [slot for slot in sorted(own_slots) if slot < self.sink_slots]
        self._raw_tokens = len(raw_slots) * self.tokens_per_frame

    def _realign(self, slot: int, position: float) -> None:
        """Rotate a sink slot's raw key to a new position, in all layers."""
        span = slice(slot * self.tokens_per_frame, (slot + 1) * self.tokens_per_frame)
        by = rotation([position], *self.grid, self.head_dim, self.device)
        self.keys[:, :, span] = rotate(self.raw_keys[:, :, span], by)
        self.rotated_at[slot] = position

    def attend(
        self, layer: int, q_BLHD: torch.Tensor, k_BLHD: torch.Tensor, v_BLHD: torch.Tensor
    ) -> torch.Tensor:
        """Write the block's keys and values into its slots, then attend the window (`AttentionContext`)."""
        keys, values = self.keys[layer], self.values[layer]
        rotated = rotate(k_BLHD, self._rotation)
        for source, target in self._own:
            keys[:, target] = rotated[:, source]
            values[:, target] = v_BLHD[:, source]
            if self._raw_tokens and target.start < self.raw_keys.shape[2]:
                stop = min(target.stop, self.raw_keys.shape[2])
                self.raw_keys[layer][:, target.start : stop] = k_BLHD[:, source][:, : stop - target.start]
        return self.attention(
            rotate(q_BLHD, self._rotation), keys[:, : self._length], values[:, : self._length], self._mask
        )

    def commit(self, plan: BlockPlan, latents_BCFHW: torch.Tensor) -> None:
        """The block's keys are those of its context pass: it joins the window with its clean latents."""
        self.latents[:, [slot.slot for slot in plan.own]] = latents_BCFHW.transpose(1, 2).to(
            self.latents.dtype
        )
        self.planner.commit(plan)

    def clean_latents(self, plan: BlockPlan) -> torch.Tensor:
        """Clean latents `[B, C, F, H, W]` of the plan's own frames, for a replay."""
        return self.latents[:, [slot.slot for slot in plan.own]].transpose(1, 2)

    def snapshot(self) -> CacheSnapshot:
        """A copy of everything a prompt switch may change. Not for the steady state: it clones the window."""
        tensors = (self.keys.clone(), self.values.clone(), self.raw_keys.clone())
        return CacheSnapshot(tensors, self.planner.copy(), dict(self.rotated_at))

    def restore(self, snapshot: CacheSnapshot) -> None:
        """Go back to a snapshot."""
        for own, saved in zip((self.keys, self.values, self.raw_keys), snapshot.tensors, strict=True):
            own.copy_(saved)
        self.planner = snapshot.planner.copy()
        self.rotated_at = dict(snapshot.rotated_at)

    def stored(
        self, layer: int, frames: Sequence[int], rotated: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of `frames` in the order given, `[B, L, H, D]` (copies, for inspection).

        Keys are rotated at their position, or with `rotated=False` turned back to what they were before.
        """
        slots = [self.planner.slot_of[frame] for frame in frames]
        index = torch.cat([torch.arange(self.tokens_per_frame) + s * self.tokens_per_frame for s in slots])
        keys, values = self.keys[layer][:, index], self.values[layer][:, index]
        if not rotated:
            by = rotation([self.rotated_at[slot] for slot in slots], *self.grid, self.head_dim, self.device)
            keys = rotate(keys, Rotation(by.cos, -by.sin))
        return keys, values


def contiguous_runs(slots: Sequence[int], tokens_per_frame: int) -> list[tuple[slice, slice]]:
    """Token slices (in the block, in the buffer) of runs of neighbouring slots: usually one, two where the ring wraps."""
    runs: list[list[int]] = []
    for slot in slots:
        if runs and slot == runs[-1][-1] + 1:
            runs[-1].append(slot)
        else:
            runs.append([slot])
    pieces, start = [], 0
    for run in runs:
        length = len(run) * tokens_per_frame
        first = run[0] * tokens_per_frame
        pieces.append((slice(start, start + length), slice(first, first + length)))
        start += length
    return pieces
