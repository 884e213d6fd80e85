"""Scripts on the blocks of a stream: when each shot really starts, and how long the stream lasts."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from streamvid.errors import UserError
from streamvid.script import Script
from streamvid.script_fields import TIME_DIGITS
from streamvid.script_formats import problem


@dataclass(frozen=True)
class TimelineShot:
    """Where one shot falls; times are seconds of media time."""

    index: int
    prompt: str
    requested_start: float
    start: float
    """Second of the first pixel frame of the first block."""
    first_block: int
    blocks: int
    transition: str | None
    seed: int | None
    overrides: Mapping[str, Any]


@dataclass(frozen=True)
class Timeline:
    """A script on the blocks of a stream."""

    shots: tuple[TimelineShot, ...]
    fps: float
    frames_per_block: int
    """Latent frames per block."""
    temporal_ratio: int
    """Pixel frames per latent frame, but for the first latent frame, which gives one."""
    requested_seconds: float
    cuts: int = 0
    """Shots that begin with a cut: each restarts the decoder, whose first latent frame gives one pixel frame."""
    continued: bool = False
    """Whether the stream goes on from given frames: the decoder is not at its first latent frame then."""

    @property
    def blocks(self) -> int:
        """Number of blocks of the whole stream."""
        return self.shots[-1].first_block + self.shots[-1].blocks

    @property
    def frames(self) -> int:
        """Number of pixel frames of the whole stream."""
        whole = first_frame_of_block(self.blocks, self.frames_per_block, self.temporal_ratio)
        return whole - (self.cuts - self.continued) * (self.temporal_ratio - 1)

    @property
    def seconds(self) -> float:
        """Length of the stream, at least what was requested."""
        return self.frames / self.fps

    def shot_of_block(self, block: int) -> TimelineShot:
        """The shot that plays during a block."""
        if not 0 <= block < self.blocks:
            raise IndexError(f"block {block} is not in the timeline of {self.blocks} blocks")
        return self.shots[bisect_right([shot.first_block for shot in self.shots], block) - 1]


def first_frame_of_block(block: int, frames_per_block: int, temporal_ratio: int = 4) -> int:
    """Pixel frame that a block starts with; latent frame 0 gives 1, the others `temporal_ratio` each."""
    return 0 if block == 0 else temporal_ratio * (frames_per_block * block - 1) + 1


def timeline(
    script: Script,
    fps: float,
    frames_per_block: int,
    temporal_ratio: int = 4,
    transition: str | None = None,
    continued: bool = False,
) -> Timeline:
    """Start every shot on the block boundary nearest to the second that it asks for (of two, the earlier).

    The stream lasts at least as long as the script. Two shots on one block are an error. `transition` is that of shots
    which name none; a `continued` stream goes on from given frames, which are not part of it.
    """
    if not (isinstance(fps, (int, float)) and math.isfinite(fps) and fps > 0):
        raise UserError(f"fps is {fps} but must be a number above 0; give another frame rate")
    if frames_per_block < 1 or temporal_ratio < 1:
        sizes = f"frames_per_block is {frames_per_block} and temporal_ratio {temporal_ratio}"
        raise UserError(f"{sizes} but both must be at least 1; correct them")
    block_frames = frames_per_block * temporal_ratio

    lost = -continued * (temporal_ratio - 1)  # frames that the cuts so far took, and that given frames added

    def boundary(block: int) -> int:
        return first_frame_of_block(block, frames_per_block, temporal_ratio) - (lost if block else 0)

    def blocks_before(frame: float) -> int:
        """Largest block that starts at `frame` or before."""
        return max(0, math.floor((frame + lost + temporal_ratio - 1) / block_frames))

    firsts: list[int] = []
    starts: list[int] = []
    for number, shot in enumerate(script.shots, start=1):
        frame = round(shot.start * fps, TIME_DIGITS)
        lower = blocks_before(frame)
        nearest = lower if frame - boundary(lower) <= boundary(lower + 1) - frame else lower + 1
        if firsts and nearest <= firsts[-1]:
            earlier = script.shots[number - 2]
            length = f"{block_frames / fps:g} seconds, one block of {block_frames} frames at {fps:g} fps"
            text = f"it starts at {shot.start:g} and falls on the same block as shot {number - 1}"
            fix = f"make shot {number - 1} (duration {earlier.duration:g}) at least {length}"
            raise problem(script.source, shot.line, f"shot {number}: {text}; {fix}")
        firsts.append(nearest)
        starts.append(boundary(nearest))
        if number > 1 and (shot.transition or transition) == "cut":
            lost += temporal_ratio - 1
    wanted_frames = math.ceil(round(script.duration * fps, TIME_DIGITS))
    total = blocks_before(wanted_frames)
    total += boundary(total) < wanted_frames
    ends = [*firsts[1:], max(total, firsts[-1] + 1)]
    return Timeline(
        shots=tuple(
            TimelineShot(
                index=index,
                prompt=shot.prompt,
                requested_start=shot.start,
                start=start / fps,
                first_block=first,
                blocks=end - first,
                transition=shot.transition or transition,
                seed=shot.seed,
                overrides=shot.overrides,
            )
            for index, (shot, start, first, end) in enumerate(
                zip(script.shots, starts, firsts, ends, strict=True)
            )
        ),
        fps=fps,
        frames_per_block=frames_per_block,
        temporal_ratio=temporal_ratio,
        requested_seconds=script.duration,
        cuts=lost // max(1, temporal_ratio - 1) + continued,
        continued=continued,
    )


def format_timeline(timeline: Timeline, width: int = 120) -> str:
    """A table for the command line, `width` characters wide: requested and actual second of every switch."""
    rows = [("shot", "requested", "actual", "blocks", "transition", "prompt")]
    for shot in timeline.shots:
        change = "start" if shot.index == 0 else shot.transition or "default"
        options = {**({} if shot.seed is None else {"seed": shot.seed}), **shot.overrides}
        extra = "".join(f" [{name}={value}]" for name, value in options.items())
        last_block = shot.first_block + shot.blocks - 1
        rows.append(
            (
                str(shot.index + 1),
                f"{shot.requested_start:.2f} s",
                f"{shot.start:.2f} s",
                f"{shot.first_block}-{last_block}",
                change,
                shot.prompt + extra,
            )
        )
    sizes = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = []
    for row in rows:
        cells = [cell.rjust(size) for cell, size in zip(row[:4], sizes, strict=False)]
        line = "  ".join([*cells, row[4].ljust(sizes[4]), row[5]])
        lines.append(line if len(line) <= width else line[: width - 3].rstrip() + "...")
    block_frames = timeline.frames_per_block * timeline.temporal_ratio
    lines.append(
        f"{timeline.seconds:.2f} s ({timeline.requested_seconds:.2f} s requested): {timeline.frames} frames "
        f"at {timeline.fps:g} fps in {timeline.blocks} blocks of {block_frames} frames "
        f"({block_frames / timeline.fps:.2f} s)"
    )
    return "\n".join(lines)
