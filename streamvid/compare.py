"""`streamvid compare`: several methods on one script, with the same model, seed and noise, side by side.

The streams run in step, so that everything is on disk as far as it is made: one video per method, all of them beside each
other, and at the end the numbers as JSON and one HTML page that needs no network (streamvid.compare_page).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from streamvid.compare_page import page
from streamvid.errors import UserError
from streamvid.evaluation.curves import Curves
from streamvid.io import ProgressBar, open_writer
from streamvid.io.contact_sheet import shortened
from streamvid.io.files import prepare_output_folder, replace_atomically
from streamvid.io.manifest import environment
from streamvid.methods import load_method
from streamvid.models import DEFAULT_MODEL, load_pipeline, load_probe
from streamvid.script import Script
from streamvid.stream import VideoStream
from streamvid.timeline import format_timeline

MOST_METHODS = 8
COLUMNS = 4  # of the side-by-side video
BAND = 20  # px above each picture, with the method's name


@dataclass
class Contestant:
    """One method at work.

    Attributes:
        made: frames written so far; waiting: those of them that the side-by-side video has not taken yet.
        seconds: per chunk, without decoding (denoise + context pass + switch) and in all.
    """

    name: str
    stream: VideoStream
    writer: Any
    curves: Curves
    made: int = 0
    waiting: list[np.ndarray] = field(default_factory=list)
    denoising: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    bytes: int = 0

    def advance(self) -> bool:
        """Make one more chunk; False at the end."""
        chunk = next(self.stream, None)
        if chunk is None:
            return False
        self.writer.write(chunk.frames)
        self.curves.add(chunk.frames, chunk.prompt)
        self.made += len(chunk.frames)
        self.waiting.append(chunk.frames)
        self.seconds.append(chunk.timings["total"])
        self.denoising.append(chunk.timings["total"] - chunk.timings["decode"])
        self.bytes = self.stream.cache.bytes
        return True

    def result(self) -> dict[str, Any]:
        """Numbers of the whole run. The first chunk warms up and counts in no time, as long as there are others."""
        seconds = self.seconds[1:] or self.seconds
        frames = self.made if len(self.seconds) < 2 else self.made * len(seconds) / len(self.seconds)
        assert self.stream.timeline is not None
        return {
            "method": self.name,
            "options": asdict(self.stream.method),
            "frames": self.made,
            "fps": round(frames / sum(seconds), 2),
            "denoising_fps": round(frames / sum(self.denoising[-len(seconds) :]), 2),
            "chunk_p50": round(float(np.quantile(seconds, 0.5)), 4),
            "chunk_p95": round(float(np.quantile(seconds, 0.95)), 4),
            "kv_bytes": self.bytes,
            "timeline": [asdict(shot) for shot in self.stream.timeline.shots],
            **self.curves.result(),
        }


def compare(
    script: Script,
    methods: Sequence[str],
    output: str | Path,
    *,
    model: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    seed: int | None = None,
    height: int | None = None,
    width: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    quiet: bool = False,
) -> Path:
    """Run `methods` on a script and write everything under the folder `output`.

    Args:
        methods: names of presets, each at most once; overrides count for all of them.
        The other arguments are those of `streamvid.generate.generate`.

    Returns:
        The path of the HTML page, beside `compare.json`, `side_by_side.mp4` and one video per method.

    Raises:
        UserError: an unknown method, one named twice, or too many; and what `generate` refuses.
    """
    for name in methods:
        load_method(name, {**script.overrides, **(overrides or {})})
        if methods.count(name) > 1:
            raise UserError(f"methods = {','.join(methods)} names {name} twice: name each once")
    if not 2 <= len(methods) <= MOST_METHODS:
        raise UserError(
            f"methods = {','.join(methods)} has {len(methods)} names: give 2 to {MOST_METHODS}, e.g. longlive,deep_sink"
        )
    folder = prepare_output_folder(output)
    model = model or script.model or DEFAULT_MODEL
    pipe = load_pipeline(model, device, dtype)
    probe = load_probe(model)
    seed = next((value for value in (seed, script.seed) if value is not None), 0)
    with ExitStack() as stack:
        contestants = []
        for name in methods:
            stream = pipe.stream(
                script, method=name, overrides=overrides, seed=seed, height=height, width=width
            )
            writer = stack.enter_context(open_writer(folder / f"{name}.mp4", stream.fps))
            contestants.append(Contestant(name, stream, writer, Curves(stream.fps, probe)))
        first = contestants[0].stream
        assert first.timeline is not None
        if not quiet:
            print(format_timeline(first.timeline))
        together = stack.enter_context(open_writer(folder / "side_by_side.mp4", first.fps))
        total = sum(c.stream.timeline.frames for c in contestants if c.stream.timeline is not None)
        bar = stack.enter_context(ProgressBar(first.fps, total, disable=quiet))
        running = list(contestants)
        while running:
            behind = min(running, key=lambda contestant: contestant.made)
            before = behind.made
            if behind.advance():
                bar.update(behind.made - before, behind.name)
                _show_beside(contestants, together)
            else:
                running.remove(behind)
    result = {
        "model": model,
        "seed": seed,
        "title": script.title,
        "fps": first.fps,
        "machine": environment(str(pipe.device)),
        "warm_up": "the first chunk of each method is in no time",
        "methods": [contestant.result() for contestant in contestants],
    }
    with replace_atomically(folder / "compare.json") as path:
        path.write_text(json.dumps(result, indent=1))
    with replace_atomically(folder / "compare.html") as path:
        path.write_text(page(result, (folder / "side_by_side.mp4").read_bytes()))
    return folder / "compare.html"


def _show_beside(contestants: Sequence[Contestant], writer: Any) -> None:
    """Write what all contestants have made."""
    ready = min(sum(map(len, contestant.waiting)) for contestant in contestants)
    if ready == 0:
        return
    columns = []
    for contestant in contestants:
        frames = np.concatenate(contestant.waiting)
        contestant.waiting = [frames[ready:]] if len(frames) > ready else []
        columns.append(labelled(frames[:ready], contestant.name))
    writer.write(grid(columns))


def labelled(frames: np.ndarray, name: str) -> np.ndarray:
    """Frames `[T, H, W, 3]` with a band of `BAND` px above them that says whose they are."""
    band = Image.new("RGB", (frames.shape[2], BAND), (18, 18, 22))
    font = ImageFont.load_default(size=12)
    ImageDraw.Draw(band).text((4, 3), shortened(name, font, frames.shape[2] - 8), (236, 236, 240), font)
    label = np.asarray(band)
    return np.concatenate([np.broadcast_to(label, (len(frames), *label.shape)), frames], 1)


def grid(videos: Sequence[np.ndarray]) -> np.ndarray:
    """Equal videos `[T, H, W, 3]` in rows of at most `COLUMNS`; the last row is filled with black."""
    columns = min(COLUMNS, len(videos))
    blank = [np.zeros_like(videos[0])] * (-len(videos) % columns)
    rows = [[*videos, *blank][start : start + columns] for start in range(0, len(videos), columns)]
    return np.concatenate([np.concatenate(row, 2) for row in rows], 1)
