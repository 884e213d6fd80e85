"""Does each metric see its own failure, and only that? `streamvid eval sensitivity`.

Real renders of the embedded world (two prompts, a switch in the middle) get failures injected. A metric is judged by the
area under its ROC curve: the chance that a clip with the failure scores worse than a clip without any. Scenes roll, because
a subject that bounces or circles before a still background loops by nature.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from scipy.stats import rankdata
from tqdm import tqdm

from streamvid.evaluation.backbones import Backbones
from streamvid.evaluation.engine import measure
from streamvid.evaluation.registry import all_metrics, resolve
from streamvid.evaluation.results import to_json, write_text
from streamvid.evaluation.sources import ArraySource
from streamvid.evaluation.types import Segment, Video
from streamvid.world.render import FRAMES_PER_SECOND, render_clip
from streamvid.world.sampling import block_start
from streamvid.world.scene import ATTRIBUTES, Scene, sample_scene, sample_scenery

BLOCKS, SWITCH_BLOCK, SIZE = 12, 6, 64
FRAMES, SWITCH = block_start(BLOCKS), block_start(SWITCH_BLOCK)
PASS = 0.95  # area that a metric must reach on its own failure
REACTS = 0.8  # area from which a metric counts as reacting to another failure; only what ALSO states may


class Renders:
    """One clip without failures, and its first prompt going on: uint8 `[T, H, W, 3]`."""

    def __init__(self, number: int):
        self.rng = np.random.default_rng([77, number])
        old, new = self._scene(), self._scene()
        while sum(getattr(old, n) == getattr(new, n) for n in ("sky", "ground", "colour")):
            new = self._scene()
        new = replace(new, motion=old.motion)  # the camera rolls on through the switch
        scenery = sample_scenery(self.rng)
        self.going_on = render_clip([(0, old)], scenery, FRAMES, SIZE)
        after = render_clip([(0, old), (SWITCH, new)], scenery, FRAMES - SWITCH, SIZE, first_frame=SWITCH)
        self.clean = np.concatenate([self.going_on[:SWITCH], after])

    def _scene(self) -> Scene:
        scene = sample_scene(self.rng, held_out=None)
        motions = [name for name in ATTRIBUTES["motion"] if name.startswith("rolls")]
        return replace(scene, motion=motions[int(self.rng.integers(2))])


def frozen(clip: Renders) -> np.ndarray:
    """The last second and a half stands still."""
    frames = clip.clean.copy()
    start = FRAMES - int(clip.rng.integers(24, 36))
    frames[start:] = frames[start]
    return frames


def looped(clip: Renders) -> np.ndarray:
    """Each prompt repeats its first second and a bit, over and over."""
    period = int(clip.rng.integers(14, 22))
    index = [
        base + (k - base - 10) % period + 10 if k >= base + 10 else k
        for base, stop in ((0, SWITCH), (SWITCH, FRAMES))
        for k in range(base, stop)
    ]
    return clip.clean[index]


def drifted(clip: Renders) -> np.ndarray:
    """Brighter or darker, greyer or more colourful, or more and more blurred."""
    kind, strength = int(clip.rng.integers(3)), float(clip.rng.uniform(0.7, 1.0))
    frames = np.empty_like(clip.clean)
    sign = 1 if clip.rng.random() < 0.5 else -1
    for k, frame in enumerate(clip.clean):
        share = strength * k / FRAMES
        picture = frame.astype(np.float32)
        if kind == 0:
            picture += sign * 70 * share
        elif kind == 1:
            gray = picture.mean(2, keepdims=True)
            picture = gray + (picture - gray) * (1 + 0.9 * sign * share)
        else:
            picture = cv2.GaussianBlur(picture, (0, 0), 0.1 + 2.5 * share)
        frames[k] = picture.clip(0, 255)
    return frames


def flickering(clip: Renders) -> np.ndarray:
    """The brightness of every frame is off by a few grey levels."""
    size = float(clip.rng.uniform(4, 8))
    offsets = clip.rng.choice([-size, size], FRAMES)
    return (clip.clean + offsets[:, None, None, None]).clip(0, 255).astype(np.uint8)


def flashback(clip: Renders) -> np.ndarray:
    """The first frames flash up under the second prompt."""
    frames = clip.clean.copy()
    at = int(clip.rng.integers(SWITCH + 16, FRAMES - 8))
    frames[at : at + 3] = frames[:3]
    return frames


def ignored(clip: Renders) -> np.ndarray:
    """The new prompt is never shown."""
    return clip.going_on


def late(clip: Renders) -> np.ndarray:
    """The new prompt shows one to two seconds late."""
    delay = int(clip.rng.integers(20, 33))
    return np.concatenate([clip.going_on[: SWITCH + delay], clip.clean[SWITCH + delay :]])


def seams(clip: Renders) -> np.ndarray:
    """Every other chunk is a few grey levels brighter."""
    offset = float(clip.rng.uniform(3, 6))
    chunk = np.array([sum(k >= block_start(b) for b in range(1, BLOCKS)) for k in range(FRAMES)])
    return (clip.clean + offset * (chunk % 2)[:, None, None, None]).clip(0, 255).astype(np.uint8)


def collapsed(clip: Renders) -> np.ndarray:
    """The second half is all but the first frame (the sink)."""
    share = float(clip.rng.uniform(0.8, 0.95))
    frames = clip.clean.astype(np.float32)
    frames[SWITCH:] = share * frames[0] + (1 - share) * frames[SWITCH:]
    return frames.astype(np.uint8)


# failure: how it is injected, and the metric that must see it
FAILURES: dict[str, tuple[Callable[[Renders], np.ndarray], str]] = {
    "frozen": (frozen, "long.freeze"),
    "looped": (looped, "long.repetition"),
    "drifted": (drifted, "drift.look"),
    "flickering": (flickering, "long.warp_flicker"),
    "flashback": (flashback, "long.flashback"),
    "ignored prompt": (ignored, "interactive.switch_contrast"),
    "late switch": (late, "interactive.switch_latency"),
    "seams": (seams, "long.seam"),
    "collapsed": (collapsed, "long.sink_copy"),
}


# metric: other failures that it reacts to as well, and why
ALSO: dict[str, dict[str, str]] = {
    "long.repetition": {"frozen": "a picture that stands still was seen before"},
    "long.warp_flicker": {"seams": "a jump in brightness is flicker"},
    "drift.look": {
        "flickering": "the mean brightness of two seconds still varies",
        "seams": "every other chunk is brighter, the last ones of a prompt maybe and the first ones not",
    },
    "interactive.switch_contrast": {"collapsed": "what hides the new picture hides the change to it"},
    "interactive.switch_latency": {"ignored prompt": "a change that never comes is late"},
    "long.sink_copy": {
        "flashback": "it copies the first frames",
        "ignored prompt": "the picture stays what the first frames began",
        "late switch": "so it does, for a while",
    },
}
DEAR = "long.warp_flicker"  # optical flow takes nine tenths of all time: it sees its own failure and one other, in turns


def sees(metric: str, kind: str, number: int) -> bool:
    """Whether a metric looks at a clip's failure."""
    others = [name for name, (_, own) in FAILURES.items() if own != metric]
    return metric != DEAR or kind not in others or kind == others[number % len(others)]


