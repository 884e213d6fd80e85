"""Curves over a video as it streams: one value per window of two seconds, no weights needed but the embedded probe's.

    curves = Curves(fps=16, probe=probe)
    for chunk in stream:
        curves.add(chunk.frames, chunk.prompt)
    curves.result()["drift"]        # [0.0, 1.3, ...]

| curve | of a window |
|---|---|
| drift | distance of its look (colours and their spread, sharpness) from the first window of its prompt, in grey levels |
| motion | mean absolute difference of neighbouring frames, in grey levels |
| adherence | share of the attributes named by the prompt that the probe of the embedded world finds right |
"""

from __future__ import annotations

from typing import Any

import numpy as np

from streamvid.evaluation.appearance import look
from streamvid.world.probe import WINDOW_FRAMES, AttributeProbe
from streamvid.world.prompts import parse
from streamvid.world.scene import ATTRIBUTES

SECONDS = 2.0


class Curves:
    """Collects frames into windows and measures each once; memory holds one window.

    Args:
        fps: of the video.
        probe: of the embedded world, or None: then there is no adherence. It looks at the window's last frames.

    Drift and adherence belong to a prompt: windows in which it changes count as None.
    """

    def __init__(self, fps: float, probe: AttributeProbe | None = None):
        self.fps, self.probe = float(fps), probe
        self.window = max(round(SECONDS * self.fps), 2)  # frames
        self.drift: list[float | None] = []
        self.motion: list[float] = []
        self.adherence: list[float | None] = []
        self._frames: list[np.ndarray] = []
        self._prompts: list[str] = []
        self._first: tuple[str, np.ndarray] | None = None

    def add(self, frames: np.ndarray, prompt: str) -> None:
        """Look at the next frames `[T, H, W, 3]`, uint8, made under `prompt`."""
        for frame in frames:
            self._frames.append(frame)
            self._prompts.append(prompt)
            if len(self._frames) == self.window:
                prompts = set(self._prompts)
                self._measure(np.stack(self._frames), prompts.pop() if len(prompts) == 1 else None)
                self._frames, self._prompts = [], []

    def _measure(self, frames: np.ndarray, prompt: str | None) -> None:
        steps = np.abs(np.diff(frames.astype(np.int16), axis=0))
        self.motion.append(round(float(steps.mean()), 3))
        self.drift.append(None if prompt is None else self._drift(frames, prompt))
        self.adherence.append(None if prompt is None else self._adherence(frames, prompt))

    def _drift(self, frames: np.ndarray, prompt: str) -> float:
        seen = look(frames)
        if self._first is None or self._first[0] != prompt:
            self._first = prompt, seen
        return round(float(np.linalg.norm(seen - self._first[1])), 3)

    def _adherence(self, frames: np.ndarray, prompt: str) -> float | None:
        named = parse(prompt)
        fits = len(frames) >= WINDOW_FRAMES and frames.shape[1:] == (128, 128, 3)
        if self.probe is None or not fits or not named:
            return None
        found = self.probe.classify(frames[None, -WINDOW_FRAMES:])
        right = [ATTRIBUTES[name][int(found[name])] == value for name, value in named.items()]
        return round(sum(right) / len(right), 4)

    def result(self) -> dict[str, Any]:
        """The curves and their summaries; an unfinished last window is left out."""
        told = [value for value in self.adherence if value is not None]
        drifts = [value for value in self.drift if value is not None]
        return {
            "drift": self.drift,
            "motion": self.motion,
            "adherence": self.adherence,
            "last_drift": drifts[-1] if drifts else None,
            "mean_motion": round(float(np.mean(self.motion)), 3) if self.motion else None,
            "mean_adherence": round(float(np.mean(told)), 4) if told else None,
        }
