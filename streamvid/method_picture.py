"""What a method attends, as a picture: a row per forward, a column per latent frame of the stream.

The number in a cell is the position at which the frame is seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from streamvid.errors import UserError
from streamvid.io.contact_sheet import BACKGROUND, shortened
from streamvid.io.files import output_error, prepare_output_file, replace_atomically
from streamvid.method_tables import Forward, label, runs
from streamvid.window import WindowSlot

# Okabe and Ito's colours, told apart by most eyes
COLOURS = {
    "sink": (0, 114, 178),
    "pinned": (0, 158, 115),
    "recent": (86, 180, 233),
    "current block": (240, 228, 66),
    "compressed": (204, 121, 167),
    "in the cache, not attended": (84, 84, 94),
    "evicted": (178, 70, 20),
}
EMPTY = (30, 30, 36)
TEXT, FAINT = (236, 236, 240), (150, 150, 160)
ON_LIGHT, ON_DARK = (10, 10, 14), (250, 250, 250)
MARGIN, ROW, LINE = 16, 22, 22
TITLE_SIZE, TEXT_SIZE, NUMBER_SIZE = 17, 14, 12
CELL, SMALLEST_CELL, WIDEST_GRID = 28, 4, 1700
WIDEST_TITLE = 1400
MOST_FRAMES, MOST_FORWARDS = 1000, 300


def roles(forward: Forward) -> dict[int, str]:
    """Frame to its part in a forward, one of `COLOURS`; frames that are gone or yet to come have none."""
    parts = dict.fromkeys(forward.forgotten, "evicted")
    if forward.kind in ("block", "window"):  # a context pass evicts what its window did
        parts |= dict.fromkeys(forward.plan.evicted, "evicted")
    if forward.compressed:
        parts |= dict.fromkeys(forward.sources, "compressed")
    parts |= dict.fromkeys(forward.stored, "in the cache, not attended")
    parts |= {frame: "recent" for frame in forward.plan.attended if frame >= 0}
    parts |= dict.fromkeys(forward.sink, "sink")
    parts |= dict.fromkeys(forward.pinned, "pinned")
    return parts | dict.fromkeys(forward.plan.frames, "current block")


@dataclass(frozen=True)
class Layout:
    """Where the grid lies: `left` and `top` of its first cell, width of a cell, and how many there are."""

    left: int
    top: int
    cell: int
    frames: int
    forwards: int

    def box(self, row: int, frame: int) -> tuple[int, int, int, int]:
        """Pixels of a cell, its last ones included, with a gap to the next where cells have numbers of their own."""
        x, y = self.left + frame * self.cell, self.top + row * ROW
        return x, y, x + self.cell - 1 - self.numbered, y + ROW - 2

    @property
    def numbered(self) -> bool:
        """Whether every cell has room for a number."""
        return self.cell >= CELL - 4

    @property
    def size(self) -> tuple[int, int]:
        return self.left + self.frames * self.cell + MARGIN, self.top + self.forwards * ROW + MARGIN


def layout(forwards: Sequence[Forward]) -> Layout:
    """The grid of these forwards.

    Raises:
        UserError: they are too many for a picture.
    """
    frames = max(forward.plan.own[-1].frame for forward in forwards) + 1
    if frames > MOST_FRAMES or len(forwards) > MOST_FORWARDS:
        raise UserError(
            f"a picture of {frames} latent frames and {len(forwards)} forwards is too large: give fewer --blocks, "
            f"at most {MOST_FRAMES} frames and {MOST_FORWARDS} forwards"
        )
    font = ImageFont.load_default(TEXT_SIZE)
    widest = max(font.getlength(row_label(forward)) for forward in forwards)
    cell = max(SMALLEST_CELL, min(CELL, WIDEST_GRID // frames))
    return Layout(MARGIN + int(widest) + 14, MARGIN + 4 * LINE + 8, cell, frames, len(forwards))


def row_label(forward: Forward) -> str:
    """The row's name, and the prompt switch before it."""
    name = f"block {forward.number}" if forward.kind == "block" else label(forward)
    return f"{forward.event}, {name.strip()}" if forward.event else name


def draw(forwards: Sequence[Forward], title: str) -> Image.Image:
    """The picture; `title` has two lines, as `method_tables.heading` gives them."""
    grid, parts = layout(forwards), [roles(forward) for forward in forwards]
    first, _, second = title.partition("\n")
    lines = [
        (first, ImageFont.load_default(TITLE_SIZE), TEXT),
        (second, ImageFont.load_default(TEXT_SIZE), FAINT),
    ]
    legend = _legend(forwards, parts)
    widest = min(WIDEST_TITLE, max(legend[-1].right, *(int(font.getlength(text)) for text, font, _ in lines)))
    width, height = grid.size
    page = Image.new("RGB", (max(width, widest + 2 * MARGIN), height), BACKGROUND)
    canvas = ImageDraw.Draw(page)
    for line, (text, font, colour) in enumerate(lines):
        text = shortened(text, font, page.width - 2 * MARGIN)
        canvas.text((MARGIN, MARGIN + line * LINE), text, font=font, fill=colour)
    for entry in legend:
        entry.draw(canvas, MARGIN + 2 * LINE + 2)
    _frame_numbers(canvas, grid, forwards)
    for row, (forward, part) in enumerate(zip(forwards, parts, strict=True)):
        _row(canvas, grid, row, forward, part)
    return page


