"""The recording as an ordinary MP4: its table of frames in front, so that every player knows its length."""

from __future__ import annotations

import secrets
from pathlib import Path

from streamvid.app.live import LiveStream, StreamEnded

from streamvid.io.ffmpeg import ffmpeg_binary, ffmpeg_error, start_ffmpeg


def export_mp4(stream: LiveStream) -> Path:
    """Copy what was recorded so far, without encoding it again; the file lies in the stream's folder.

    A fork's film begins with what came before the fork.
    """
    parts = stream.recording.parts
    if not parts:
        raise StreamEnded("nothing has been made yet: wait for the first chunk")
    name = stream.folder / f"export-{secrets.token_hex(4)}"
    # a part may have grown on: ffmpeg's `subfile` ends where it ended then
    lines = [
        f"file 'subfile,,start,0,end,{part.size},,:{part.path!s}'\nduration {part.seconds:.6f}\n"
        for part in parts
    ]
    listing, output = name.with_suffix(".txt"), name.with_suffix(".mp4")
    listing.write_text("ffconcat version 1.0\n" + "".join(lines))
    command = [ffmpeg_binary(), "-hide_banner", "-v", "error", "-protocol_whitelist", "file,subfile"]
    command += ["-f", "concat", "-safe", "0", "-i", f"file:{listing}"]
    command += ["-c", "copy", "-movflags", "+faststart", "-y", f"file:{output}"]
    process = start_ffmpeg(command)
    _, messages = process.communicate()
    listing.unlink()
    if process.returncode:
        raise ffmpeg_error(output, messages, process.returncode, "the stream goes on")
    return output
