"""Progress of a stream: media time, speed and the prompt that is playing."""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO

from tqdm import tqdm

from streamvid.io.contact_sheet import clock

LONGEST_PROMPT = 40


class ProgressBar:
    """A tqdm bar on a terminal; elsewhere (a log, a pipe) one plain line every few seconds.

    Speeds count from the construction to the last chunk, so that they are what the user has waited.

    Args:
        fps: frames per second of the video.
        total_frames: length of the stream; None for an endless one.
        disable: show nothing.
        file: where to show it; standard error if None.
        seconds_between_lines: for plain lines.
    """

    def __init__(
        self,
        fps: float,
        total_frames: int | None = None,
        *,
        disable: bool = False,
        file: TextIO | None = None,
        seconds_between_lines: float = 5.0,
    ) -> None:
        self.fps = float(fps)
        self.total_frames = total_frames
        self.frames = 0
        self.file = file or sys.stderr
        self.disable = disable
        self.seconds_between_lines = seconds_between_lines
        self._started = time.monotonic()
        self._last_line = self._started
        self._prompt = ""
        self._bar: tqdm | None = None
        if not disable and self.file.isatty():
            form = "{percentage:3.0f}%|{bar}| {desc}" if total_frames else "{desc}"
            self._bar = tqdm(total=total_frames, file=self.file, bar_format=form, dynamic_ncols=True)

    def update(self, frames: int, prompt: str = "") -> None:
        """Note `frames` more frames, made under `prompt`."""
        self.frames += frames
        self._prompt = prompt
        if self._bar is not None:
            self._bar.set_description_str(self.text(), refresh=False)
            self._bar.update(frames)
        elif time.monotonic() - self._last_line >= self.seconds_between_lines:
            self._print_line()

    def text(self) -> str:
        """`0:27/1:00  62.1 fps  3.9x real time  a red ball bounces`."""
        waited = max(time.monotonic() - self._started, 1e-9)
        media_time = clock(int(self.frames / self.fps))
        if self.total_frames:
            media_time += f"/{clock(int(self.total_frames / self.fps))}"
        speed = self.frames / waited
        prompt = " ".join(self._prompt.split())
        if len(prompt) > LONGEST_PROMPT:
            prompt = prompt[: LONGEST_PROMPT - 1].rstrip() + "…"
        return f"{media_time}  {speed:.1f} fps  {speed / self.fps:.1f}x real time  {prompt}".rstrip()

    def close(self) -> None:
        """Show the last state."""
        if self._bar is not None:
            self._bar.refresh()
            self._bar.close()
            self._bar = None
        elif not self.disable and self.frames:
            self._print_line()
        self.disable = True

    def _print_line(self) -> None:
        if not self.disable:
            print(self.text(), file=self.file, flush=True)
            self._last_line = time.monotonic()

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()
