"""Which latent frames a block attends, in which slots, at which positions: plain integers, computed once per block.

    planner = WindowPlanner(WindowOptions(frames_per_block=3, window=12, sink=3))
    plan = planner.plan()        # what the next block will attend; changes nothing
    planner.commit(plan)         # the block is finished: its frames are now in the window

No tensors here: this half of the context cache is property-tested on its own. Where the keys and values of a slot are kept
is the business of streamvid.context.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass

from streamvid.errors import UserError


@dataclass(frozen=True)
class WindowOptions:
    """What a block attends.

    Args:
        frames_per_block: latent frames denoised together.
        window: latent frames attended at most: sink, recent clean frames and the current block.
        sink: first frames of the stream that stay in the window when others are evicted (LongLive, section 3.2).
        positions: name of the temporal position policy, one of `POSITIONS`.
        capacity: slots kept, at least `window`; more changes where keys are stored, never what is attended.
    """

    frames_per_block: int = 3
    window: int = 12
    sink: int = 3
    positions: str = "absolute"
    capacity: int | None = None

    def __post_init__(self) -> None:
        if self.frames_per_block < 1:
            raise UserError(f"frames_per_block = {self.frames_per_block} must be at least 1")
        if self.sink < 0:
            raise UserError(f"sink = {self.sink} must not be negative: give 0 for no sink")
        if self.window < self.sink + self.frames_per_block:
            raise UserError(
                f"window = {self.window} cannot hold sink = {self.sink} and a block of {self.frames_per_block} "
                f"latent frames: give a window of at least {self.sink + self.frames_per_block}"
            )
        if self.positions not in POSITIONS:
            raise UserError(
                f"positions = {self.positions!r} is not known: choose one of {', '.join(POSITIONS)}"
            )
        if self.capacity is not None and self.capacity < self.window:
            raise UserError(
                f"capacity = {self.capacity} is below window = {self.window}: give at least the window, or leave it out"
            )

    @property
    def slots(self) -> int:
        return self.capacity or self.window


@dataclass(frozen=True)
class WindowSlot:
    """One attended latent frame: where its keys are, which frame of the stream it is, at which position it is seen."""

    slot: int
    frame: int
    position: float


@dataclass(frozen=True)
class BlockPlan:
    """Everything a forward needs to know about its window.

    `window` is in temporal order and ends with the block's own frames; `evicted` frames are no longer attended.
    """

    block: int
    window: tuple[WindowSlot, ...]
    own: tuple[WindowSlot, ...]
    evicted: tuple[int, ...]

    @property
    def frames(self) -> tuple[int, ...]:
        return tuple(slot.frame for slot in self.own)

    @property
    def attended(self) -> tuple[int, ...]:
        return tuple(slot.frame for slot in self.window)

    @property
    def positions(self) -> tuple[float, ...]:
        return tuple(slot.position for slot in self.window)


# --- position policies: siblings of one signature -------------------------------------------------------------------


def absolute_positions(frames: Sequence[int]) -> list[float]:
    """Every frame is seen at its index in the scene (Self Forcing, LongLive): the sink's distance grows for ever."""
    return [float(frame) for frame in frames]


def cache_relative_positions(frames: Sequence[int]) -> list[float]:
    """Every frame is seen at its rank in the window (LongLive's infinite variant, Reward Forcing): nothing ever grows."""
    return [float(rank) for rank in range(len(frames))]


POSITIONS: dict[str, Callable[[Sequence[int]], list[float]]] = {
    "absolute": absolute_positions,
    "cache_relative": cache_relative_positions,
}


class WindowPlanner:
    """Slots of one stream's window: which frame each holds, which are free."""

    def __init__(self, options: WindowOptions):
        self.options = options
        self.slot_of: dict[int, int] = {}  # frame -> slot, of live frames
        self.next_block = 0
        self.next_frame = 0
        self.scene_start = 0  # first frame of the current scene: its first frames are the sink

    @property
    def live_frames(self) -> list[int]:
        """Frames in the window, in temporal order."""
        return sorted(self.slot_of)

    def plan(self, frames: int | None = None) -> BlockPlan:
        """Plan the next block of `frames` latent frames (default `frames_per_block`)."""
        count = frames or self.options.frames_per_block
        own = list(range(self.next_frame, self.next_frame + count))
        sink, recent = self._split([*self.live_frames, *own])
        attended = sink + recent[max(0, len(recent) - (self.options.window - self.options.sink)) :]
        evicted = [frame for frame in self.live_frames if frame not in attended]
        taken = {slot for frame, slot in self.slot_of.items() if frame in attended}
        free = [slot for slot in range(self.options.slots) if slot not in taken]
        slot_of = self.slot_of | dict(zip(own, free, strict=False))
        return self._plan(self.next_block, attended, own, slot_of, evicted)

    def replay(self) -> list[BlockPlan]:
        """Plans that rewrite the recent frames of the window, block by block, each seeing the sink and what is older.

        This is the true block-causal recache: a block is seen by later ones as under the new prompt, the sink stays.
        """
        sink, recent = self._split(self.live_frames)
        size = self.options.frames_per_block
        # whole blocks as they were made; the oldest may have lost frames to eviction or to the sink
        cut = len(recent) % size
        blocks = [recent[:cut]] * bool(cut) + [recent[i : i + size] for i in range(cut, len(recent), size)]
        plans, seen = [], list(sink)
        for own in blocks:
            seen += own
            plans.append(self._plan(self.next_block, seen, own, self.slot_of, []))
        return plans

    def commit(self, plan: BlockPlan) -> None:
        """The planned block is finished: it joins the window, what it evicted is forgotten."""
        for frame in plan.evicted:
            del self.slot_of[frame]
        self.slot_of.update({slot.frame: slot.slot for slot in plan.own})
        self.next_block = plan.block + 1
        self.next_frame = plan.own[-1].frame + 1

    def copy(self) -> WindowPlanner:
        twin = copy(self)
        twin.slot_of = dict(self.slot_of)
        return twin

    def start_scene(self) -> None:
        """Forget the window: the next block is the first of a new scene and brings the new sink."""
        self.slot_of.clear()
        self.scene_start = self.next_frame

    def _split(self, frames: Sequence[int]) -> tuple[list[int], list[int]]:
        """Frames of the sink and the others, in temporal order."""
        end = self.scene_start + self.options.sink
        return [frame for frame in frames if frame < end], [frame for frame in frames if frame >= end]

    def _plan(
        self, block: int, attended: list[int], own: list[int], slot_of: dict[int, int], evicted: list[int]
    ) -> BlockPlan:
        positions = POSITIONS[self.options.positions]([frame - self.scene_start for frame in attended])
        window = tuple(
            WindowSlot(slot_of[frame], frame, position)
            for frame, position in zip(attended, positions, strict=True)
        )
        return BlockPlan(block, window, window[len(window) - len(own) :], tuple(evicted))
