"""What a diorama shows: the attributes a prompt names, and the scenery that no prompt names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "shape": ("ball", "cube", "cone", "star", "heart", "ring"),
    "colour": ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white"),
    "size": ("small", "large"),
    "motion": ("stands still", "rolls left", "rolls right", "bounces", "floats", "circles"),
    "ground": ("meadow", "sand", "ice", "rock"),
    "sky": ("day", "sunset", "night", "dawn"),
    "weather": ("clear", "rain", "snow"),
}


@dataclass(frozen=True)
class Scene:
    """One value per attribute: all that a prompt can say about a shot."""

    shape: str
    colour: str
    size: str
    motion: str
    ground: str
    sky: str
    weather: str

    def __post_init__(self) -> None:
        for name, values in ATTRIBUTES.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(values)}")

    def labels(self) -> tuple[int, ...]:
        """Class index of every attribute, in the order of ATTRIBUTES."""
        return tuple(values.index(getattr(self, name)) for name, values in ATTRIBUTES.items())

    @classmethod
    def from_labels(cls, labels: Sequence[int]) -> Scene:
        """The scene whose labels() are these."""
        if len(labels) != len(ATTRIBUTES):
            raise ValueError(f"a scene has {len(ATTRIBUTES)} labels, not {len(labels)}")
        return cls(*(values[int(label)] for values, label in zip(ATTRIBUTES.values(), labels, strict=True)))


# The places that scenery takes: few, and whole tokens of the embedded model (32 px) apart, so that it has to learn each
# picture once and not at every shift. A bounce lasts one block: all blocks of a shot begin on the ground, or all at its top.
SCENERY: dict[str, tuple[float, ...]] = {
    "subject_x": (0.1, 0.9),
    "hills": (0.0, 0.375),
    "ground_phase": (0.0,),
    "sun_x": (0.0, 1 / 3, 2 / 3),
    "clouds": (0.0, 0.375),
    "phase": (0.0, 0.5),
}


@dataclass(frozen=True)
class Scenery:
    """The variables that no prompt names, each in [0, 1); worlds use the values of SCENERY, the renderer takes any."""

    subject_x: float  # where the subject stands: 0 is 44 px from the left, 1 is 84 px (of 128)
    hills: float  # which stretch of the endless hills is seen (wraps around)
    ground_phase: float  # where the marks on the ground lie, as a share of their period (wraps around)
    sun_x: float  # where sun or moon stands, from left to right
    clouds: float  # where the clouds are (wraps around)
    phase: float  # how far into its motion the subject is at frame 0, in blocks of 12 frames

    def __post_init__(self) -> None:
        for name in SCENERY:
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be in [0, 1)")

    def cells(self) -> tuple[int, ...]:
        """Index of every variable's value in SCENERY, in its order."""
        return tuple(values.index(getattr(self, name)) for name, values in SCENERY.items())

    @classmethod
    def from_cells(cls, cells: Sequence[int]) -> Scenery:
        """The scenery whose cells() are these."""
        return cls(*(values[int(cell)] for values, cell in zip(SCENERY.values(), cells, strict=True)))


def is_held_out(scene: Scene) -> bool:
    """Whether the scene is kept out of training.

    True for 6 of the 48 pairs of shape and colour: red ball, white cube, pink cone, purple star, blue heart
    and green ring. Each shape and each of these colours is seen in training, the pair never is.
    """
    shape = ATTRIBUTES["shape"].index(scene.shape)
    colour = ATTRIBUTES["colour"].index(scene.colour)
    return (shape + colour) % len(ATTRIBUTES["colour"]) == 0


def sample_scene(rng: np.random.Generator, held_out: bool | None = False) -> Scene:
    """A uniformly drawn scene: never held out, only held out (True), or either (None)."""
    while True:
        scene = Scene.from_labels([int(rng.integers(len(values))) for values in ATTRIBUTES.values()])
        if held_out is None or is_held_out(scene) == held_out:
            return scene


def sample_scenery(rng: np.random.Generator) -> Scenery:
    """Uniformly drawn scenery."""
    return Scenery.from_cells([int(rng.integers(len(values))) for values in SCENERY.values()])


def change_scene(
    rng: np.random.Generator,
    scene: Scene,
    how_many: int = 1,
    held_out: bool | None = False,
    weights: Mapping[str, float] | None = None,
) -> Scene:
    """The scene with exactly `how_many` attributes changed; `held_out` as in sample_scene. An attribute is drawn as often as
    its weight says, 1 where there is none.

    Raises ValueError if that is impossible, which needs a held-out start and no room to leave it: one change
    always finds a way out by another colour or shape.
    """
    if not 1 <= how_many <= len(ATTRIBUTES):
        raise ValueError(f"how_many is {how_many}; it must be 1 to {len(ATTRIBUTES)}")
    chances = None if weights is None else np.array([weights.get(name, 1.0) for name in ATTRIBUTES])
    if chances is not None:
        chances /= chances.sum()
    for _ in range(10_000):
        changes = {}
        for index in rng.choice(len(ATTRIBUTES), size=how_many, replace=False, p=chances):
            name = tuple(ATTRIBUTES)[int(index)]
            others = [value for value in ATTRIBUTES[name] if value != getattr(scene, name)]
            changes[name] = others[int(rng.integers(len(others)))]
        changed = replace(scene, **changes)
        if held_out is None or is_held_out(changed) == held_out:
            return changed
    raise ValueError(f"found no {how_many} changes of {scene} with held_out={held_out}")
