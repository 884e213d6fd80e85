"""Files of every format, decoded back."""

import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from streamvid.errors import UserError
from streamvid.io import open_writer, read_video
from streamvid.io.writers import AnimationWriter, Mp4Writer, PngFolderWriter, frame_rate

sys.path.insert(0, str(Path(__file__).parent))
from slow_writer import smooth_frames

CHUNKS = (9, 12, 12, 1, 1, 40)  # first chunks are shorter; single frames make keyframes in a row


def psnr(first: np.ndarray, second: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two uint8 arrays, in dB."""
    error = np.square(first.astype(np.float32) - second.astype(np.float32)).mean()
    return float(10 * np.log10(255**2 / error)) if error else float("inf")


def write_chunks(path, fps=16, height=96, width=128, chunks=CHUNKS, **options) -> np.ndarray:
    """Write `chunks` and return the frames that went in."""
    written = []
    with open_writer(path, fps, **options) as writer:
        for count in chunks:
            written.append(smooth_frames(writer.frames_written, count, height, width))
            writer.write(written[-1])
        assert writer.frames_written == sum(chunks)
        assert writer.seconds_written == pytest.approx(sum(chunks) / fps, rel=1e-3)
    return np.concatenate(written)


def decoded(path) -> np.ndarray:
    return np.stack(list(read_video(path)))


@pytest.mark.parametrize("fps", [16, 12.5, 29.97, Fraction(24000, 1001)])
def test_mp4_gives_the_frames_back(tmp_path, fps):
    source = write_chunks(tmp_path / "story.mp4", fps)
    frames = decoded(tmp_path / "story.mp4")
    assert frames.shape == source.shape
    assert psnr(frames, source) > 35
    worst = min(psnr(frame, original) for frame, original in zip(frames, source, strict=True))
    assert worst > 30  # every frame stands where it belongs


def test_mp4_tells_rate_and_duration(tmp_path):
    import imageio_ffmpeg

    write_chunks(tmp_path / "story.mp4", 12.5)
    description = next(imageio_ffmpeg.read_frames(tmp_path / "story.mp4"))
    assert description["fps"] == 12.5
    assert description["duration"] == pytest.approx(sum(CHUNKS) / 12.5, abs=0.02)
    assert description["codec"] == "h264"
    assert "yuv420p" in description["pix_fmt"]


def test_mp4_has_a_keyframe_within_two_seconds(tmp_path):
    """One `write` of a whole video still gives a file in which one can jump about."""
    source = write_chunks(tmp_path / "story.mp4", chunks=(100,))
    assert (tmp_path / "story.mp4").read_bytes().count(b"moof") == 4
    assert psnr(decoded(tmp_path / "story.mp4"), source) > 35


@pytest.mark.parametrize(("height", "width"), [(91, 128), (96, 127), (33, 35), (1, 1)])
def test_mp4_doubles_an_odd_last_row_and_column(tmp_path, height, width):
    source = write_chunks(tmp_path / "odd.mp4", height=height, width=width)
    frames = decoded(tmp_path / "odd.mp4")
    assert frames.shape == (len(source), height + height % 2, width + width % 2, 3)
    assert psnr(frames[:, :height, :width], source) > 30


def test_mp4_quality_is_a_choice(tmp_path):
    fine, coarse = tmp_path / "fine.mp4", tmp_path / "coarse.mp4"
    source = write_chunks(fine, crf=10)
    write_chunks(coarse, crf=40)
    assert psnr(decoded(fine), source) > psnr(decoded(coarse), source) + 5
    assert fine.stat().st_size > 2 * coarse.stat().st_size


def test_mp4_is_in_the_file_when_write_returns(tmp_path):
    path = tmp_path / "story.mp4"
    with open_writer(path, 16) as writer:
        for count in CHUNKS:
            writer.write(smooth_frames(writer.frames_written, count))
            assert len(decoded(path)) == writer.frames_written


def test_mp4_hours_into_a_stream(tmp_path):
    """Times are exact integers: no drift and no overflow after a week at 16 fps."""
    from streamvid.io.fragments import split_piece

    with Mp4Writer(tmp_path / "late.mp4", 16) as writer:
        writer.frames_written = late = 16 * 3600 * 24 * 7
        writer.write(smooth_frames(0, 12))
    _, [(table, _)] = split_piece((tmp_path / "late.mp4").read_bytes())
    time = table.index(b"tfdt") + 8
    assert int.from_bytes(table[time : time + 8], "big") == late * 1000  # ticks of 1/16000 s


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_animation_gives_the_frames_back(tmp_path, suffix):
    path = tmp_path / f"story{suffix}"
    source = write_chunks(path, height=61, width=75)
    frames = decoded(path)
    assert frames.shape == source.shape
    assert psnr(frames, source) > (24 if suffix == ".gif" else 32)
    with Image.open(path) as animation:
        durations = []
        for index in range(animation.n_frames):
            animation.seek(index)
            animation.load()
            durations.append(animation.info["duration"])
        assert animation.info["loop"] == 0
    assert sum(durations) == pytest.approx(1000 * len(source) / 16, abs=70)  # milliseconds, no drift
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_animation_appears_whole_and_survives_an_exception(tmp_path, suffix):
    path = tmp_path / f"story{suffix}"
    path.write_bytes(b"the old one")
    with pytest.raises(RuntimeError, match="out of memory"), open_writer(path, 16) as writer:
        writer.write(smooth_frames(0, 12))
        assert path.read_bytes() == b"the old one"
        raise RuntimeError("out of memory")
    assert len(decoded(path)) == 12


@pytest.mark.parametrize("name", ["frames", "frames.v2/"])
def test_png_folder_gives_the_very_frames(tmp_path, name):
    source = write_chunks(f"{tmp_path}/{name}")
    folder = tmp_path / name
    assert sorted(file.name for file in folder.iterdir())[-1] == f"frame_{len(source) - 1:06d}.png"
    assert np.array_equal(decoded(folder), source)


def test_png_folder_forgets_the_earlier_run_only(tmp_path):
    write_chunks(tmp_path / "frames", chunks=(12,))
    (tmp_path / "frames" / "notes.txt").write_text("mine")
    write_chunks(tmp_path / "frames", chunks=(3,))
    assert len(decoded(tmp_path / "frames")) == 3
    assert (tmp_path / "frames" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["story.mp4", "story.gif", "story.webp"])
def test_the_old_video_stays_until_there_is_a_new_one(tmp_path, name):
    path = tmp_path / "deeper" / "still" / name
    with open_writer(path, 16):
        assert path.parent.is_dir()
    assert not path.exists()  # no empty file where nothing was written
    path.write_bytes(b"the old one")
    with open_writer(path, 16):
        pass
    assert path.read_bytes() == b"the old one"
    write_chunks(path, chunks=(2,))
    assert len(decoded(path)) == 2


def test_the_suffix_chooses_the_writer(tmp_path):
    expected = {"a.mp4": Mp4Writer, "b.MP4": Mp4Writer, "c.gif": AnimationWriter, "d.webp": AnimationWriter}
    for name, kind in {**expected, "e": PngFolderWriter}.items():
        with open_writer(tmp_path / name, 16) as writer:
            assert type(writer) is kind


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("story.avi", r"unknown suffix '\.avi'; use \.mp4, \.gif, \.webp, or a name that ends in /"),
        ("folder.mp4", "it is a folder; give the name of a file"),
        ("folder.gif", "it is a folder; give the name of a file"),
        ("file.txt/story.mp4", "a file stands where a folder is needed"),
        ("file.txt/frames/", "a file stands where a folder is needed"),
        ("/proc/story.mp4", "cannot be written|not permitted"),
        ("/proc/frames/", "cannot be written|not permitted"),
    ],
)
def test_a_bad_output_is_told_before_anything_is_made(tmp_path, name, sentence):
    for folder in ("folder.mp4", "folder.gif"):
        (tmp_path / folder).mkdir()
    (tmp_path / "file.txt").write_text("mine")
    path = name if name.startswith("/") else f"{tmp_path}/{name}"
    with pytest.raises(UserError, match=sentence) as failure:
        open_writer(path, 16)
    assert path.rstrip("/") in str(failure.value)
    assert "\n" not in str(failure.value)


def test_a_missing_ffmpeg_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(tmp_path / "no-ffmpeg"))
    with pytest.raises(UserError, match="pip install"), open_writer(tmp_path / "story.mp4", 16) as writer:
        writer.write(smooth_frames(0, 3))
    assert not (tmp_path / "story.mp4").exists()


@pytest.mark.parametrize("name", ["story.mp4", "story.gif"])
def test_what_ffmpeg_says_is_told(tmp_path, name):
    """An ffmpeg that fails, here for a preset that it does not know, gives one sentence."""
    writer = open_writer(tmp_path / name, 16)
    if isinstance(writer, Mp4Writer):
        writer.preset = "none-such"
    elif isinstance(writer, AnimationWriter):
        writer._options = ["-f", "none-such"]
    with pytest.raises(UserError, match=r"ffmpeg failed \(.*\)") as failure:
        writer.write(smooth_frames(0, 3))
        writer.close()
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize("fps", [0, -1, float("nan"), float("inf"), 1001])
def test_a_bad_frame_rate_is_told(tmp_path, fps):
    with pytest.raises(UserError, match=f"fps {fps} is out of range"):
        open_writer(tmp_path / "story.mp4", fps)


def test_frame_rates_are_exact():
    assert frame_rate(16) == 16
    assert frame_rate(29.97) == frame_rate(30000 / 1001) == Fraction(30000, 1001)
    assert frame_rate(12.5) == Fraction(25, 2)


def test_wrong_frames_are_refused_and_the_file_stays_whole(tmp_path):
    with open_writer(tmp_path / "story.mp4", 16) as writer:
        writer.write(smooth_frames(0, 5))
        writer.write(smooth_frames(0, 0))
        for wrong in (smooth_frames(5, 5).astype(np.float32), smooth_frames(5, 1)[0]):
            with pytest.raises(ValueError, match="uint8 of shape"):
                writer.write(wrong)
        with pytest.raises(ValueError, match="cannot follow"):
            writer.write(smooth_frames(5, 5, height=98))
    writer.close()
    with pytest.raises(ValueError, match="closed"):
        writer.write(smooth_frames(5, 5))
    assert len(decoded(tmp_path / "story.mp4")) == 5


def test_reading_what_is_no_video_is_told(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        next(read_video(tmp_path / "none.mp4"))
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(UserError, match="cannot be read"):
        next(read_video(tmp_path / "text.mp4"))