@dataclass(frozen=True)
class _Entry:
    """A colour of the legend and its meaning, `left` pixels from the margin."""

    left: int
    text: str
    colour: tuple[int, int, int] | None

    @property
    def right(self) -> int:
        return self.left + 20 + int(ImageFont.load_default(TEXT_SIZE).getlength(self.text))

    def draw(self, canvas: ImageDraw.ImageDraw, y: int) -> None:
        x, ink = MARGIN + self.left, TEXT if self.colour else FAINT
        if self.colour:
            canvas.rectangle((x, y + 2, x + 14, y + 16), self.colour)
        canvas.text((x + 20, y), self.text, font=ImageFont.load_default(TEXT_SIZE), fill=ink)


def _legend(forwards: Sequence[Forward], parts: Sequence[dict[int, str]]) -> list[_Entry]:
    """The colours that occur, side by side."""
    names = {}
    if any(forward.fused for forward in forwards):
        names["evicted"] = "averaged into the sink"
    tokens = max(forward.compressed for forward in forwards)
    names["compressed"] = f"compressed to {tokens} frame{'s' * (tokens != 1)} of chosen tokens"
    used = {role for part in parts for role in part.values()}
    entries: list[_Entry] = []
    for role, colour in [*COLOURS.items(), ("", None)]:
        if role in used or not role:
            left = entries[-1].right + 18 if entries else 0
            entries.append(
                _Entry(left, names.get(role, role) if role else "number: seen at this position", colour)
            )
    return entries


def _frame_numbers(canvas: ImageDraw.ImageDraw, grid: Layout, forwards: Sequence[Forward]) -> None:
    """Numbers of frames above the grid, at the beginnings of blocks, as many as there is room for."""
    font, free = ImageFont.load_default(NUMBER_SIZE), 0.0
    canvas.text((MARGIN, grid.top - LINE + 3), "frame", font=ImageFont.load_default(TEXT_SIZE), fill=FAINT)
    for frame in sorted({forward.plan.own[0].frame for forward in forwards}):
        x, text = grid.box(0, frame)[0], str(frame)
        if x >= free:
            canvas.text((x + 2, grid.top - LINE + 5), text, font=font, fill=FAINT)
            free = x + font.getlength(text) + 8


def _row(canvas: ImageDraw.ImageDraw, grid: Layout, row: int, forward: Forward, part: dict[int, str]) -> None:
    font, numbers = ImageFont.load_default(TEXT_SIZE), ImageFont.load_default(NUMBER_SIZE)
    colour = TEXT if forward.kind in ("block", "window") else FAINT
    canvas.text((MARGIN, grid.top + row * ROW + 1), row_label(forward), font=font, fill=colour)
    for frame in range(grid.frames):
        canvas.rectangle(grid.box(row, frame), COLOURS.get(part.get(frame, ""), EMPTY))
    for slots in _groups(forward, part, grid.numbered):
        left, right = grid.box(row, slots[0].frame), grid.box(row, slots[-1].frame)
        text = runs([slot.position for slot in slots])
        if numbers.getlength(text) <= right[2] - left[0] - 2:
            ink = ON_LIGHT if sum(COLOURS[part[slots[0].frame]]) > 330 else ON_DARK
            centre = (left[0] + right[2] + 1) / 2, (left[1] + left[3] + 1) / 2
            canvas.text(centre, text, font=numbers, fill=ink, anchor="mm")


def _groups(forward: Forward, part: dict[int, str], single: bool) -> list[list[WindowSlot]]:
    """What gets a number of its own: every frame, or in narrow cells runs of one colour with neighbouring positions."""
    groups: list[list[WindowSlot]] = []
    for slot in (slot for slot in forward.plan.window if slot.frame >= 0):
        last = groups[-1][-1] if groups else None
        steps = last is not None and (slot.frame - last.frame, slot.position - last.position) == (1, 1)
        if last is not None and steps and not single and part[slot.frame] == part[last.frame]:
            groups[-1].append(slot)
        else:
            groups.append([slot])
    return groups


def save(forwards: Sequence[Forward], title: str, path: str | Path) -> Path:
    """Write the picture as a PNG file, atomically.

    Raises:
        UserError: the file cannot be written, or there are too many forwards for a picture.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise UserError(f"picture '{path}' must be a PNG file: give a name that ends in .png")
    page = draw(forwards, title)
    path = prepare_output_file(path)
    try:
        with replace_atomically(path) as temporary:
            page.save(temporary, format="PNG")
    except OSError as error:
        raise output_error(error, path) from error
    return path
