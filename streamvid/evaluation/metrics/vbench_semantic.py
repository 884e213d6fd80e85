"""VBench's nine semantic dimensions: the official checks and samplings around networks of maintained libraries.

Where the official network has no maintained library (GRiT, Tag2Text, UMT, ViCLIP), another network answers the same question
and the fidelity says `related` or `compatible`: such values are good for comparing runs of ours, not for the leaderboard.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from streamvid.evaluation.metrics.vbench_quality import VBenchMetric
from streamvid.evaluation.registry import register
from streamvid.evaluation.sampling import middle_frames, prompt_of_name
from streamvid.evaluation.types import Batch, Clip, Outcome, ok, skip

Box = Sequence[float]  # left, top, right, bottom
COLOURS = [
    "white",
    "red",
    "pink",
    "blue",
    "silver",
    "purple",
    "orange",
    "green",
    "gray",
    "yellow",
    "black",
    "grey",
]
ACTION_THRESHOLD, ACTION_RANK = 0.85, 5


def intersection_over_union(a: Box, b: Box) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    both = width * height
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def position_score(relationship: str, a: Box, b: Box, directed: bool = False) -> float:
    """How far two boxes stand as `relationship` says. The official rule does not tell left from right; `directed` does."""
    across = (b[0] + b[2] - a[0] - a[2]) / 2
    down = (b[1] + b[3] - a[1] - a[3]) / 2
    sideways = relationship in ("on the left of", "on the right of")
    along, other = (across, down) if sideways else (down, across)
    if abs(along) <= abs(other):
        return 0.0
    if directed and (along > 0) != (relationship in ("on the left of", "on the top of")):
        return 0.0
    overlap = intersection_over_union(a, b)
    return 1.0 if overlap < 0.1 else 0.1 / overlap


def spatial_score(
    relationship: str, boxes: dict[str, list[Box]], first: str, second: str, directed: bool = False
) -> float:
    """Best pair of the two classes in one frame; officially a pair of one class counts as well."""
    if directed:
        pairs = [(a, b) for a in boxes.get(first, []) for b in boxes.get(second, [])]
    else:
        found = [box for name in dict.fromkeys((first, second)) for box in boxes.get(name, [])]
        pairs = [(a, b) for i, a in enumerate(found) for b in found[i + 1 :]]
    return max((position_score(relationship, a, b, directed) for a, b in pairs), default=0.0)


def colour_share(frames: Sequence[Sequence[str]], colour: str) -> tuple[int, int]:
    """Of captions of the object per frame: frames that name the colour, frames that name any colour (as substrings)."""
    coloured = [captions for captions in frames if any(c in text for text in captions for c in COLOURS)]
    right = [captions for captions in coloured if any(colour in text for text in captions)]
    return len(right), len(coloured)


def names_scene(caption: str, scene: str) -> bool:
    """Whether a caption contains every word of a scene's name (as substrings)."""
    return all(word in caption.lower() for word in scene.lower().split())


class Sampled(VBenchMetric):
    """Base: looks at `samples` frames, each from the middle of its interval, once the video is over."""

    samples = 16

    def begin(self, clip: Clip) -> str | None:
        self.wanted = middle_frames(self.samples, clip.frames)
        self.chosen: dict[int, np.ndarray] = {}
        self.position = 0
        return super().begin(clip)

    def add(self, batch: Batch) -> None:
        for frame in batch.frames:
            if self.position in self.wanted:
                self.chosen[self.position] = frame.rgb
            self.position += 1

    def sampled(self) -> np.ndarray:
        """uint8 `[samples, H, W, 3]`."""
        return np.stack([self.chosen[index] for index in self.wanted])


class Labelled(Sampled):
    """Base: needs what the suite says about the prompt."""

    def begin(self, clip: Clip) -> str | None:
        reason = super().begin(clip)
        self.label: Any = clip.video.labels.get(self.dimension)
        while isinstance(self.label, dict) and set(self.label) == {self.dimension}:
            self.label = self.label[self.dimension]
        return reason or (None if self.label else "the manifest has no label for its prompt")

    def detect(self, names: Sequence[str]) -> list[dict[str, list[Box]]]:
        """Boxes by name, for each sampled frame."""
        return self.backbones.get("detector")(self.sampled(), list(names))


@register("vbench.object_class", fidelity="related", better="up", needs=("detector",), aggregate="frames")
class ObjectClass(Labelled):
    """Share of 16 frames in which the detector finds the object (official: GRiT; here: OWLv2)."""

    def end(self) -> Outcome:
        name = self.label["object"]
        found = self.detect([name])
        return ok(float(np.mean([bool(boxes.get(name)) for boxes in found])), weight=len(found))


