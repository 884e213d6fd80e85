"""Manifest, contact sheet and progress bar."""

import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from streamvid.errors import UserError
from streamvid.io import ContactSheet, Manifest, ProgressBar, manifest_path
from streamvid.io.contact_sheet import MARGIN, PROMPT_COLOUR, SAME_PROMPT_COLOUR, clock


def load(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def new_manifest(path, **more) -> Manifest:
    return Manifest(
        path,
        fps=16,
        video="story.mp4",
        config={"window": 12, "path": Path("a/b")},
        seed=7,
        script={"shots": [{"prompt": "fällt Schnee"}]},
        timeline=[{"shot": 0, "start_seconds": 0.0}],
        device="cpu",
        **more,
    )


def test_manifest_tells_how_the_video_was_made(tmp_path):
    path = tmp_path / "story.json"
    with new_manifest(path) as manifest:
        assert load(path)["status"] == "running"  # from the first moment
        manifest.add_chunk(frames=9, prompt="one", timings={"denoise": 0.1234567})
        manifest.add_chunk(frames=12, prompt="two", events=["switch"])
    record = load(path)
    assert record["status"] == "complete" and record["error"] is None
    assert record["seed"] == 7 and record["config"] == {"window": 12, "path": "a/b"}
    assert record["script"]["shots"][0]["prompt"] == "fällt Schnee"
    assert {"python", "streamvid", "torch", "diffusers"} <= set(record["versions"])
    assert record["device"] == "cpu" and record["platform"]
    assert record["chunks"] == [
        {"index": 0, "start_seconds": 0.0, "frames": 9, "prompt": "one", "timings": {"denoise": 0.123457}},
        {
            "index": 1,
            "start_seconds": 9 / 16,
            "frames": 12,
            "prompt": "two",
            "timings": {},
            "events": ["switch"],
        },
    ]
    assert record["totals"]["frames"] == 21 and record["totals"]["media_seconds"] == 21 / 16
    assert os.listdir(tmp_path) == ["story.json"]


@pytest.mark.parametrize(
    ("error", "status"), [(KeyboardInterrupt(), "interrupted"), (RuntimeError("no memory"), "failed")]
)
def test_manifest_notes_how_a_run_ended(tmp_path, error, status):
    with pytest.raises(type(error)), new_manifest(tmp_path / "story.json") as manifest:
        manifest.add_chunk(frames=9, prompt="one")
        raise error
    record = load(tmp_path / "story.json")
    assert record["status"] == status and record["error"]
    assert record["totals"]["frames"] == 9


def test_manifest_is_updated_at_most_once_a_second(tmp_path, monkeypatch):
    saves = []
    manifest = new_manifest(tmp_path / "story.json")
    original = Manifest._save
    monkeypatch.setattr(Manifest, "_save", lambda self: (saves.append(1), original(self)))
    for _ in range(500):
        manifest.add_chunk(frames=12, prompt="one")
    assert len(saves) <= 2
    manifest._next_update = 0.0
    manifest.add_chunk(frames=12, prompt="two")
    assert len(load(tmp_path / "story.json")["chunks"]) == 501
    manifest.finish(peak_memory_bytes=5)
    assert load(tmp_path / "story.json")["totals"]["peak_memory_bytes"] == 5


def test_manifest_does_not_overwrite_a_script(tmp_path):
    video, script = tmp_path / "story.mp4", tmp_path / "story.json"
    assert manifest_path(video) == script
    new_manifest(script).finish()
    assert manifest_path(video) == script  # a manifest is overwritten
    script.write_text('{"shots": []}')
    assert manifest_path(video) == tmp_path / "story.manifest.json"


def test_manifest_where_one_cannot_write_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="a file stands where a folder is needed"):
        new_manifest(tmp_path / "file" / "story.json")


