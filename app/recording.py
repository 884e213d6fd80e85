"""A stream's video as it is made: one growing fragmented MP4, which live viewers and the export read alike."""

from __future__ import annotations

import os
import shutil
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from streamvid.io.fragments import boxes
from streamvid.io.writers import Mp4Writer


@dataclass(frozen=True)
class Piece:
    """One chunk in the file: `size` bytes from `offset` on, which begin with a keyframe.

    `start` and `seconds` are media time of the stream; the file itself begins at 0.
    """

    offset: int
    size: int
    start: float
    seconds: float


@dataclass(frozen=True)
class Part:
    """The first `size` bytes of an MP4, which last `seconds`."""

    path: Path
    size: int
    seconds: float


class Recording:
    """Every chunk becomes a piece of `path` that any player can start with.

    Args:
        path: file to write; it grows for as long as the stream runs and plays at any moment.
        fps: frames per second.
        start: media time of the first frame, above 0 for a fork.
        before: what a fork goes on from; kept beside `path`, for the other stream may be deleted.
    """

    def __init__(self, path: Path, fps: float, start: float = 0.0, before: Sequence[Part] = ()):
        self.path, self.start = path, start
        self._before = [
            replace(part, path=keep(part.path, path.with_name(f"before-{number}.mp4")))
            for number, part in enumerate(before)
        ]
        self._writer = Mp4Writer(path, fps, crf=20, preset="veryfast")
        self.header = b""
        self.codec = ""
        self.pieces: list[Piece] = []

    @property
    def seconds(self) -> float:
        """Length of the file."""
        return self._writer.seconds_written

    @property
    def parts(self) -> list[Part]:
        """The whole film so far, that before a fork included."""
        if not self.pieces:
            return list(self._before)
        last = self.pieces[-1]  # what is being written behind it is left out
        return [
            *self._before,
            Part(self.path, last.offset + last.size, last.start + last.seconds - self.start),
        ]

    def add(self, frames: np.ndarray) -> Piece:
        """Append uint8 frames [T, H, W, 3]; when this returns they are in the file."""
        before, began = self._size(), self._writer.seconds_written
        self._writer.write(frames)
        if not self.header:
            self.header = read_header(self.path)
            self.codec = codec_of(self.header)
            before = len(self.header)
        seconds = self._writer.seconds_written - began
        piece = Piece(before, self._size() - before, self.start + began, seconds)
        self.pieces.append(piece)
        return piece

    def read(self, piece: Piece) -> bytes:
        """The bytes of a piece."""
        with self.path.open("rb") as file:
            file.seek(piece.offset)
            return file.read(piece.size)

    def piece_at(self, media_time: float) -> int:
        """Number of the piece that shows `media_time`."""
        starts = [piece.start for piece in self.pieces]
        return max(0, bisect_right(starts, media_time + 1e-6) - 1)

    def close(self) -> None:
        self._writer.close()

    def _size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0


def keep(path: Path, name: Path) -> Path:
    """Another name for a file, which lives on under it; a copy where the file system has no such names."""
    try:
        os.link(path, name)
    except OSError:
        shutil.copyfile(path, name)
    return name


def read_header(path: Path) -> bytes:
    """`ftyp` and `moov` of an MP4 that holds whole boxes."""
    header = b""
    for kind, box in boxes(path.read_bytes()):
        if kind == b"moof":
            break
        header += box
    return header


def codec_of(header: bytes) -> str:
    """The codec as browsers name it, e.g. `avc1.42c00b`: profile, constraints and level of the `avcC` box."""
    place = header.index(b"avcC") + 5
    return f"avc1.{header[place : place + 3].hex()}"
