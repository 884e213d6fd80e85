"""Video writers of one signature: MP4, a folder of PNG files, GIF and WebP.

    with open_writer("story.mp4", fps=16) as writer:
        for chunk in stream:
            writer.write(chunk.frames)  # uint8, (frames, height, width, 3)

What each one guarantees when the process is killed, or the disk fills up, is in its docstring; the
stronger promise is the MP4's and the PNG folder's: what `write` has returned for is in the file.
"""

from __future__ import annotations

import logging
import os
import subprocess
import tempfile
from abc import ABC, abstractmethod
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image

from streamvid.errors import UserError
from streamvid.io.ffmpeg import (
    ffmpeg_binary,
    ffmpeg_error,
    raw_input,
    start_ffmpeg,
    stop_process,
)
from streamvid.io.files import (
    output_error,
    prepare_output_file,
    prepare_output_folder,
    replace_atomically,
    temporary_sibling,
)
from streamvid.io.fragments import placed, split_piece

logger = logging.getLogger(__name__)

COLOURS = (
    "scale=out_color_matrix=bt709:out_range=tv:flags=accurate_rnd+full_chroma_int,"
    "setparams=color_primaries=bt709:color_trc=bt709"
)
PALETTE = (  # one per frame; the ordered dither does not flicker from frame to frame
    "split[a][b];[a]palettegen=stats_mode=single[p];[b][p]paletteuse=new=1:dither=bayer:bayer_scale=4"
)


def frame_rate(fps: float | Fraction) -> Fraction:
    """`fps` as an exact fraction: 29.97 becomes 30000/1001."""
    if not 0 < float(fps) <= 1000:
        raise UserError(f"fps {fps} is out of range; give frames per second between 0 and 1000, such as 16.")
    for nominal in (24, 30, 60, 120):
        exact = Fraction(nominal * 1000, 1001)
        if abs(Fraction(fps) - exact) < Fraction(1, 200):
            return exact
    return Fraction(fps).limit_denominator(1000)


class Writer(ABC):
    """Base of the writers: a context manager that takes the frames of one chunk per `write`.

    Attributes: `path`; `fps` (a Fraction); `frames_written`, the frames that `write` has returned for.
    An existing output is overwritten, from the first `write` on.
    """

    def __init__(self, path: str | Path, fps: float | Fraction) -> None:
        self.path = Path(path)
        self.fps = frame_rate(fps)
        self.frames_written = 0
        self.closed = False
        self._frame_shape: tuple[int, ...] | None = None

    @property
    def seconds_written(self) -> float:
        """Media time, in seconds, of `frames_written`."""
        return float(self.frames_written / self.fps)

    def write(self, frames: np.ndarray) -> None:
        """Append `frames`, uint8 RGB of shape (frames, height, width, 3): all of them or, on error, none."""
        if self.closed:
            raise ValueError(f"the writer of '{self.path}' is closed")
        if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8:
            raise ValueError(
                f"frames must be uint8 of shape (frames, height, width, 3), not {frames.dtype} {frames.shape}"
            )
        if self._frame_shape not in (None, frames.shape[1:]):
            raise ValueError(f"frames of {frames.shape[1:]} cannot follow frames of {self._frame_shape}")
        if len(frames) == 0:
            return
        self._frame_shape = frames.shape[1:]
        self._append(np.ascontiguousarray(frames))
        self.frames_written += len(frames)

    def close(self) -> None:
        """Finish the output; closing twice does nothing."""
        if not self.closed:
            self.closed = True
            self._finish()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        try:
            self.close()
        except UserError as error:
            if kind is None:
                raise
            logger.warning("%s", error)  # the exception on its way tells the cause; this is a consequence

    def _kept(self) -> str:
        if self.frames_written == 0:
            return "nothing was written before"
        return f"the {self.seconds_written:.2f} s ({self.frames_written} frames) written before are kept"

    @abstractmethod
    def _append(self, frames: np.ndarray) -> None: ...

    @abstractmethod
    def _finish(self) -> None: ...