def test_manifest_survives_a_failing_update(tmp_path, monkeypatch, caplog):
    path = tmp_path / "story.json"
    manifest = new_manifest(path)
    manifest._next_update = 0.0
    monkeypatch.setattr(
        os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    manifest.add_chunk(frames=9, prompt="one")  # only a warning: the video is what matters
    assert "the disk is full" in caplog.text
    with pytest.raises(UserError, match="the disk is full"):
        manifest.finish()
    assert load(path)["status"] == "running" and os.listdir(tmp_path) == ["story.json"]


def frames_of(colour: int, count: int, height: int = 72, width: int = 128) -> np.ndarray:
    return np.full((count, height, width, 3), colour, dtype=np.uint8)


def test_contact_sheet_takes_one_frame_every_two_seconds(tmp_path):
    sheet = ContactSheet(fps=16)
    sheet.add(frames_of(50, 9), "first prompt")
    for number in range(10):
        sheet.add(frames_of(60 + 10 * number, 12), "first prompt" if number < 4 else "second prompt")
    assert [thumbnail.seconds for thumbnail in sheet.thumbnails] == [0, 2, 4, 6, 8]
    assert [thumbnail.prompt[:5] for thumbnail in sheet.thumbnails] == ["first"] * 2 + ["secon"] * 3
    shades = [thumbnail.picture.getpixel((0, 0))[0] for thumbnail in sheet.thumbnails]
    assert shades == [50, 60 + 10 * 1, 60 + 10 * 4, 60 + 10 * 7, 60 + 10 * 9]
    sheet.save(tmp_path / "new" / "story.png")
    picture = np.asarray(Image.open(tmp_path / "new" / "story.png"))
    assert (picture[MARGIN + 10, MARGIN + 10] == 50).all()
    for colour in (PROMPT_COLOUR, SAME_PROMPT_COLOUR):  # captions are there, new ones bright, old ones dimmed
        assert (picture == colour).all(axis=-1).any()
    assert os.listdir(tmp_path / "new") == ["story.png"]


def test_contact_sheet_of_an_endless_stream_stays_small():
    sheet = ContactSheet(fps=4, seconds_per_frame=1, most_thumbnails=20)
    for _ in range(1000):
        sheet.add(frames_of(0, 7, 8, 8), "on and on")
    assert 10 <= len(sheet.thumbnails) <= 20
    gaps = np.diff([thumbnail.seconds for thumbnail in sheet.thumbnails])
    assert len(set(gaps)) == 1 and sheet.thumbnails[0].seconds == 0


def test_contact_sheet_of_hard_prompts(tmp_path):
    sheet = ContactSheet(fps=1, seconds_per_frame=1)
    for prompt in ("", "x" * 500, "word " * 400, "雪が降る", "two\nlines"):
        sheet.add(frames_of(0, 1, 300, 500), prompt)
    sheet.save(tmp_path / "sheet.png")
    assert Image.open(tmp_path / "sheet.png").width < 6 * 270 + 40


def test_contact_sheet_of_nothing_writes_nothing(tmp_path):
    ContactSheet(fps=16).save(tmp_path / "sheet.png")
    assert not os.listdir(tmp_path)


def test_contact_sheet_where_one_cannot_write_is_told(tmp_path):
    sheet = ContactSheet(fps=16)
    sheet.add(frames_of(0, 1), "one")
    with pytest.raises(UserError, match="it is a folder"):
        sheet.save(tmp_path)


def test_clock():
    assert [clock(s) for s in (0, 9.5, 62, 3600, 86399.96)] == [
        "0:00",
        "0:09.5",
        "1:02",
        "1:00:00",
        "24:00:00",
    ]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_bar_on_a_terminal():
    terminal = Terminal()
    with ProgressBar(16, 32, file=terminal) as bar:
        bar.update(16, "a red ball " * 10)
        bar._bar.refresh()
        bar.update(16, "a blue ball")
    shown = terminal.getvalue()
    assert " 50%|" in shown and "0:01/0:02" in shown and "a red ball a red ball" in shown and "…" in shown
    assert "100%|" in shown and "0:02/0:02" in shown and "a blue ball" in shown
    assert " fps  " in shown and "x real time" in shown


def test_progress_in_a_log_is_plain_lines():
    log = io.StringIO()
    with ProgressBar(16, None, file=log, seconds_between_lines=0.0) as bar:
        for _ in range(3):
            bar.update(16, "a red\nball")
    lines = log.getvalue().splitlines()
    assert len(lines) == 4 and lines[1].startswith("0:02  ") and lines[1].endswith("real time  a red ball")
    assert "\r" not in log.getvalue() and "\x1b" not in log.getvalue()


def test_progress_in_a_log_is_rare():
    log = io.StringIO()
    with ProgressBar(16, 16000, file=log) as bar:
        for _ in range(1000):
            bar.update(16, "a red ball")
        assert log.getvalue() == ""
    assert log.getvalue().count("\n") == 1 and "16:40/16:40" in log.getvalue()


def test_progress_can_be_silent():
    for file in (io.StringIO(), Terminal()):
        with ProgressBar(16, 32, file=file, disable=True) as bar:
            bar.update(32, "a red ball")
        assert file.getvalue() == ""