def badness(frames: np.ndarray, metrics: Sequence[str]) -> dict[str, float]:
    """Detectors on a clip, the greater the worse. A switch that is not taken has waited to the end."""
    video = Video(
        "clip",
        "clip",
        segments=(Segment(0, SWITCH, "old"), Segment(SWITCH, FRAMES, "new")),
        borders=tuple(block_start(b) for b in range(1, BLOCKS)),
    )
    found = measure(video, ArraySource(frames, FRAMES_PER_SECOND), resolve(list(metrics)), Backbones())
    scores = {}
    for name, (outcome, _) in found.items():
        sign = -1 if all_metrics()[name].better == "up" else 1
        if outcome.status == "failed":
            raise RuntimeError(f"{name}: {outcome.reason}")
        missing = float(FRAMES) if name == "interactive.switch_latency" else 0.0
        scores[name] = missing if outcome.score is None else sign * outcome.score
    return scores


def clips_of(number: int) -> dict[str, np.ndarray]:
    """A clean clip and its failures."""
    renders = Renders(number)
    return {"clean": renders.clean, **{name: inject(renders) for name, (inject, _) in FAILURES.items()}}


def rows_of(number: int) -> list[dict[str, Any]]:
    """What every metric says of a clip and of its failures."""
    rows = []
    for kind, frames in clips_of(number).items():
        metrics = [metric for _, metric in FAILURES.values() if sees(metric, kind, number)]
        rows.append({"number": number, "kind": kind, "scores": badness(frames, metrics)})
    return rows


