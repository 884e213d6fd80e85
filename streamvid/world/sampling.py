"""Random clips of the world: which scenes, which scenery, where they change."""

from __future__ import annotations

import numpy as np

from streamvid.world.scene import Scene, Scenery, change_scene, sample_scene, sample_scenery

# A stream's block b > 0 of three latent frames starts at pixel frame 12 b - 3.
BLOCK_FRAMES = 12
# Of the attributes, motion is the last to be right after a switch: training sees it change more often than the others.
CHANGED = {"motion": 3.0}


def block_start(block: int) -> int:
    """First pixel frame of a block of three latent frames."""
    return max(0, BLOCK_FRAMES * block - 3)


def sample_clip(
    rng: np.random.Generator, num_frames: int, held_out: bool = False, switch_probability: float = 0.35
) -> tuple[list[tuple[int, Scene]], Scenery]:
    """Shots `[(start pixel frame, scene), ...]` and scenery of one clip; a change falls on a block border."""
    scenery = sample_scenery(rng)
    scene = sample_scene(rng, held_out=held_out)
    shots = [(0, scene)]
    blocks = (num_frames + 3) // BLOCK_FRAMES
    if blocks > 1 and rng.random() < switch_probability:
        block = int(rng.integers(1, blocks))
        shots.append((block_start(block), change_scene(rng, scene, int(rng.integers(1, 3)), weights=CHANGED)))
    return shots, scenery
