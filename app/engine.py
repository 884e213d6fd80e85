"""From what a person asks for to a stream of the pipeline, checked before anything is allocated or queued."""

from __future__ import annotations

import json
import math
import os
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from streamvid.app.examples import EXAMPLES
from streamvid.app.limits import Limits

from streamvid.errors import UserError
from streamvid.methods import Method, load_method, method_names
from streamvid.saving import options_of
from streamvid.script import Script
from streamvid.script_fields import TRANSITIONS
from streamvid.switching import switch_policy
from streamvid.timeline import timeline

if TYPE_CHECKING:
    from streamvid.pipelines.pipeline_streamvid import StreamVidPipeline

    from streamvid.stream import VideoStream

MOST_STEPS = 16
MOST_FRAMES_PER_BLOCK = 12


@dataclass(frozen=True)
class StreamRequest:
    """What to stream: a prompt, which never ends, or a script; everything else has a default.

    Attributes:
        steps: number of evenly spaced denoising steps; None takes the method's.
        ahead: seconds that generation may run ahead of play-out; None takes the server's.
        linger: seconds that the stream lives without a connection or a request; None takes the server's.
    """

    prompt: str | None = None
    script: Script | None = None
    method: str | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    steps: int | None = None
    seed: int | None = None
    height: int | None = None
    width: int | None = None
    ahead: float | None = None
    linger: float | None = None

    def __post_init__(self) -> None:
        if (self.prompt is None) == (self.script is None):
            raise UserError("prompt and script: give one of the two")


@dataclass(frozen=True)
class Opening:
    """A checked request: `open()` allocates and starts it; the rest is shown to people."""

    open: Callable[[], VideoStream]
    fps: float
    height: int
    width: int
    seed: int
    method: str
    options: Mapping[str, Any]
    title: str | None = None
    scripted: bool = False
    resumed: bool = False
    ahead: float | None = None
    linger: float | None = None