class Mp4Writer(Writer):
    """H.264 in fragmented MP4, written in place, playable at any moment.

    Guarantee: when `write` returns, all frames of the chunk are in the file, as whole fragments that
    start with a keyframe. Killing this process, ffmpeg or both (SIGKILL) at any later moment loses none
    of them; killed inside `write`, at most the chunk of that very call is missing. The data is in the
    operating system's hands then; only a power cut can still lose the last seconds. When the disk fills
    up, the file is cut back to the last whole chunk and stays playable.

    Each chunk is encoded by an ffmpeg process of its own, for only an encoder that has ended is certain
    to hold nothing back; the next one is started ahead, so that its start-up costs no waiting.
    Colours are BT.709, limited range, 4:2:0, which every browser and player shows; that needs an even
    height and width, so an odd last row or column is doubled.

    Args:
        path: file to write.
        fps: frames per second.
        crf: x264's constant rate factor, 0 (lossless) to 51; 18 looks like the source.
        preset: x264's preset: slower ones make smaller files.
    """

    def __init__(
        self, path: str | Path, fps: float | Fraction, *, crf: float = 18, preset: str = "veryfast"
    ) -> None:
        super().__init__(path, fps)
        if not 0 <= crf <= 51:
            raise UserError(f"crf {crf} is out of range; give 0 (lossless) to 51 (worst), such as 18.")
        self.crf, self.preset = crf, preset
        self._ffmpeg = ffmpeg_binary()
        prepare_output_file(self.path)
        self._file: IO[bytes] | None = None
        self._size = 0
        self._fragments = 0
        self._ready_encoder: subprocess.Popen[bytes] | None = None

    def _append(self, frames: np.ndarray) -> None:
        header, fragments = split_piece(self._encode(pad_to_even(frames)))
        delay = self.frames_written * self._ticks_per_frame
        data = b"" if self._file and self._size else header
        for number, (table, payload) in enumerate(fragments, start=self._fragments + 1):
            data += placed(table, number, delay) + payload
        try:
            if self._file is None:
                self._file = self.path.open("wb", buffering=0)
            write_fully(self._file, data)
        except OSError as error:
            if self._file is not None:
                with suppress(OSError):
                    self._file.truncate(self._size)
                    self._file.seek(self._size)
            raise output_error(error, self.path, self._kept()) from error
        self._size += len(data)
        self._fragments += len(fragments)
        with suppress(UserError):  # only to save time: the next chunk will tell if it matters
            self._ready_encoder = self._start_encoder(pad_to_even(frames[:1]))

    def _finish(self) -> None:
        if self._ready_encoder is not None:
            stop_process(self._ready_encoder)
            self._ready_encoder = None
        if self._file is not None:
            try:
                self._file.close()
                if self._size == 0:  # the disk was full from the start
                    self.path.unlink(missing_ok=True)
            except OSError as error:
                raise output_error(error, self.path, self._kept()) from error

    @property
    def _ticks_per_frame(self) -> int:
        return 1000 * self.fps.denominator

    def _encode(self, frames: np.ndarray) -> bytes:
        """One piece of fragmented MP4; an encoder that somebody killed is replaced once."""
        for attempt in (1, 2):
            encoder = self._ready_encoder or self._start_encoder(frames)
            self._ready_encoder = None
            try:
                data, messages = encoder.communicate(frames.tobytes())
            except BaseException:
                stop_process(encoder)
                raise
            if encoder.returncode == 0 and data:
                return data
            if encoder.returncode > 0 or attempt == 2:
                break
        raise ffmpeg_error(self.path, messages, encoder.returncode, self._kept())

    def _start_encoder(self, frames: np.ndarray) -> subprocess.Popen[bytes]:
        _, height, width, _ = frames.shape
        seconds_between_keyframes = 2
        return start_ffmpeg(
            [
                *(self._ffmpeg, *raw_input(width, height, self.fps)),
                *("-vf", COLOURS, "-pix_fmt", "yuv420p"),
                *("-c:v", "libx264", "-preset", self.preset, "-crf", str(self.crf), "-bf", "0"),
                *("-g", str(max(1, round(self.fps * seconds_between_keyframes)))),
                *("-threads", "0" if height * width > 200_000 else "1"),  # small frames do not repay threads
                # Delimiters tell decoders apart two keyframes in a row; the encoder's self-portrait
                # (600 bytes of supplemental information, type 6) need not stand in every chunk.
                *("-x264-params", "aud=1:scenecut=0", "-bsf:v", "filter_units=remove_types=6"),
                *("-video_track_timescale", str(1000 * self.fps.numerator)),
                *("-movflags", "+frag_keyframe+empty_moov+default_base_moof+skip_trailer"),
                *("-f", "mp4", "pipe:1"),
            ]
        )


