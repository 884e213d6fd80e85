"""One picture of a whole video: a frame every two seconds, with its time and prompt."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from streamvid.io.files import output_error, prepare_output_file, replace_atomically

BACKGROUND = (18, 18, 22)
TIME_COLOUR = (250, 204, 92)
PROMPT_COLOUR = (236, 236, 240)
SAME_PROMPT_COLOUR = (124, 124, 134)
MARGIN, GAP, FONT_SIZE, LINE_HEIGHT = 16, 12, 15, 19
MOST_COLUMNS = 6
TALLEST_CAPTION = 5  # lines of prompt


@dataclass
class Thumbnail:
    picture: Image.Image
    seconds: float
    prompt: str


class ContactSheet:
    """Collects thumbnails as a stream runs and saves them as a grid.

    Memory is bounded: past `most_thumbnails`, every other one is dropped and the step is doubled, so an
    endless stream gives an evenly spaced sheet too.

    Args:
        fps: frames per second of the stream.
        seconds_per_frame: media time between thumbnails; the first is the first frame.
        thumbnail_width: of each picture, in pixels.
    """

    def __init__(
        self,
        fps: float,
        seconds_per_frame: float = 2.0,
        thumbnail_width: int = 256,
        most_thumbnails: int = 240,
    ) -> None:
        self.fps = float(fps)
        self.step = max(1, round(seconds_per_frame * self.fps))  # frames
        self.thumbnail_width = thumbnail_width
        self.most_thumbnails = most_thumbnails
        self.thumbnails: list[Thumbnail] = []
        self._frames_seen = 0

    def add(self, frames: np.ndarray, prompt: str) -> None:
        """Look at the next `frames`, uint8 (frames, height, width, 3), made under `prompt`."""
        first = -self._frames_seen % self.step
        for index in range(first, len(frames), self.step):
            position = self._frames_seen + index
            if position % self.step:  # the step was doubled inside this chunk
                continue
            picture = self._thumbnail(frames[index])
            self.thumbnails.append(Thumbnail(picture, position / self.fps, prompt))
            if len(self.thumbnails) > self.most_thumbnails:
                self.thumbnails = self.thumbnails[::2]
                self.step *= 2
        self._frames_seen += len(frames)

    def save(self, path: str | Path) -> None:
        """Write the sheet as a PNG file, atomically; does nothing where no frame was seen."""
        if not self.thumbnails:
            return
        path = prepare_output_file(path)
        try:
            with replace_atomically(path) as temporary:
                self.draw().save(temporary, format="PNG")
        except OSError as error:
            raise output_error(error, path) from error

    def draw(self) -> Image.Image:
        """The sheet: rows of thumbnails, each over its time and prompt."""
        font = ImageFont.load_default(FONT_SIZE)
        cell_width, picture_height = self.thumbnails[0].picture.size
        columns = self._columns(cell_width, picture_height)
        rows = math.ceil(len(self.thumbnails) / columns)
        captions = [wrapped(thumbnail.prompt, font, cell_width) for thumbnail in self.thumbnails]
        row_heights = [
            picture_height + (1 + max(map(len, captions[row * columns : (row + 1) * columns]))) * LINE_HEIGHT
            for row in range(rows)
        ]
        sheet = Image.new(
            "RGB",
            (
                2 * MARGIN + columns * (cell_width + GAP) - GAP,
                2 * MARGIN + sum(row_heights) + (rows - 1) * GAP,
            ),
            BACKGROUND,
        )
        canvas = ImageDraw.Draw(sheet)
        previous = None
        for number, (thumbnail, lines) in enumerate(zip(self.thumbnails, captions, strict=True)):
            row, column = divmod(number, columns)
            left = MARGIN + column * (cell_width + GAP)
            top = MARGIN + sum(row_heights[:row]) + row * GAP
            sheet.paste(thumbnail.picture, (left, top))
            top += picture_height + 3
            canvas.text((left, top), clock(thumbnail.seconds), font=font, fill=TIME_COLOUR)
            colour = SAME_PROMPT_COLOUR if thumbnail.prompt == previous else PROMPT_COLOUR
            for line_number, line in enumerate(lines, start=1):
                canvas.text((left, top + line_number * LINE_HEIGHT), line, font=font, fill=colour)
            previous = thumbnail.prompt
        return sheet

    def _columns(self, width: int, height: int) -> int:
        """A sheet of about 16:9, no wider than `MOST_COLUMNS`, so that captions stay legible on a page."""
        count = len(self.thumbnails)
        cell_height = height + 4 * LINE_HEIGHT + GAP
        widest = max(1, round(math.sqrt(count * cell_height / (width + GAP) * 16 / 9)))
        rows = math.ceil(count / min(widest, MOST_COLUMNS))
        return math.ceil(count / rows)

    def _thumbnail(self, frame: np.ndarray) -> Image.Image:
        """`frame`, uint8 (height, width, 3), at the width of the sheet's columns."""
        picture = Image.fromarray(frame)
        height = max(1, round(picture.height * self.thumbnail_width / picture.width))
        return picture.resize((self.thumbnail_width, height), Image.Resampling.LANCZOS)


def clock(seconds: float) -> str:
    """Media time as `m:ss`, `h:mm:ss` from an hour on, with tenths where they are not zero."""
    tenths = round(seconds * 10)
    minutes, rest = divmod(tenths // 10, 60)
    hours, minutes = divmod(minutes, 60)
    text = f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
    return text + (f".{tenths % 10}" if tenths % 10 else "")


def wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """`text` in lines of at most `width` pixels, at most `TALLEST_CAPTION` of them."""
    words = text.split()
    lines: list[str] = []
    while words and len(lines) < TALLEST_CAPTION - 1:
        count = 1
        while count < len(words) and font.getlength(" ".join(words[: count + 1])) <= width:
            count += 1
        lines.append(shortened(" ".join(words[:count]), font, width))
        words = words[count:]
    if words:
        lines.append(shortened(" ".join(words), font, width))
    return lines


def shortened(line: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """`line`, cut with an ellipsis where it is wider than `width` pixels."""
    line = line[:width]  # no letter is narrower than a pixel
    if font.getlength(line) <= width:
        return line
    too_long = bisect_right(
        range(len(line)), width, key=lambda length: math.ceil(font.getlength(line[:length] + "…"))
    )
    return line[: max(0, too_long - 1)].rstrip() + "…"
