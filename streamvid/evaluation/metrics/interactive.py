"""What happens at prompt switches: whether they are taken, how fast, whether each segment shows its own prompt."""

from __future__ import annotations

from typing import Any

import numpy as np

from streamvid.evaluation.metrics.drift import segments_of
from streamvid.evaluation.registry import Metric, register
from streamvid.evaluation.types import Batch, Clip, Outcome, Segment, ok, skip
from streamvid.world.probe import WINDOW_FRAMES
from streamvid.world.prompts import parse
from streamvid.world.scene import ATTRIBUTES

TAKEN = 1.0  # contrast above which a switch counts as taken
FADE = 8  # frames after a switch that belong to both prompts


class Switching(Metric):
    """Base: keeps the descriptors of every frame of a video with several prompts."""

    def begin(self, clip: Clip) -> str | None:
        self.kept: list[np.ndarray] = []
        super().begin(clip)
        return None if len(clip.video.segments) > 1 else "its prompt never changes"

    def add(self, batch: Batch) -> None:
        self.kept += [frame.descriptor for frame in batch.frames]

    def ending(self, segment: Segment) -> np.ndarray:
        """The last second of a segment (its second half where it is shorter than two)."""
        length = max(1, min(round(self.clip.fps), (segment.stop - segment.start) // 2))
        return np.stack(self.kept[segment.stop - length : segment.stop])


@register("interactive.switch_contrast", fidelity="own", better="up")
class SwitchContrast(Switching):
    """Change between the ends of two prompts' segments over the change within them; the weakest switch counts.

    Below 1 a switch was ignored, or asked for something that hardly shows.
    """

    def end(self) -> Outcome:
        contrasts = [
            self.contrast(a, b)
            for a, b in zip(self.clip.video.segments, self.clip.video.segments[1:], strict=False)
        ]
        ignored = float(np.mean([value < TAKEN for value in contrasts]))
        return ok(min(contrasts), details={"ignored": ignored}, series={"per_switch": contrasts})

    def contrast(self, old: Segment, new: Segment) -> float:
        before, after = self.ending(old), self.ending(new)
        within = [np.linalg.norm(part - part.mean(0), axis=1).mean() for part in (before, after)]
        gap = np.linalg.norm(after.mean(0) - before.mean(0))
        floor = 0.5 * before.shape[1] ** 0.5  # half a grey level everywhere
        return float(gap / max(np.mean(within), floor))


def settled_after(nearer: np.ndarray, hold: int) -> int:
    """First index from which `nearer` is true for `hold` frames on end (to the end, where fewer are left)."""
    for start in np.flatnonzero(nearer):
        if nearer[start : start + hold].all():
            return int(start)
    return len(nearer)


@register("interactive.switch_latency", fidelity="own", better="down", unit="frames", version=2)
class SwitchLatency(SwitchContrast):
    """Frames from a switch until the picture is, for half a second on end, nearer to what the new prompt ends with than to
    what the old one did; mean over taken switches.
    """

    def end(self) -> Outcome:
        latencies: list[int | None] = []
        for old, new in zip(self.clip.video.segments, self.clip.video.segments[1:], strict=False):
            if self.contrast(old, new) < TAKEN:
                latencies.append(None)
                continue
            before, after = self.ending(old).mean(0), self.ending(new).mean(0)
            frames = np.stack(self.kept[new.start : new.stop])
            nearer = np.linalg.norm(frames - after, axis=1) < np.linalg.norm(frames - before, axis=1)
            latencies.append(settled_after(nearer, max(1, round(self.clip.fps / 2))))
        taken = [value for value in latencies if value is not None]
        series = {"per_switch": latencies}
        if not taken:
            return skip("no switch was taken", series=series)
        return ok(float(np.mean(taken)), series=series)


@register("interactive.return", fidelity="own", better="up")
class ReturnToPrompt(Switching):
    """Where a prompt comes back after another: 1 if the picture is as it was, 0 if it is as under the prompt in between."""

    def end(self) -> Outcome:
        segments, scores = self.clip.video.segments, []
        for index, segment in enumerate(segments):
            earlier = [i for i in range(index - 1) if segments[i].prompt == segment.prompt]
            if not earlier or segments[index - 1].prompt == segment.prompt:
                continue
            old, between, new = (self.ending(segments[i]).mean(0) for i in (earlier[-1], index - 1, index))
            away = np.linalg.norm(between - old)
            if away > 0:
                scores.append(1 - float(np.linalg.norm(new - old) / away))
        return ok(float(np.mean(scores))) if scores else skip("no prompt comes back")


class SegmentMatrix(Metric):
    """Base: how well every segment fits every prompt. `series`: matrix [segment][prompt], names of the prompts."""

    def begin(self, clip: Clip) -> str | None:
        super().begin(clip)
        self.segments = segments_of(clip)
        self.prompts = list(dict.fromkeys(part.prompt for part in self.segments))
        self.seen: list[list[dict[str, float]]] = [[] for _ in self.segments]
        return None if all(self.prompts) else "it has no prompt"

    def matrix(self) -> list[list[float | None]]:
        def mean(rows: list[dict[str, float]], prompt: str) -> float | None:
            values = [row[prompt] for row in rows if prompt in row]
            return float(np.mean(values)) if values else None

        return [[mean(rows, prompt) for prompt in self.prompts] for rows in self.seen]

    def outcome(self, **details: Any) -> Outcome:
        table = self.matrix()
        own = [row[self.prompts.index(part.prompt)] for part, row in zip(self.segments, table, strict=True)]
        told = [value for value in own if value is not None]
        if not told:
            return skip("no segment is long enough")
        wins = [
            all(other is None or other <= value for other in row)
            for value, row in zip(own, table, strict=True)
            if value is not None
        ]
        details = {"diagonal_wins": float(np.mean(wins)), **details}
        series = {"matrix": table, "prompts": self.prompts, "per_segment": own}
        return ok(float(np.mean(told)), series=series, details=details)


@register("interactive.probe_adherence", fidelity="own", better="up", unit="share", needs=("probe",))
class ProbeAdherence(SegmentMatrix):
    """Share of the attributes named by the prompt that the embedded world's probe finds, by segment and prompt.

    Details: `stale`, the share of changed attributes that still are as the previous prompt named them.
    """

    def begin(self, clip: Clip) -> str | None:
        reason = super().begin(clip)
        self.named = {prompt: parse(prompt) for prompt in self.prompts}
        self.waiting: list[np.ndarray] = []
        self.stale: list[float] = []
        self.curve: list[list[float]] = []
        if (clip.height, clip.width) != (128, 128):
            return reason or "the probe knows pictures of 128 x 128 px only"
        return reason or (None if any(self.named.values()) else "its prompts are not of the embedded world")

    def add(self, batch: Batch) -> None:
        for frame in batch.frames:
            number = next((i for i, s in enumerate(self.segments) if s.start <= frame.index < s.stop), None)
            if number is None:
                continue
            start = self.segments[number].start
            if frame.index == start:
                self.waiting = []
            if start and frame.index < start + FADE:
                continue
            self.waiting.append(frame.rgb)
            if len(self.waiting) == WINDOW_FRAMES:
                self._look(number, frame.index)
                self.waiting = []

    def _look(self, number: int, last_frame: int) -> None:
        told = self.backbones.get("probe").classify(np.stack(self.waiting)[None])
        found = {name: ATTRIBUTES[name][int(told[name])] for name in ATTRIBUTES}
        row = {
            prompt: float(np.mean([found[name] == value for name, value in named.items()]))
            for prompt, named in self.named.items()
            if named
        }
        self.seen[number].append(row)
        own = self.named[self.segments[number].prompt]
        if self.segments[number].prompt in row:
            self.curve.append([(last_frame + 1) / self.clip.fps, row[self.segments[number].prompt]])
        if number:
            before = self.named[self.segments[number - 1].prompt]
            changed = [name for name in own if name in before and own[name] != before[name]]
            if changed:
                self.stale.append(float(np.mean([found[name] == before[name] for name in changed])))

    def end(self) -> Outcome:
        details = {"stale": float(np.mean(self.stale))} if self.stale else {}
        found = self.outcome(**details)
        return (
            found
            if found.status != "ok"
            else ok(found.score, series={**found.series, "curve": self.curve}, details=found.details)
        )


@register("interactive.clip_segment", fidelity="related", better="up", unit="100 cosine", needs=("clip_b",))
class ClipSegment(SegmentMatrix):
    """100 x CLIP ViT-B/32 similarity of two frames per second to the prompts, by segment and prompt.

    The settings of the published interactive tables are not public. Details: `cut`, the share of prompts that are
    longer than the text encoder reads.
    """

    def __init__(self, backbones, fps: float = 2.0):
        super().__init__(backbones)
        self.fps = fps

    def add(self, batch: Batch) -> None:
        encoder = self.backbones.get("clip_b")
        if not hasattr(self, "texts"):
            rows = encoder.text(self.prompts).numpy()
            self.texts = rows / np.linalg.norm(rows, axis=-1, keepdims=True)
        every = max(1, round(self.clip.fps / self.fps))
        wanted = [i for i, frame in enumerate(batch.frames) if frame.index % every == 0]
        if not wanted:
            return
        rows = batch.embedding(encoder)[wanted]
        similar = 100 * (rows / np.linalg.norm(rows, axis=-1, keepdims=True)) @ self.texts.T
        for position, values in zip(wanted, similar, strict=True):
            index = batch.frames[position].index
            number = next((i for i, s in enumerate(self.segments) if s.start <= index < s.stop), None)
            if number is not None:
                self.seen[number].append(dict(zip(self.prompts, values.tolist(), strict=True)))

    def end(self) -> Outcome:
        encoder = self.backbones.get("clip_b")
        cut = [encoder.tokens(prompt) > encoder.longest for prompt in self.prompts]
        return self.outcome(cut=float(np.mean(cut)))
