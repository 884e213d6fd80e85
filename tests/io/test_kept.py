"""What is left after SIGKILL and on a full disk."""

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from streamvid.errors import UserError
from streamvid.io import open_writer, read_video

sys.path.insert(0, str(Path(__file__).parent))
from slow_writer import smooth_frames

SLOW_WRITER = str(Path(__file__).parent / "slow_writer.py")


def start_slow_writer(path: Path, chunks: int, pause: float, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, SLOW_WRITER, str(path), str(chunks), str(pause), *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def assert_frames_are_right(frames: list[np.ndarray]) -> None:
    expected = smooth_frames(0, len(frames))
    for frame, original in zip(frames, expected, strict=True):
        error = np.square(frame.astype(np.float32) - original.astype(np.float32)).mean()
        assert error < 255**2 / 10**3  # 30 dB


@pytest.mark.parametrize("delay", [0.0, 0.007, 0.02, 0.05])  # between writes and inside them
def test_sigkill_loses_no_committed_frame(tmp_path, delay):
    path = tmp_path / "story.mp4"
    process = start_slow_writer(path, chunks=1000, pause=0.0)
    assert process.stdout is not None
    committed = 0
    while committed < 36:
        committed = int(process.stdout.readline())
    time.sleep(delay)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    for child in children:
        if child.is_running():
            child.kill()
    rest = process.communicate()[0].split()  # what it had said before it died
    committed = int(rest[-1]) if rest else committed
    frames = list(read_video(path))
    assert committed <= len(frames) <= committed + 12
    assert_frames_are_right(frames)
    gone, alive = psutil.wait_procs(children, timeout=5)
    assert not alive, f"ffmpeg outlived its parent: {alive}, {gone}"


def test_sigkill_keeps_every_png(tmp_path):
    process = start_slow_writer(tmp_path / "frames", chunks=1000, pause=0.0)
    assert process.stdout is not None
    for _ in range(5):
        committed = int(process.stdout.readline())
    process.kill()
    rest = process.communicate()[0].split()
    committed = int(rest[-1]) if rest else committed
    frames = list(read_video(tmp_path / "frames"))
    assert committed <= len(frames) <= committed + 12
    assert_frames_are_right(frames)


def test_a_killed_ffmpeg_costs_nothing(tmp_path):
    path = tmp_path / "story.mp4"
    with open_writer(path, 16) as writer:
        for _ in range(4):
            writer.write(smooth_frames(writer.frames_written, 12))
            for child in psutil.Process().children():
                if "ffmpeg" in child.name():
                    child.kill()
    frames = list(read_video(path))
    assert len(frames) == 48
    assert_frames_are_right(frames)


def test_an_interrupt_inside_write_commits_nothing_of_the_chunk(tmp_path, monkeypatch):
    path = tmp_path / "story.mp4"
    with pytest.raises(KeyboardInterrupt), open_writer(path, 16) as writer:
        writer.write(smooth_frames(0, 12))

        def interrupt(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr(subprocess.Popen, "communicate", interrupt)
        writer.write(smooth_frames(12, 12))
    monkeypatch.undo()
    assert len(list(read_video(path))) == 12


@pytest.mark.parametrize("name", ["story.mp4", "story.gif", "story.webp"])
def test_full_disk_keeps_what_was_written(tmp_path, name):
    """The largest file is limited, which an encoder and a writer meet as they meet a full disk."""
    path = tmp_path / name
    most_bytes = 60_000 if name == "story.gif" else 12_000
    process = start_slow_writer(path, 60, 0.0, str(most_bytes))
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert errors.startswith(f"UserError: output '{path}': the disk is full; ")
    assert errors.strip().count("\n") == 0
    committed = int(output.split()[-1])
    if name == "story.mp4":
        assert path.stat().st_size <= most_bytes
        frames = list(read_video(path))
        assert len(frames) == committed > 12
        assert f"{committed} frames) written before are kept" in errors
        assert_frames_are_right(frames)
    elif name == "story.gif":
        assert "the frames that fitted are kept" in errors
        frames = []
        with pytest.raises(OSError, match="truncated"):  # Pillow minds the torn last frame
            frames.extend(read_video(path))
        assert len(frames) > 2
    else:
        assert "nothing could be kept" in errors
        assert not list(tmp_path.iterdir())


def test_full_disk_keeps_whole_chunks_of_png(tmp_path):
    with open_writer(tmp_path / "frames", 16) as writer:
        writer.write(smooth_frames(0, 12))
        old = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, old[1]))
        try:
            with pytest.raises(UserError, match=r"disk is full; the 0\.75 s \(12 frames\) written before"):
                writer.write(smooth_frames(12, 12))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)
        assert len(list(read_video(tmp_path / "frames"))) == 12
        writer.write(smooth_frames(12, 12))  # there is room again: the stream may go on
    assert_frames_are_right(list(read_video(tmp_path / "frames")))


def test_a_disk_full_from_the_start_leaves_no_empty_video(tmp_path):
    process = start_slow_writer(tmp_path / "story.mp4", 3, 0.0, "100")
    assert "the disk is full; nothing was written before; free some space" in process.communicate()[1]
    assert not list(tmp_path.iterdir())


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system of 64 KiB; only where we may mount one."""
    mounted = tmp_path / "disk"
    mounted.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(mounted)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("mounting a file system is not permitted here")
    yield mounted
    subprocess.run(["umount", str(mounted)], check=True)


def test_a_really_full_disk_and_room_afterwards(tiny_disk):
    path, ballast = tiny_disk / "story.mp4", tiny_disk / "ballast"
    ballast.write_bytes(bytes(40_000))
    with open_writer(path, 16) as writer:
        with pytest.raises(UserError, match="the disk is full"):
            for _ in range(100):
                writer.write(smooth_frames(writer.frames_written, 12))
        committed = writer.frames_written
        assert len(list(read_video(path))) == committed > 0
        ballast.unlink()
        writer.write(smooth_frames(committed, 12))
    frames = list(read_video(path))
    assert len(frames) == committed + 12
    assert_frames_are_right(frames)