def roc_auc(bad: np.ndarray, good: np.ndarray) -> float:
    """Chance that a value of `bad` is above one of `good`, ties counted half (Mann & Whitney 1947)."""
    ranks = rankdata(np.concatenate([bad, good]))
    return float((ranks[: len(bad)].sum() - len(bad) * (len(bad) + 1) / 2) / (len(bad) * len(good)))


def judge(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Areas, detector by failure, each against the clean clips; and the share of alarms at a threshold that one clean clip
    in twenty exceeds."""
    metrics = [metric for _, metric in FAILURES.values()]
    scores = {
        kind: {
            m: np.array([r["scores"][m] for r in rows if r["kind"] == kind and m in r["scores"]])
            for m in metrics
        }
        for kind in ("clean", *FAILURES)
    }
    areas = {
        metric: {
            kind: round(roc_auc(scores[kind][metric], scores["clean"][metric]), 4)
            for kind in FAILURES
            if len(scores[kind][metric])
        }
        for metric in metrics
    }
    alarms = {}
    for metric in metrics:
        limit = float(np.quantile(scores["clean"][metric], 0.95))
        alarms[metric] = {
            kind: round(float((scores[kind][metric] > limit).mean()), 4)
            for kind in ("clean", *FAILURES)
            if len(scores[kind][metric])
        }
    own = {kind: areas[metric][kind] for kind, (_, metric) in FAILURES.items()}
    unstated = [
        [metric, kind]
        for metric, row in areas.items()
        for kind, area in row.items()
        if area >= REACTS and FAILURES[kind][1] != metric and kind not in ALSO.get(metric, {})
    ]
    return {
        "clips": len({row["number"] for row in rows}),
        "videos": len(rows),
        "failing_clips": {kind: len(scores[kind][metric]) for kind, (_, metric) in FAILURES.items()},
        "own": own,
        "unstated": unstated,
        "passed": all(value >= PASS for value in own.values()) and not unstated,
        "areas": areas,
        "alarms": alarms,
    }


def measure_sensitivity(clips: int, output: Path, quiet: bool = False) -> dict[str, Any]:
    """Render, inject and judge; clips that are measured already are in a file beside the output and are kept."""
    output.parent.mkdir(parents=True, exist_ok=True)
    kept = output.with_suffix(".rows.jsonl")
    rows = [json.loads(line) for line in kept.read_text().splitlines()] if kept.is_file() else []
    done = {row["number"] for row in rows}
    cv2.setNumThreads(1)  # pictures are small
    with kept.open("a") as file:
        for number in tqdm(range(clips), disable=quiet, file=sys.stderr):
            if number in done:
                continue
            new = rows_of(number)
            file.write("".join(json.dumps(row) + "\n" for row in new))
            file.flush()
            rows += new
    result = {
        "command": f"streamvid eval sensitivity --clips {clips} -o {output}",
        "about": f"{FRAMES} frames of {SIZE} x {SIZE} px at {FRAMES_PER_SECOND} per second, a switch at frame {SWITCH}",
        **judge([row for row in rows if row["number"] < clips]),
    }
    write_text(output, to_json(result))
    kept.unlink()
    return result


def table(result: dict[str, Any], what: str = "areas") -> str:
    """`areas` or `alarms` as Markdown: a row per metric, a column per failure, its own in bold."""
    own = {metric: kind for kind, (_, metric) in FAILURES.items()}
    lines = ["| metric | " + " | ".join(FAILURES) + " |", "|---" * (len(FAILURES) + 1) + "|"]
    for metric, row in result[what].items():
        texts = {kind: f"{row[kind]:.2f}" if kind in row else "-" for kind in FAILURES}
        cells = [f"**{text}**" if own[metric] == kind else text for kind, text in texts.items()]
        lines.append(f"| {metric} | {' | '.join(cells)} |")
    return "\n".join(lines)


def reactions(result: dict[str, Any]) -> str:
    """Which metrics react to what other failures too, as a Markdown list."""
    lines = []
    for metric, why in ALSO.items():
        areas = result["areas"][metric]
        told = [f"{k} ({areas[k]:.2f}): {reason}" for k, reason in why.items() if areas.get(k, 0) >= REACTS]
        if told:
            lines.append(f"- `{metric}` reacts to {'; '.join(told)}.")
    return "\n".join(lines)
