"""The recording as an ordinary MP4: its table of frames in front, so that every player knows its length."""

from __future__ import annotations

import secrets
from pathlib import Path

from streamvid.app.live import LiveStream, StreamEnded

from streamvid.io.ffmpeg import ffmpeg_binary, ffmpeg_error, start_ffmpeg


def export_mp4(stream: LiveStream) -> Path:
    """Copy what was recorded so far, without encoding it again; the file lies in the stream's folder."""
    recording = stream.recording
    pieces = list(recording.pieces)
    if not pieces:
        raise StreamEnded("nothing has been made yet: wait for the first chunk")
    whole = pieces[-1].offset + pieces[-1].size  # what is being written behind it is left out
    output = stream.folder / f"export-{secrets.token_hex(4)}.mp4"
    command = [ffmpeg_binary(), "-hide_banner", "-v", "error", "-f", "mp4", "-i", "pipe:0"]
    command += ["-c", "copy", "-movflags", "+faststart", "-y", f"file:{output}"]
    process = start_ffmpeg(command)
    with recording.path.open("rb") as file:
        _, messages = process.communicate(file.read(whole))
    if process.returncode:
        raise ffmpeg_error(output, messages, process.returncode, "the stream goes on")
    return output