class AnimationWriter(Writer):
    """GIF or animated WebP, by the suffix of `path`; it appears in one step when the writer is closed.

    Frames are encoded as they come into a hidden `.NAME.PID.partial.gif` beside the output. Closing,
    also after an exception in the `with` block, finishes it and renames it, so the frames written so
    far are saved. A process that is killed leaves the hidden file (ffmpeg completes it by itself).
    When the disk fills up, a GIF keeps the frames that fitted (the last one torn); a WebP, whose parts
    only ffmpeg can put together at the end, is lost: long videos belong in an MP4.
    GIF times are hundredths of a second: single frames are rounded, the sum is right. In a WebP equal
    frames in a row become one longer frame.
    """

    OPTIONS = {
        ".gif": ["-vf", PALETTE, "-f", "gif"],
        ".webp": ["-c:v", "libwebp_anim", "-pix_fmt", "yuv420p", "-quality", "85", "-f", "webp"],
    }

    def __init__(self, path: str | Path, fps: float | Fraction) -> None:
        super().__init__(path, fps)
        self._options = self.OPTIONS[self.path.suffix.lower()]
        self._ffmpeg = ffmpeg_binary()
        prepare_output_file(self.path)
        self._temporary = temporary_sibling(self.path)
        self._encoder: subprocess.Popen[bytes] | None = None
        self._messages: IO[bytes] | None = None

    def _append(self, frames: np.ndarray) -> None:
        if self._encoder is None:
            _, height, width, _ = frames.shape
            self._messages = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as ffmpeg)
            self._encoder = start_ffmpeg(
                [
                    *(self._ffmpeg, *raw_input(width, height, self.fps), *self._options),
                    *("-loop", "0", "-flush_packets", "1", "-y", f"file:{self._temporary.absolute()}"),
                ],
                stdout=subprocess.DEVNULL,
                stderr=self._messages,
            )
        assert self._encoder.stdin is not None
        try:
            self._encoder.stdin.write(frames.tobytes())
            self._encoder.stdin.flush()
        except OSError:  # broken pipe: ffmpeg has ended early, and `close` tells why
            self.close()
            raise

    def _finish(self) -> None:
        if self._encoder is None or self._messages is None:
            return
        with suppress(OSError):
            self._encoder.communicate()
        self._messages.seek(0)
        messages = self._messages.read()
        self._messages.close()
        failed = self._encoder.returncode != 0
        kept = failed and self.path.suffix.lower() == ".gif" and self._temporary.exists()
        try:
            if kept or not failed:
                os.replace(self._temporary, self.path)
            else:
                self._temporary.unlink(missing_ok=True)
        except OSError as error:
            raise output_error(error, self.path, f"the frames are in '{self._temporary}'") from error
        if failed:
            safe = "the frames that fitted are kept" if kept else "nothing could be kept"
            raise ffmpeg_error(self.path, messages, self._encoder.returncode, safe)


class PngFolderWriter(Writer):
    """A folder of `frame_000000.png`, `frame_000001.png`, ...; each appears whole or not at all.

    Guarantee: when `write` returns, all frames of the chunk are in the folder, whatever is killed
    afterwards. Frames of an earlier run in the same folder are removed at the first `write`; other
    files are left alone.
    """

    def __init__(self, path: str | Path, fps: float | Fraction) -> None:
        super().__init__(path, fps)
        prepare_output_folder(self.path)

    def _append(self, frames: np.ndarray) -> None:
        written: list[Path] = []
        try:
            if self.frames_written == 0:
                for old in self.path.glob("frame_[0-9][0-9][0-9][0-9][0-9][0-9]*.png"):
                    old.unlink()
            for index, frame in enumerate(frames, start=self.frames_written):
                written.append(self.path / f"frame_{index:06d}.png")
                with replace_atomically(written[-1], durable=False) as temporary:
                    Image.fromarray(frame).save(temporary, compress_level=3)
        except OSError as error:
            for path in written:  # a chunk is written whole or not at all
                with suppress(OSError):
                    path.unlink()
            raise output_error(error, self.path, self._kept()) from error

    def _finish(self) -> None:
        pass


WRITERS: dict[str, type[Writer]] = {".mp4": Mp4Writer, ".gif": AnimationWriter, ".webp": AnimationWriter}


def open_writer(path: str | Path, fps: float | Fraction, **options: Any) -> Writer:
    """The writer for `path`: by suffix, or a PNG folder for no suffix or a slash at the end.

    `options` go to the writer (for MP4: `crf`, `preset`). That the output can be written, and that
    ffmpeg is there, is checked at once; nothing is overwritten before the first `write`.
    """
    suffix = Path(path).suffix.lower()
    if not suffix or str(path).endswith(("/", os.sep)):
        return PngFolderWriter(path, fps, **options)
    if suffix not in WRITERS:
        raise UserError(
            f"output '{path}' has the unknown suffix '{suffix}'; "
            f"use {', '.join(WRITERS)}, or a name that ends in / for a folder of PNG files."
        )
    return WRITERS[suffix](path, fps, **options)


def write_fully(file: IO[bytes], data: bytes) -> None:
    """Write all of `data` to an unbuffered file, which may take it in parts."""
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


def pad_to_even(frames: np.ndarray) -> np.ndarray:
    """Repeat the last row and column of (frames, height, width, 3) where height or width is odd."""
    _, height, width, _ = frames.shape
    if height % 2 == 0 and width % 2 == 0:
        return frames
    return np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
