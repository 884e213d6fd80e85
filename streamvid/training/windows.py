"""Self-attention in training: many blocks of a clip in one forward, each seeing just what it sees in a stream.

The planner that runs a stream decides here too what a block attends and at which positions. A forward carries several
streams of the same clip, one after the other along the frame axis: first the clean frames (the context), then noisy copies.
A block of a noisy stream attends the clean frames that its plan names and its own noisy frames (teacher forcing).

Two routes, equal where both exist:
- `WindowedAttention` gathers every block's window: any position policy, no wasted work.
- `MaskedAttention` is one attention with a mask over all tokens: absolute positions only, the form of the papers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from streamvid.errors import UserError
from streamvid.kernels.attention import attention_backend
from streamvid.rope import Rotation, rotate, rotation
from streamvid.window import BlockPlan, WindowOptions, WindowPlanner


def plan_blocks(options: WindowOptions, blocks: int) -> list[BlockPlan]:
    """Plans of the first blocks of a stream."""
    planner = WindowPlanner(options)
    plans = []
    for _ in range(blocks):
        plans.append(planner.plan())
        planner.commit(plans[-1])
    return plans


class WindowedAttention:
    """Every block against its own window (`AttentionContext`).

    Args:
        plans: of the clip's blocks.
        streams: copies of the clip along the frame axis; the first is the clean one if `has_clean`.
        grid: token rows and columns of a latent frame.
        has_clean: noisy blocks attend the clean stream (teacher forcing); without it their own (diffusion forcing).
        temporal: other frequencies of the temporal axis (`streamvid.rope.temporal_frequencies`).
        noisy_plans: of the noisy streams, where they differ: windows of several blocks denoised jointly.
    """

    def __init__(
        self,
        plans: Sequence[BlockPlan],
        streams: int,
        grid: tuple[int, int],
        head_dim: int,
        has_clean: bool = True,
        device: torch.device | str = "cpu",
        attention: str = "reference",
        temporal: torch.Tensor | None = None,
        noisy_plans: Sequence[BlockPlan] | None = None,
    ):
        self.streams, self.has_clean = streams, has_clean
        self.tokens = grid[0] * grid[1]
        self.attention = attention_backend(attention)

        def rotated(plan: BlockPlan) -> tuple[BlockPlan, Rotation, Rotation]:
            """A plan with the rotations of its context's keys and of the block itself."""
            context, own = plan.positions[: -len(plan.own)], plan.positions[-len(plan.own) :]
            at_context, at_own = (
                rotation(positions, *grid, head_dim, device, temporal) for positions in (context, own)
            )
            return plan, at_context, at_own

        # streams that share their plans
        every, rows = [rotated(plan) for plan in plans], slice(None)
        self.groups = [(rows, every)]
        if noisy_plans is not None:
            self.groups = [(slice(0, 1), every), (slice(1, None), [rotated(plan) for plan in noisy_plans])]

    def attend(
        self, layer: int, q_BLHD: torch.Tensor, k_BLHD: torch.Tensor, v_BLHD: torch.Tensor
    ) -> torch.Tensor:
        # B (S F f) H D -> B S F f H D
        q, k, v = (x.unflatten(1, (self.streams, -1, self.tokens)) for x in (q_BLHD, k_BLHD, v_BLHD))
        outputs = [
            torch.cat([self._block(q[:, rows], k, v, rows, *planned) for planned in plans], 2)
            for rows, plans in self.groups
        ]
        return torch.cat(outputs, 1).flatten(1, 2)

    def _block(self, q, k, v, rows: slice, plan: BlockPlan, at_context: Rotation, at_own: Rotation):
        """Output of one block in the streams `rows`, `[B, S, L, H, D]`."""
        own = slice(plan.own[0].frame, plan.own[-1].frame + 1)
        context = [slot.frame for slot in plan.window[: -len(plan.own)]]
        block_q, block_k, block_v = (
            x[:, :, own].flatten(2, 3).flatten(0, 1) for x in (q, k[:, rows], v[:, rows])
        )
        block_q, block_k = rotate(block_q, at_own), rotate(block_k, at_own)
        if context:
            source = slice(0, 1) if self.has_clean else rows
            seen_k, seen_v = (x[:, source][:, :, context].flatten(2, 3) for x in (k, v))
            repeats = q.shape[1] // seen_k.shape[1]
            seen_k, seen_v = rotate(seen_k.flatten(0, 1), at_context), seen_v.flatten(0, 1)
            block_k = torch.cat([seen_k.repeat_interleave(repeats, 0), block_k], 1)
            block_v = torch.cat([seen_v.repeat_interleave(repeats, 0), block_v], 1)
        return self.attention(block_q, block_k, block_v).unflatten(0, (-1, q.shape[1]))


class MaskedAttention:
    """The same by one masked attention over all tokens; absolute positions only (`AttentionContext`).

    With one stream this is block-causal (diffusion-forcing) training: a block sees the window of the same stream. With
    two, `[clean | noisy]`, it is teacher forcing (CausVid).
    """

    def __init__(
        self,
        plans: Sequence[BlockPlan],
        streams: int,
        grid: tuple[int, int],
        head_dim: int,
        device: torch.device | str = "cpu",
        attention: str = "sdpa",
        temporal: torch.Tensor | None = None,
    ):
        frames = plans[-1].own[-1].frame + 1
        if any(
            position != slot.frame
            for plan in plans
            for position, slot in zip(plan.positions, plan.window, strict=True)
        ):
            raise UserError("positions = cache_relative has no mask form: use WindowedAttention")
        self.rotation = rotation(list(range(frames)) * streams, *grid, head_dim, device, temporal)
        self.mask = attention_mask(plans, streams, grid[0] * grid[1]).to(device)
        self.attention = attention_backend(attention)

    def attend(
        self, layer: int, q_BLHD: torch.Tensor, k_BLHD: torch.Tensor, v_BLHD: torch.Tensor
    ) -> torch.Tensor:
        return self.attention(rotate(q_BLHD, self.rotation), rotate(k_BLHD, self.rotation), v_BLHD, self.mask)


def attention_mask(plans: Sequence[BlockPlan], streams: int, tokens_per_frame: int) -> torch.Tensor:
    """Boolean `[L, L]`, true where a query (row) attends a key (column), for `streams` copies of the clip."""
    frames = plans[-1].own[-1].frame + 1
    mask = torch.zeros(streams, frames, streams, frames, dtype=torch.bool)
    for plan in plans:
        own = list(plan.frames)
        context = [frame for frame in plan.attended if frame not in own]
        for stream in range(streams):
            for query in own:
                mask[stream, query, 0, context] = True
                mask[stream, query, stream, own] = True
    return (
        mask.flatten(2, 3)
        .flatten(0, 1)
        .repeat_interleave(tokens_per_frame, 0)
        .repeat_interleave(tokens_per_frame, 1)
    )
