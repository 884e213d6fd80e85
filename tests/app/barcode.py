"""A fake engine whose frames tell their number, stream and prompt, so that a browser's pixels can be checked exactly.

A frame of 128 x 128 shows 16 bars of 8 x 32 pixels, white for 1: four bits of the stream's seed, twelve of the frame number.
Below, the colour says the prompt.
"""

import json
import time
import weakref
from copy import copy
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
from streamvid.app.engine import Opening
from streamvid.app.limits import Limits

from streamvid.control import DROPPED, REPLACED, Receipt
from streamvid.errors import UserError

SIZE, FPS, FRAMES, STEPS = 128, 16, 12, 4
COLOURS = {"red": (200, 30, 30), "green": (30, 170, 40), "blue": (40, 60, 210), "grey": (128, 128, 128)}
BITS_READER = """
() => {
  const picture = document.querySelector(".sv-view video, .sv-view canvas");
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = 128;
  const context = canvas.getContext("2d");
  context.drawImage(picture, 0, 0, 128, 128);
  const data = context.getImageData(0, 0, 128, 128).data;
  const at = (x, y) => [...data.slice(4 * (128 * y + x), 4 * (128 * y + x) + 3)];
  let bits = 0;
  for (let i = 0; i < 16; i++) bits = bits * 2 + (at(8 * i + 4, 16)[1] > 128 ? 1 : 0);
  const [r, g, b] = at(64, 90);
  const colour = r > g + 60 && r > b + 60 ? "red" : g > r + 60 ? "green" : b > r + 60 ? "blue" : "grey";
  return { seed: bits >> 12, frame: bits & 4095, colour };
}
"""


def draw(seed: int, number: int, prompt: str) -> np.ndarray:
    frame = np.empty((SIZE, SIZE, 3), np.uint8)
    frame[:] = COLOURS.get(prompt, COLOURS["grey"])
    for i, bit in enumerate(f"{seed % 16:04b}{number % 4096:012b}"):
        frame[:32, 8 * i : 8 * i + 8] = 255 * int(bit)
    return frame


@dataclass
class FakeStream:
    """What `LiveStream` asks of a `VideoStream`."""

    prompt_now: str
    seed: int
    work: float  # seconds per chunk
    block: int = 0
    frame: int = 0
    pending: tuple | None = None
    closed: bool = False
    ballast: bytes = field(default=b"", repr=False)
    blocks: int | None = None
    alive: weakref.WeakSet = field(default_factory=weakref.WeakSet, repr=False)
    sampler: SimpleNamespace = field(
        default_factory=lambda: SimpleNamespace(on_step_end=lambda timestep, latents: latents)
    )
    timeline = None

    def prompt(self, text, policy=None):
        if self.pending:
            self.pending[1].give_up(REPLACED)
        receipt = Receipt((text,), policy)
        self.pending = text, receipt
        return receipt

    def __next__(self):
        if self.closed or (self.blocks is not None and self.block >= self.blocks):
            raise StopIteration
        for _ in range(STEPS):
            time.sleep(self.work / STEPS)
            self.sampler.on_step_end(None, None)
        events = ()
        pending, self.pending = self.pending, None
        if pending is not None:
            self.prompt_now = pending[0]
            events = (f"switch:{pending[1].policy or 'recache'}",)
        frames = np.stack([draw(self.seed, self.frame + i, self.prompt_now) for i in range(FRAMES)])
        chunk = SimpleNamespace(
            index=self.block,
            frames=frames,
            prompt=self.prompt_now,
            timings={"denoise": self.work, "total": self.work},
            events=events,
            attended=tuple(range(3 * self.block, 3 * self.block + 3)),
        )
        self.block += 1
        self.frame += FRAMES
        if pending is not None:
            pending[1].apply(chunk.index, chunk.index * FRAMES / FPS)
        return chunk

    def state(self):
        return SimpleNamespace(kv_bytes=len(self.ballast))

    def fork(self):
        twin = copy(self)
        twin.pending, twin.sampler = None, copy(self.sampler)
        twin.alive.add(twin)
        return twin

    def reset(self, seed=None):
        self.block = self.frame = 0
        self.seed = self.seed if seed is None else seed

    def save(self, path, mode="exact"):
        if mode not in ("exact", "compact"):
            raise UserError(f"mode = {mode!r}")
        path.write_text(json.dumps([self.prompt_now, self.seed, self.block, self.frame]))

    def close(self):
        self.closed = True
        if self.pending:
            self.pending[1].give_up(DROPPED)


class FakeEngine:
    """What `Studio` asks of a `PipelineEngine`.

    Args:
        speed: times real time that it makes chunks at.
        ballast: bytes that each of its streams holds.
        at_once: chunks that it makes at the same time.
    """

    def __init__(self, speed: float = 4.0, limits: Limits | None = None, ballast: int = 0, at_once: int = 1):
        self.at_once = at_once
        self.work, self.limits, self.ballast = FRAMES / FPS / speed, limits or Limits(), ballast
        self.alive: weakref.WeakSet = weakref.WeakSet()

    def check_prompt(self, text):
        text = " ".join(text.split())
        if not text:
            raise UserError("prompt = '' is empty: say what the video shall show")
        if len(text) > self.limits.prompt_characters:
            raise UserError(
                f"prompt has {len(text)} characters: shorten it to {self.limits.prompt_characters}"
            )
        return text

    def prepare(self, request):
        if request.script is not None:
            prompt, blocks = request.script.shots[0].prompt, round(request.script.duration * FPS / FRAMES)
        else:
            prompt, blocks = self.check_prompt(request.prompt or ""), None
        seeds = (request.seed, request.script and request.script.seed, 0)
        seed = next(seed for seed in seeds if seed is not None)
        return self._opening(
            lambda: self._track(FakeStream(prompt, seed, self.work, blocks=blocks)), seed, request
        )

    def load(self, path):
        try:
            prompt, seed, block, frame = json.loads(path.read_text())
        except (ValueError, TypeError) as error:
            raise UserError("the file is not a saved stream") from error
        return self._opening(
            lambda: self._track(FakeStream(prompt, seed, self.work, block, frame)), seed, None
        )

    def describe(self):
        method = {
            "name": "longlive",
            "source": "",
            "window": 12,
            "sink": 3,
            "frames_per_block": 3,
            "transition": "recache",
            "sampler": "few_step",
        }
        return {
            "model": "barcode",
            "device": "none",
            "fps": FPS,
            "height": SIZE,
            "width": SIZE,
            "size_unit": 16,
            "method": "longlive",
            "methods": [method, {**method, "name": "self_forcing", "sink": 0}],
            "transitions": ["cross_only", "recache", "cut"],
            "max_window": self.limits.window,
            "max_prompt_characters": self.limits.prompt_characters,
            "ahead_seconds": self.limits.ahead_seconds,
        }

    def _track(self, stream):
        stream.ballast = b"x" * self.ballast  # not zeros, which take no memory
        stream.alive = self.alive
        self.alive.add(stream)
        return stream

    def _opening(self, start, seed, request):
        return Opening(  # a request, or none for a saved stream
            start,
            FPS,
            SIZE,
            SIZE,
            seed,
            "longlive",
            {},
            ahead=request.ahead if request else None,
            linger=request.linger if request else None,
            scripted=bool(request and request.script),
            resumed=request is None,
        )


FakeStream.__hash__ = object.__hash__
