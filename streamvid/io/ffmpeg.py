"""The ffmpeg that imageio-ffmpeg brings: finding, starting, stopping it and telling its errors."""

from __future__ import annotations

import signal
import subprocess
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import IO

import imageio_ffmpeg

from streamvid.errors import UserError


def ffmpeg_binary() -> str:
    """Path of the ffmpeg that imageio-ffmpeg brings, or of IMAGEIO_FFMPEG_EXE."""
    try:
        return imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError as error:
        raise UserError(
            "ffmpeg is not found; run 'pip install imageio-ffmpeg' or set IMAGEIO_FFMPEG_EXE to its path."
        ) from error


def raw_input(width: int, height: int, fps: Fraction) -> list[str]:
    """ffmpeg options that read raw RGB frames from the standard input."""
    raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(fps), "-i", "pipe:0"]
    return ["-hide_banner", "-nostdin", "-v", "error", *raw]


def start_ffmpeg(
    command: list[str], stdout: int = subprocess.PIPE, stderr: int | IO[bytes] = subprocess.PIPE
) -> subprocess.Popen[bytes]:
    """Start ffmpeg in its own session, so that Ctrl-C reaches only us and we end it in order."""
    try:
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=stdout, stderr=stderr, start_new_session=True
        )
    except OSError as error:
        raise UserError(
            f"ffmpeg '{command[0]}' cannot be started ({error.strerror}); "
            "run 'pip install --force-reinstall imageio-ffmpeg' or set IMAGEIO_FFMPEG_EXE to its path."
        ) from error


def stop_process(process: subprocess.Popen[bytes]) -> None:
    """Kill a process that we started and collect what is left of it."""
    process.kill()
    with suppress(OSError, ValueError):
        process.communicate()


def ffmpeg_error(path: Path, messages: bytes, code: int, kept: str) -> UserError:
    """ffmpeg's failure as one sentence that ends with its own last words."""
    lines = messages.decode(errors="replace").strip().splitlines()
    too_large = code == -getattr(signal, "SIGXFSZ", 0)  # the signal of a file size limit
    if too_large or any("No space left" in line or "File too large" in line for line in lines):
        return UserError(
            f"output '{path}': the disk is full; {kept}; free some space or choose another place."
        )
    last = lines[-1].rstrip(".") if lines else f"it ended with code {code}"
    return UserError(f"output '{path}': ffmpeg failed ({last}); {kept}; choose another suffix or size.")