class PipelineEngine:
    """A pipeline behind the studio.

    Args:
        pipe: whose weights are used.
        model: its name, to be shown.
        limits: of one request.
    """

    def __init__(self, pipe: StreamVidPipeline, model: str, limits: Limits):
        self.pipe, self.model, self.limits = pipe, model, limits

    def prepare(self, request: StreamRequest) -> Opening:
        """Check a request.

        Raises:
            UserError: it cannot be made, or is more than this server allows.
        """
        script = request.script
        if script is None:
            assert request.prompt is not None
            what: Any = [self.check_prompt(request.prompt)]  # a list is never taken for the name of a file
        else:
            for shot in script.shots:
                self.check_prompt(shot.prompt)
            what = script
        overrides = {**(script.overrides if script else {}), **request.overrides}
        if request.steps is not None:
            overrides["denoising_steps"] = even_steps(request.steps)
        name = request.method or (script.method if script else None) or self.pipe.config.method
        method = load_method(name, overrides)
        for shot in script.shots if script else ():
            self._check_method(method.with_overrides(shot.overrides))
        self._check_method(method)
        height, width = self._size(request, script)
        seed = next((s for s in (request.seed, script.seed if script else None) if s is not None), 0)
        fps = (script.fps if script else None) or self.pipe.config.fps
        if script is not None:  # shots that fall on one block are refused now
            timeline(script, fps, method.frames_per_block, self.pipe.temporal_ratio, method.transition)

        def start() -> VideoStream:
            return self.pipe.stream(what, method=method, seed=seed, height=height, width=width, fps=fps)

        return Opening(
            start,
            fps,
            height,
            width,
            seed,
            method.name,
            overrides,
            title=script.title if script else None,
            scripted=script is not None,
            ahead=request.ahead,
            linger=request.linger,
        )

    def load(self, path: Path) -> Opening:
        """A saved stream, to be continued.

        Raises:
            UserError: no stream file, of another model, or larger than this server allows.
        """
        try:
            self._check_saved(path)
            stream = self.pipe.load_stream(path)
        except UserError as error:  # where the server keeps the file is nobody's business
            raise UserError(str(error).replace(f"'{path}'", "that was sent")) from error
        self._check_method(stream.method)
        height, width = (side * self.pipe.spatial_ratio for side in stream.latent_size)
        seeds = getattr(stream.noise, "seeds", [0])
        return Opening(
            lambda: stream,
            stream.fps,
            height,
            width,
            seeds[0],
            stream.method.name,
            changed_options(stream.method),
            scripted=stream.timeline is not None,
            resumed=True,
        )

    def _check_saved(self, path: Path) -> None:
        """Refuse what would be too large before it is allocated; what is damaged `load_stream` tells better."""
        try:
            with safe_open(path, "pt") as file:
                settings = json.loads(file.metadata()["stream"])["dict"]["settings"]["dict"]
            method = settings["method"]["dict"]
            window, block = int(method["window"]), int(method["frames_per_block"])
            rows, columns = (int(side) * self.pipe.spatial_ratio for side in settings["latent_size"]["tuple"])
        except (SafetensorError, OSError, LookupError, ValueError, TypeError, RecursionError):
            return
        if (
            window > self.limits.window
            or block > MOST_FRAMES_PER_BLOCK
            or rows * columns > self.limits.pixels
        ):
            raise UserError(
                f"the saved stream ({rows} x {columns} pixels, window {window}) is larger than this server allows"
            )

    def check_prompt(self, text: str) -> str:
        """The prompt on one line; one that is empty, too long or unreadable is refused."""
        text = " ".join(text.split())
        self.pipe.check_prompts(text)
        strange = next((c for c in text if unicodedata.category(c) in ("Cc", "Cs")), None)
        if strange is not None:
            raise UserError(f"prompt = {text[:30]!r} holds the control character {strange!r}: remove it")
        most = self.limits.prompt_characters
        if len(text) > most:
            raise UserError(
                f"prompt = {text[:30]!r}... has {len(text)} characters: shorten it to {most}, which this server takes"
            )
        return text

    @property
    def at_once(self) -> int:
        """Chunks of different streams that are made at the same time: on a CPU as many as its cores have threads for."""
        if self.pipe.device.type != "cpu":
            return 1
        return max(1, (os.cpu_count() or 1) // torch.get_num_threads())

    def warm_up(self) -> None:
        """Make a chunk, so that the first person does not wait for what a process pays only once."""
        next(self.pipe.stream([EXAMPLES[0]["prompt"]]))

    def describe(self) -> dict[str, Any]:
        """What the page needs to draw its controls."""
        unit = self.pipe.spatial_ratio * self.pipe.transformer.config.patch_size[1]
        config = self.pipe.config
        return {
            "model": self.model,
            "device": str(self.pipe.device),
            "fps": config.fps,
            "height": config.height,
            "width": config.width,
            "size_unit": unit,
            "method": config.method,
            "methods": [_describe_method(name) for name in method_names()],
            "transitions": list(TRANSITIONS),
            "max_window": self.limits.window,
            "max_prompt_characters": self.limits.prompt_characters,
            "ahead_seconds": self.limits.ahead_seconds,
        }

    def _size(self, request: StreamRequest, script: Script | None) -> tuple[int, int]:
        height = request.height or (script.height if script else None) or self.pipe.config.height
        width = request.width or (script.width if script else None) or self.pipe.config.width
        self.pipe.latent_size(height, width)
        if height * width > self.limits.pixels:
            raise UserError(
                f"height x width = {height} x {width} has more than the {self.limits.pixels} pixels allowed here: "
                "choose a smaller size"
            )
        return height, width

    def _check_method(self, method: Method) -> None:
        if method.window > self.limits.window:
            raise UserError(
                f"window = {method.window} is more than the {self.limits.window} latent frames that this server allows"
            )
        if method.frames_per_block > MOST_FRAMES_PER_BLOCK:
            raise UserError(
                f"frames_per_block = {method.frames_per_block} is more than {MOST_FRAMES_PER_BLOCK}: choose fewer"
            )
        levels = method.denoising_steps or ()
        if len(levels) > MOST_STEPS or not all(
            math.isfinite(level) and 0 < level <= 1000 for level in levels
        ):
            raise UserError(
                f"denoising_steps = {list(levels)[:5]} must be at most {MOST_STEPS} levels above 0 and up to 1000"
            )


def leave_a_core() -> None:
    """One core for the encoder, the server and the browser, where the model computes on the others.

    The threads of a computation wait for the slowest of them: were there one for every core, all would stand still as often
    as anything else runs.
    """
    torch.set_num_threads(max(1, min(torch.get_num_threads(), (os.cpu_count() or 1) - 1)))


def even_steps(count: int) -> list[float]:
    """So many levels from 1000 down, evenly spaced."""
    return [1000.0 * (count - index) / count for index in range(count)]


def changed_options(method: Method) -> dict[str, Any]:
    """In what a method differs from the preset of its name."""
    if method.name not in method_names():
        return {}
    preset = options_of(load_method(method.name))
    return {name: value for name, value in options_of(method).items() if value != preset[name]}


def check_policy(policy: str | None) -> None:
    """Refuse a switch policy that does not exist."""
    if policy is not None:
        switch_policy(policy)


def _describe_method(name: str) -> dict[str, Any]:
    method = load_method(name)
    return {
        "name": name,
        "source": method.source,
        "window": method.window,
        "sink": method.sink,
        "frames_per_block": method.frames_per_block,
        "transition": method.transition,
        "sampler": method.sampler,
    }
