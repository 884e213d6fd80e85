"""Where frames come from: a video file, a folder of pictures, an array, or a stream that is being made.

A source tells its measure first and then gives frames one by one, so that memory does not grow with length.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import imageio_ffmpeg
import numpy as np

from streamvid.evaluation.types import Batch, Features, Frame
from streamvid.io.ffmpeg import ffmpeg_binary

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
VIDEOS = (".mp4", ".mkv", ".webm", ".mov", ".avi", ".gif")
DEFAULT_FPS = 16.0  # of a folder of pictures, which does not say


class BadVideo(Exception):
    """Frames that cannot be had; the text is one line that says why."""


@dataclass(frozen=True)
class Measure:
    frames: int
    height: int
    width: int
    fps: float


class ArraySource:
    """Frames in memory, uint8 `[T, H, W, 3]`."""

    def __init__(self, frames: np.ndarray, fps: float):
        self.array = frames
        self.measure = Measure(len(frames), frames.shape[1], frames.shape[2], fps)

    def frames(self) -> Iterator[np.ndarray]:
        yield from self.array

    def content(self) -> str:
        return hashlib.sha256(np.ascontiguousarray(self.array).tobytes()).hexdigest()


class StreamSource:
    """The chunks of a stream, measured while they are made; its length must be known (a script, or `blocks`)."""

    def __init__(self, chunks: Iterable, frames: int, height: int, width: int, fps: float):
        self.chunks = chunks
        self.measure = Measure(frames, height, width, fps)

    def frames(self) -> Iterator[np.ndarray]:
        for chunk in self.chunks:
            yield from chunk.frames


class FolderSource:
    """The pictures of a folder in the order of their names."""

    def __init__(self, folder: Path, fps: float | None = None):
        self.files = sorted(file for file in folder.iterdir() if file.suffix.lower() in PICTURES)
        if not self.files:
            raise BadVideo("the folder has no pictures")
        first = self._read(self.files[0])
        self.measure = Measure(len(self.files), first.shape[0], first.shape[1], fps or DEFAULT_FPS)

    def _read(self, file: Path) -> np.ndarray:
        image = cv2.imread(str(file), cv2.IMREAD_COLOR)
        if image is None:
            raise BadVideo(f"{file.name} is not a picture")
        return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)

    def frames(self) -> Iterator[np.ndarray]:
        for file in self.files:
            yield self._read(file)

    def content(self) -> str:
        total = hashlib.sha256()
        for file in self.files:
            total.update(file.read_bytes())
        return total.hexdigest()


class FileSource:
    """A video file, decoded by OpenCV as VBench does."""

    def __init__(self, path: Path, fps: float | None = None):
        if path.stat().st_size == 0:
            raise BadVideo("the file is empty")
        self.path = path
        capture = cv2.VideoCapture(str(path))
        found, frame = capture.read()
        own_fps = capture.get(cv2.CAP_PROP_FPS)
        capture.release()
        if not found:
            raise BadVideo(_why_unreadable(path))
        self.measure = Measure(self._count(), frame.shape[0], frame.shape[1], fps or own_fps or DEFAULT_FPS)

    def _count(self) -> int:
        """Frames in the container, counted without decoding (headers may be wrong or silent)."""
        try:
            return imageio_ffmpeg.count_frames_and_secs(str(self.path))[0]
        except (RuntimeError, OSError, ValueError):
            raise BadVideo("its frames cannot be counted") from None

    def frames(self) -> Iterator[np.ndarray]:
        sizes = _sizes(self.path)
        if len(sizes) > 1:  # OpenCV would scale all of them to the first without a word
            raise BadVideo(f"its pictures change from {sizes[0]} to {sizes[1]} px")
        capture = cv2.VideoCapture(str(self.path))
        try:
            while True:
                found, frame = capture.read()
                if not found:
                    return
                yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
        finally:
            capture.release()

    def content(self) -> str:
        total = hashlib.sha256()
        with self.path.open("rb") as file:
            while block := file.read(1 << 20):
                total.update(block)
        return total.hexdigest()


def _sizes(path: Path) -> list[str]:
    """Sizes of the pictures of a file, in the order in which they come; a new one begins with a picture coded by itself."""
    command = [ffmpeg_binary(), "-hide_banner", "-nostdin", "-skip_frame", "nokey", "-i", str(path)]
    command += ["-map", "0:v:0", "-vf", "showinfo", "-f", "null", "-"]
    told = subprocess.run(command, capture_output=True, text=True, errors="replace").stderr
    return list(dict.fromkeys(re.findall(r"showinfo.* s:(\d+x\d+) ", told)))


def _why_unreadable(path: Path) -> str:
    """No picture came out of a file: whether it has only sound, or is no video at all."""
    try:
        about = next(imageio_ffmpeg.read_frames(str(path)))
    except (RuntimeError, OSError, IndexError, KeyError, ValueError, StopIteration):
        about = {}
    if about.get("size"):
        return "no frame of it can be decoded"
    data = path.read_bytes()[: 1 << 20]
    if b"soun" in data or b"mp4a" in data or data[:4] in (b"RIFF", b"OggS", b"fLaC") or data[:3] == b"ID3":
        return "it has sound but no picture"
    return "it is no video that can be read"


Source = ArraySource | StreamSource | FolderSource | FileSource


def open_source(path: str | Path, fps: float | None = None) -> FolderSource | FileSource:
    """A file or a folder of pictures. Raises BadVideo."""
    path = Path(path)
    if path.is_dir():
        return FolderSource(path, fps)
    if not path.is_file():
        raise BadVideo("there is no such file")
    return FileSource(path, fps)


def batches(source: Source, size: int = 16) -> Iterator[Batch]:
    """The frames of a source in batches. Raises BadVideo where they are not what was announced."""
    measure, waiting, count = source.measure, [], 0
    previous: Frame | None = None
    for rgb in source.frames():
        if rgb.shape[:2] != (measure.height, measure.width):
            height, width = rgb.shape[:2]
            raise BadVideo(
                f"frame {count} is {width} x {height} px and the first is {measure.width} x {measure.height}"
            )
        frame = Frame(count, rgb, previous)
        waiting.append(frame)
        previous = frame
        count += 1
        if len(waiting) == size:
            yield Batch(Features(waiting), 0, len(waiting))
            for done in waiting:
                done.previous = None
            waiting = []
    if waiting:
        yield Batch(Features(waiting), 0, len(waiting))
    if count != measure.frames:
        raise BadVideo(f"{count} of {measure.frames} frames can be decoded")