@register("vbench.multiple_objects", fidelity="related", better="up", needs=("detector",), aggregate="frames")
class MultipleObjects(Labelled):
    """Share of 16 frames in which the detector finds both objects (official: GRiT; here: OWLv2)."""

    def end(self) -> Outcome:
        names = self.label["object"].split(" and ")
        found = self.detect(names)
        return ok(float(np.mean([all(boxes.get(n) for n in names) for boxes in found])), weight=len(found))


@register("vbench.human_action", fidelity="compatible", better="up", needs=("action",))
class HumanAction(Sampled):
    """Whether the action named by the prompt is among the five likeliest and likelier than 0.85 (official: UMT)."""

    def end(self) -> Outcome:
        prompt = self.clip.video.prompt or prompt_of_name(self.clip.video.path)
        action = prompt.lower().partition("person is ")[2]
        if not action:
            return skip("the prompt has not the form 'A person is ...'")
        scores = self.backbones.get("action")(self.sampled())
        best = sorted(scores, key=lambda name: -scores[name])[:ACTION_RANK]
        return ok(any(name.lower() == action and scores[name] >= ACTION_THRESHOLD for name in best))


@register("vbench.color", fidelity="related", better="up", needs=("detector",))
class Colour(Labelled):
    """Of the frames in which the object has a colour, the share in which it is the right one (official: GRiT captions)."""

    def end(self) -> Outcome:
        colour = self.label["color"] if isinstance(self.label, dict) else self.label
        thing = self.clip.video.prompt.replace(colour, "", 1).removeprefix("a ").removeprefix("an ").strip()
        named = {f"{name} {thing}": name for name in dict.fromkeys([*COLOURS, colour])}
        captions = [[named[text] for text in boxes if boxes[text]] for boxes in self.detect(list(named))]
        right, coloured = colour_share(captions, colour)
        if not coloured:
            return skip("the object with a colour is found in no frame")
        return ok(right / coloured, details={"right": right, "coloured": coloured})


@register(
    "vbench.spatial_relationship", fidelity="related", better="up", needs=("detector",), aggregate="frames"
)
class SpatialRelationship(Labelled):
    """Mean over 16 frames of how well two objects stand as named (official rule; `directed` tells left from right)."""

    def __init__(self, backbones, directed: bool = False):
        super().__init__(backbones)
        self.directed = directed

    def end(self) -> Outcome:
        first, second = self.label["object_a"], self.label["object_b"]
        found = self.detect([first, second])
        scores = [
            spatial_score(self.label["relationship"], boxes, first, second, self.directed) for boxes in found
        ]
        return ok(float(np.mean(scores)), weight=len(scores))


@register("vbench.scene", fidelity="related", better="up", needs=("captioner",), aggregate="frames")
class Scene(Labelled):
    """Share of 16 frames whose caption has every word of the scene's name (official: Tag2Text; here: BLIP)."""

    def end(self) -> Outcome:
        captions = self.backbones.get("captioner")(self.sampled())
        name = self.label["scene"] if isinstance(self.label, dict) else self.label
        right = [names_scene(caption, name) for caption in captions]
        return ok(float(np.mean(right)), weight=len(right), details={"captions": list(captions)})


@register(
    "vbench.appearance_style", fidelity="equivalent", better="up", needs=("clip_b",), aggregate="frames"
)
class AppearanceStyle(Labelled):
    """CLIP ViT-B/32 similarity of every frame to the style's name (without the official last-frame bug, PR 207)."""

    def begin(self, clip: Clip) -> str | None:
        self.scores: list[float] = []
        return super().begin(clip)

    def add(self, batch: Batch) -> None:
        if not self.scores:
            encoder = self.backbones.get("clip_b")
            style = self.label["appearance_style"] if isinstance(self.label, dict) else self.label
            self.text = torch.nn.functional.normalize(encoder.text([style])[0], dim=-1)
        rows = torch.from_numpy(batch.embedding(self.backbones.get("clip_b"))).float()
        self.scores += (torch.nn.functional.normalize(rows, dim=-1) @ self.text).tolist()

    def end(self) -> Outcome:
        return ok(float(np.mean(self.scores)), weight=len(self.scores), series={"per_frame": self.scores})


class VideoText(Sampled):
    """Cosine similarity of a video's and its prompt's features, from 8 frames."""

    samples = 8

    def begin(self, clip: Clip) -> str | None:
        return super().begin(clip) or (None if clip.video.prompt else "it has no prompt")

    def end(self) -> Outcome:
        similarity, cut = self.backbones.get("video_text")(self.sampled(), self.clip.video.prompt)
        return ok(similarity, details={"prompt_cut": cut})


@register("vbench.temporal_style", fidelity="related", better="up", needs=("video_text",))
class TemporalStyle(VideoText):
    """Similarity of video and prompt on the prompts about camera and speed (official: ViCLIP; here: X-CLIP)."""


@register("vbench.overall_consistency", fidelity="related", better="up", needs=("video_text",))
class OverallConsistency(VideoText):
    """Similarity of video and prompt (official: ViCLIP; here: X-CLIP)."""
