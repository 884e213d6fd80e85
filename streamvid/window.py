"""Which latent frames a block attends, in which slots, at which positions: plain integers, computed once per block.

    planner = WindowPlanner(WindowOptions(frames_per_block=3, window=12, sink=3))
    plan = planner.plan()        # what the next block will attend; changes nothing
    planner.commit(plan)         # the block is finished: its frames are now in the window

No tensors here: this half of the context cache is property-tested on its own. Where the keys and values of a slot are kept
is the business of streamvid.context.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from streamvid.errors import UserError
from streamvid.positions import POSITIONS, View

# How the frames of a sink that the stream has not made yet are seen: not at all, or as the releases do. There they are
# attended as zero keys and values; with LongLive the sink's frames after the first block also keep the keys of their first,
# noisiest step, and with Reward Forcing the block's queries stand behind the empty frames, its keys before them.
SINK_FILLINGS = ("clean", "longlive_release", "reward_forcing_release")


@dataclass(frozen=True)
class WindowOptions:
    """What a block attends.

    Args:
        frames_per_block: latent frames denoised together.
        window: latent frames attended at most: sink, recent clean frames and the current block.
        sink: first frames of the stream that stay in the window when others are evicted (LongLive, section 3.2).
        positions: name of the temporal position policy, one of `POSITIONS`.
        capacity: slots kept, at least `window`; more changes where keys are stored, never what is attended.
        joint_blocks: blocks denoised jointly at rising noise levels (Rolling Forcing); 1 for one after the other.
        fuse: evicted frames change the sink (streamvid.sinks), the n-th sink frame n modulo sink.
        fuse_release: as released, every eviction starts at sink frame 0, and one of another size overwrites the sink.
        memories: every evicted frame changes each of the last so many sink frames instead (MemRoPE).
        budget: a full window is compressed to so many frames, token by token (Deep Forcing); None: frames are dropped.
        recent: frames at the end of the window, the block included, that a compression keeps whole. With positions =
            deep_forcing_release it may be less than a block: the rest of the block has to be chosen in its first forward,
            and overwrites chosen tokens in the later ones.
        cache_frames: with joint blocks, frames kept at most, the first block of the window included; None: sink + window.
        first_sink_shift: for positions = deep_forcing_release.
        shot_offset: positions skipped at every new shot (LongLive 2).
        pin_shots: the first frames of the newest shot stay in the window too, as many as the sink (LongLive 2).
        sink_filling: how a sink larger than a block is seen before the stream has filled it, one of `SINK_FILLINGS`.
    """

    frames_per_block: int = 3
    window: int = 12
    sink: int = 3
    positions: str = "absolute"
    capacity: int | None = None
    joint_blocks: int = 1
    fuse: bool = False
    fuse_release: bool = False
    memories: int = 0
    budget: int | None = None
    recent: int | None = None
    first_sink_shift: int = 0
    shot_offset: int = 0
    pin_shots: bool = False
    sink_filling: str = "clean"
    cache_frames: int | None = None

    def __post_init__(self) -> None:
        block = self.frames_per_block
        if block < 1:
            raise UserError(f"frames_per_block = {block} must be at least 1")
        if self.sink < 0:
            raise UserError(f"sink = {self.sink} must not be negative: give 0 for no sink")
        if self.joint_blocks < 1:
            raise UserError(f"joint_blocks = {self.joint_blocks} must be at least 1")
        least = self.sink * (1 + self.pin_shots) + block * self.joint_blocks
        if self.cache_frames is not None:
            self._check_cache_frames(self.cache_frames)
        elif self.window < least:
            jointly = f"{self.joint_blocks} blocks" if self.joint_blocks > 1 else "a block"
            raise UserError(
                f"window = {self.window} cannot hold sink = {self.sink} and {jointly} of {block} "
                f"latent frames: give a window of at least {least}"
            )
        if self.positions not in POSITIONS:
            raise UserError(
                f"positions = {self.positions!r} is not known: choose one of {', '.join(POSITIONS)}"
            )
        if self.capacity is not None and self.capacity < self.window:
            raise UserError(
                f"capacity = {self.capacity} is below window = {self.window}: give at least the window, or leave it out"
            )
        if self.pin_shots and self.positions == "cache_relative":
            raise UserError(
                "positions = cache_relative moves pinned shots, whose keys are kept at one position: use absolute"
            )
        if self.fuse and self.sink == 0:
            raise UserError(
                "sink = 0 leaves evicted frames nothing to be fused into: give a sink or sink_update = static"
            )
        if self.memories > self.sink:
            raise UserError(
                f"sink = {self.sink} cannot hold {self.memories} memory frames: give a larger sink or fewer memory_decays"
            )
        if self.budget is not None:
            self._check_budget(self.budget)

    def _check_cache_frames(self, frames: int) -> None:
        """As released, the window of the first block may reach beyond the span: the span only bounds what is added to it."""
        least = self.sink + self.frames_per_block
        if frames < least or self.window < least:
            raise UserError(
                f"cache_frames = {frames} and window = {self.window} must both hold sink = {self.sink} and a block of "
                f"{self.frames_per_block} latent frames: give at least {least}"
            )

    def _check_budget(self, budget: int) -> None:
        recent, whole = self.recent_frames, self.whole_frames
        if recent < self.frames_per_block and (recent < 1 or self.positions != "deep_forcing_release"):
            raise UserError(
                f"recent = {recent} must hold the block of {self.frames_per_block} latent frames itself: give at least that"
            )
        if not self.sink + whole <= budget <= self.window:
            raise UserError(
                f"budget = {budget} must lie between sink + recent = {self.sink + whole} and window = {self.window}"
            )
        if self.joint_blocks > 1 or self.fuse or self.pin_shots or self.positions == "cache_relative":
            raise UserError(
                f"budget = {budget} keeps single tokens, which excludes joint blocks, a fused sink, pinned shots and "
                "positions = cache_relative: leave the budget out or change them"
            )

    @property
    def recent_frames(self) -> int:
        return self.frames_per_block if self.recent is None else self.recent

    @property
    def whole_frames(self) -> int:
        """Frames at the end of a compressed window that have slots of their own."""
        return max(self.recent_frames, self.frames_per_block)

    @property
    def history(self) -> int:
        """Recent finished frames kept beside the sink for the blocks to come."""
        if self.joint_blocks == 1:
            return self.window - self.frames_per_block - self.sink
        # windows of joint blocks are small at first and then see more of the past than a full one
        kept = self.window if self.cache_frames is None else min(self.window, self.cache_frames - self.sink)
        return kept - self.frames_per_block

    @property
    def slots(self) -> int:
        if self.joint_blocks > 1:
            return max(
                self.capacity or 0, self.sink + self.history + self.joint_blocks * self.frames_per_block
            )
        return self.capacity or self.window


NO_POSITION = math.nan  # one object, so that equal plans compare equal


@dataclass(frozen=True)
class WindowSlot:
    """One attended latent frame: where its keys are, which frame of the stream it is, at which position it is seen.

    A slot of compressed tokens holds no one frame: its `frame` is negative, its `position` is `NO_POSITION`. A frame
    without a position is attended with the keys that it had before rotation.
    """

    slot: int
    frame: int
    position: float


@dataclass(frozen=True)
class BlockPlan:
    """Everything a forward needs to know about its window.

    `window` is in temporal order and ends with the block's own frames; `evicted` frames are no longer attended.

    Attributes:
        fused: (slot of an evicted frame, slot of a sink frame that it changes).
        overwrites: nothing of those sink frames stays in the average.
        compressed_from: slots in temporal order from which the window is compressed during the first forward.
        empty: frames of zero keys and values that are attended too.
        frozen: own frames, the first ones, that keep the keys and values of the block's first forward.
        queries_ahead: how much further on the queries stand than the block's keys.
    """

    block: int
    window: tuple[WindowSlot, ...]
    own: tuple[WindowSlot, ...]
    evicted: tuple[int, ...]
    fused: tuple[tuple[int, int], ...] = ()
    overwrites: bool = False
    compressed_from: tuple[int, ...] = ()
    empty: int = 0
    frozen: int = 0
    queries_ahead: int = 0

    @property
    def frames(self) -> tuple[int, ...]:
        return tuple(slot.frame for slot in self.own)

    @property
    def attended(self) -> tuple[int, ...]:
        return tuple(slot.frame for slot in self.window)

    @property
    def positions(self) -> tuple[float, ...]:
        """Of the frames; compressed tokens, which keep the positions they have, are left out."""
        return tuple(slot.position for slot in self.window if slot.frame >= 0)


def plan_state(plan: BlockPlan) -> dict[str, Any]:
    """A plan of whole frames as plain values (streamvid.saving)."""
    slots = [(slot.slot, slot.frame, slot.position) for slot in plan.window]
    return {"block": plan.block, "window": slots, "own": list(plan.frames), "evicted": list(plan.evicted)}


def plan_from(state: Mapping[str, Any]) -> BlockPlan:
    """The plan of a `plan_state`."""
    window = tuple(WindowSlot(*slot) for slot in state["window"])
    own = tuple(slot for slot in window if slot.frame in state["own"])
    return BlockPlan(state["block"], window, own, tuple(state["evicted"]))


class WindowPlanner:
    """Slots of one stream's window: which frame each holds, which are free."""

    def __init__(self, options: WindowOptions):
        self.options = options
        self.slot_of: dict[int, int] = {}  # frame -> slot, of live frames
        self.compressed: tuple[int, ...] = ()  # slots of compressed tokens
        self.next_block = 0
        self.next_frame = 0
        self.scene_start = 0  # first frame of the current scene: positions count from here
        self.sink_start = 0  # first frame of the sink
        self.shots: tuple[int, ...] = ()  # frames at which a new shot began in the scene
        self.pinned: tuple[int, ...] = ()
        self.first_roll: int | None = None  # first frame of the block that first evicted something
        self.roll: int | None = None  # ... and of the block that did last
        self.fusions = 0

    @property
    def live_frames(self) -> list[int]:
        """Frames in the window, in temporal order."""
        return sorted(self.slot_of)

    def plan(self, frames: int | None = None) -> BlockPlan:
        """Plan the next block of `frames` latent frames (default `frames_per_block`)."""
        count = frames or self.options.frames_per_block
        own = list(range(self.next_frame, self.next_frame + count))
        if self.options.budget is not None:
            stored = len(self.live_frames) + len(self.compressed) + count
            return self._compress(own) if stored > self.options.window else self._append(own)
        sink, recent = self._split([*self.live_frames, *own])
        attended = sink + self._recent(recent, self._room(count))
        kept = self._recent([frame for frame in recent if frame < own[0]], self.options.history)
        evicted = [frame for frame in self.live_frames if frame not in attended and frame not in kept]
        taken = {slot for frame, slot in self.slot_of.items() if frame not in evicted}
        slot_of = self.slot_of | dict(zip(own, self._free(taken), strict=False))
        plan = self._plan(attended, own, slot_of, evicted)
        if self.options.fuse and len(sink) == self.options.sink:
            overwrites = self.options.fuse_release and len(evicted) not in (0, len(sink))
            plan = replace(plan, fused=self._meetings(evicted, sink), overwrites=overwrites)
        return plan

    def context_plan(self, plan: BlockPlan, released: bool = False) -> BlockPlan:
        """Plan of the context pass of a window's first block, which alone is finished.

        It sees what the joint forward saw before it. As `released`, Rolling Forcing shows it the last frames of all that is
        stored: the sink at its index while everything fits into the window; afterwards what remains of it, if anything
        does, before rotation, as it is stored.
        """
        count = self.options.frames_per_block
        own = plan.own[:count]
        if not released:
            return replace(plan, window=plan.window[: len(plan.window) - len(plan.own) + count], own=own)
        stored = [
            frame for frame in self.live_frames if frame not in plan.evicted and frame not in plan.frames
        ]
        stored += [slot.frame for slot in own]
        seen = stored[max(0, len(stored) - self.options.window) :]
        unrotated = self._split(seen)[0] if len(seen) < len(stored) else []
        slot_of = self.slot_of | {slot.frame: slot.slot for slot in own}
        window = tuple(
            WindowSlot(
                slot_of[frame], frame, NO_POSITION if frame in unrotated else float(self._index(frame))
            )
            for frame in seen
        )
        return replace(plan, window=window, own=window[len(window) - count :])

    def replay(self, with_sink: bool = False) -> list[BlockPlan]:
        """Plans that rewrite the recent frames of the window, block by block, each seeing the sink and what is older.

        This is the true block-causal recache: a block is seen by later ones as under the new prompt. The sink stays, or is
        rewritten first, as a block of its own.
        """
        sink, pinned, recent = self._replayed()
        plans = [self._plan(sink, sink, self.slot_of, [], self.compressed)] if with_sink and sink else []
        seen = sink + pinned
        # blocks as they were made; they may have lost frames to eviction or to the sink
        size = self.options.frames_per_block
        for _, block in groupby(recent, lambda frame: (self.next_frame - 1 - frame) // size):
            own = list(block)
            seen = seen + own
            plans.append(self._plan(seen, own, self.slot_of, [], self.compressed))
        return plans

    def recompute(self, plan: BlockPlan) -> list[BlockPlan]:
        """Plans that write the past of a block anew: the frames it will attend, in groups as large as a block, each seeing
        itself and those before it, as a stream that began with them."""
        past, size = (
            [frame for frame in plan.attended if frame not in plan.frames],
            self.options.frames_per_block,
        )
        slot_of = {slot.frame: slot.slot for slot in plan.window}
        return [
            self._plan(past[: start + size], past[start : start + size], slot_of, [])
            for start in range(0, len(past), size)
        ]

    def replay_at_once(self, sink: bool) -> list[BlockPlan]:
        """One plan that rewrites the recent frames together, each seeing all; with `sink` also the sink's own."""
        first, pinned, recent = self._replayed()
        own = first + recent if sink else recent
        return [self._plan(first + pinned + recent, own, self.slot_of, [], self.compressed)] if own else []

    def _replayed(self) -> tuple[list[int], list[int], list[int]]:
        """The sink, old pinned frames, which a replay leaves as they are, and recent ones, which it rewrites."""
        sink, recent = self._split(self.live_frames)
        pinned = [frame for frame in recent if frame < self.next_frame - self.options.window]
        return sink, pinned, recent[len(pinned) :]

    @property
    def latest_frames(self) -> range:
        """The last frames of the scene, as many as a window holds: what a window can be made anew from."""
        return range(max(self.scene_start, self.next_frame - self.options.window), self.next_frame)

    def reanchor(self, frames: Sequence[int]) -> None:
        """The window becomes `frames`, the first of them the new sink; their keys have yet to be written."""
        self.slot_of = {frame: slot for slot, frame in enumerate(frames)}
        self.compressed, self.sink_start = (), frames[0]
        self.first_roll = self.roll = None  # the new sink has not been moved yet
        self._pin(self.pinned)

    def forget(self, keep_last: int) -> None:
        """Evict all but the sink and the last frames (Infinity-RoPE's flush)."""
        sink, recent = self._split(self.live_frames)
        kept = sink + recent[max(0, len(recent) - keep_last) :]
        self.slot_of = {frame: self.slot_of[frame] for frame in kept}
        self.compressed = ()
        self._pin(self.pinned)

    def commit(self, plan: BlockPlan) -> None:
        """The planned block is finished: it joins the window, what it evicted is forgotten."""
        first = plan.own[0].frame
        for frame in plan.evicted:
            del self.slot_of[frame]
        self.slot_of |= {slot.frame: slot.slot for slot in plan.window if slot.frame in self.slot_of}
        self.slot_of |= {slot.frame: slot.slot for slot in plan.own}
        self.compressed = tuple(slot.slot for slot in plan.window if slot.frame < 0)
        self.first_roll, self.roll = self._rolls(plan)
        self.fusions += len(plan.fused)
        if self.options.pin_shots and self.shots and self.shots[-1] == first:
            self._pin(plan.frames[: self.options.sink])
        self.next_block = plan.block + 1
        self.next_frame = plan.own[-1].frame + 1

    def _pin(self, frames: Sequence[int]) -> None:
        """Pin those of the frames that are in the window; the sink needs no pin."""
        self.pinned = tuple(frame for frame in self._split(frames)[1] if frame in self.slot_of)

    def copy(self) -> WindowPlanner:
        twin = WindowPlanner(self.options)
        twin.load_state_dict(self.state_dict())
        return twin

    def state_dict(self) -> dict[str, Any]:
        """Everything but the options (streamvid.saving)."""
        return {**vars(self), "options": None, "slot_of": dict(self.slot_of)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state, options=self.options, slot_of=dict(state["slot_of"]))

    def keep_whole_frames(self) -> None:
        """Keep only frames whose clean latents are kept, their keys have yet to be written: the latest frames stand in for
        compressed tokens, nothing for old pinned frames."""
        sink, _, recent = self._replayed()
        if self.compressed:
            latest = [frame for frame in self.latest_frames if frame not in sink]
            recent = latest[max(0, len(sink) + len(latest) - self.options.window) :]
        frames, old = [*sink, *recent], self.slot_of
        self.slot_of = {
            frame: rank if self.options.budget else old[frame] for rank, frame in enumerate(frames)
        }
        self.compressed = ()
        self._pin(self.pinned)

    def start_scene(self) -> None:
        """Forget the window: the next block is the first of a new scene and brings the new sink."""
        fresh = WindowPlanner(self.options)
        fresh.next_block, fresh.next_frame = self.next_block, self.next_frame
        fresh.scene_start = fresh.sink_start = self.next_frame
        self.__dict__.update(fresh.__dict__)

    def start_shot(self) -> None:
        """The next block begins a new shot of the scene: `shot_offset` positions on, the window stays (LongLive 2)."""
        self.shots = (*self.shots, self.next_frame)

    def _meetings(self, evicted: list[int], sink: list[int]) -> tuple[tuple[int, int], ...]:
        """Slots of every evicted frame and of the sink frames that it changes."""
        if self.options.memories:
            pairs = [(frame, kept) for frame in evicted for kept in sink[-self.options.memories :]]
        elif self.options.fuse_release:
            pairs = list(zip(evicted, sink, strict=False))
        else:
            pairs = [(frame, sink[(self.fusions + n) % len(sink)]) for n, frame in enumerate(evicted)]
        return tuple((self.slot_of[frame], self.slot_of[kept]) for frame, kept in pairs)

    # --- parts of a plan --------------------------------------------------------------------------------------------

    def _split(self, frames: Sequence[int]) -> tuple[list[int], list[int]]:
        """Frames of the sink and the others, in temporal order."""
        end = self.sink_start + self.options.sink
        return [frame for frame in frames if frame < end], [frame for frame in frames if frame >= end]

    def _recent(self, recent: list[int], room: int) -> list[int]:
        """What has room beside the sink: the latest frames, and those pinned that are no longer among them."""
        for pinned in range(len(self.pinned) + 1):
            latest = recent[max(0, len(recent) - room + pinned) :]
            missing = [frame for frame in self.pinned if frame not in latest]
            if len(missing) <= pinned:
                break
        return missing + latest

    def _room(self, count: int) -> int:
        """For the block's `count` frames and recent ones, beside the sink."""
        room = self.options.window - self.options.sink
        if self.options.cache_frames is not None:
            room = min(max(room, count), self.options.history + count)
        return room

    def _index(self, frame: int) -> int:
        """Of a frame in its scene, with the offset of its shot."""
        shots = sum(frame >= shot for shot in self.shots)
        return frame - self.scene_start + self.options.shot_offset * shots

    def _free(self, taken: set[int]) -> list[int]:
        return [slot for slot in range(self.options.slots) if slot not in taken]

    def _append(self, own: list[int]) -> BlockPlan:
        taken = {*self.slot_of.values(), *self.compressed}
        slot_of = self.slot_of | dict(zip(own, self._free(taken), strict=False))
        return self._plan([*self.live_frames, *own], own, slot_of, [], self.compressed)

    def _compress(self, own: list[int]) -> BlockPlan:
        """The block arrives at a full window: sink, chosen tokens and recent frames move to the front of the buffer."""
        sink, others = self._split(self.live_frames)
        recent = [*others, *own][-self.options.whole_frames :]
        first = len(sink)
        chosen = (self.options.budget or 0) - first - len(recent)
        slots = range(first + chosen, first + chosen + len(recent))
        slot_of = dict(zip([*sink, *recent], [*range(first), *slots], strict=True))
        evicted = [frame for frame in others if frame not in recent]
        compressed = tuple(range(first, first + chosen))
        plan = self._plan([*sink, *recent], own, slot_of, evicted, compressed)
        sources = [*(self.slot_of[f] for f in sink), *self.compressed, *(self.slot_of[f] for f in others)]
        return replace(plan, compressed_from=tuple(sources))

    def _rolls(self, plan: BlockPlan) -> tuple[int | None, int | None]:
        if not plan.evicted and not plan.compressed_from:
            return self.first_roll, self.roll
        first = plan.own[0].frame
        return (first if self.first_roll is None else self.first_roll), first

    def _plan(
        self,
        attended: list[int],
        own: list[int],
        slot_of: dict[int, int],
        evicted: list[int],
        compressed: tuple[int, ...] = (),
    ) -> BlockPlan:
        """The plan of a block whose frames are the last of `attended`."""
        rolling = bool(evicted) or (bool(compressed) and not self.compressed)
        rolled = None
        if rolling or self.first_roll is not None:
            last = own[0] if rolling else self.roll
            rolled = (last or 0) - (own[0] if self.first_roll is None else self.first_roll)
        sink = len(self._split(attended)[0])
        indices = [self._index(frame) for frame in attended]
        view = View(indices, sink, len(compressed), rolled, self.options.first_sink_shift)
        positions = POSITIONS[self.options.positions](view)
        seen = [
            WindowSlot(slot_of[frame], frame, position)
            for frame, position in zip(attended, positions, strict=True)
        ]
        tokens = [WindowSlot(slot, -1 - rank, NO_POSITION) for rank, slot in enumerate(compressed)]
        window = (*seen[:sink], *tokens, *seen[sink:])
        own_slots = tuple(slot for slot in seen if slot.frame in own)
        plan = BlockPlan(self.next_block, window, own_slots, tuple(evicted))
        return plan if self.options.sink_filling == "clean" else self._as_released(plan)

    def _as_released(self, plan: BlockPlan) -> BlockPlan:
        """What the releases do while their sink is not full."""
        empty = max(0, self.options.sink - len(plan.window))
        if self.options.sink_filling == "reward_forcing_release":
            return replace(plan, empty=empty, queries_ahead=empty)
        first = plan.own[0].frame
        rewritten = first == self.scene_start or first in self.slot_of  # the first block, or a replay
        return replace(plan, empty=empty, frozen=0 if rewritten else len(self._split(plan.frames)[0]))
