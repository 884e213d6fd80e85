"""Bad videos through the command: one line each in the report, the run goes on, and --strict fails it."""

import json
import subprocess
from dataclasses import replace

import cv2
import numpy as np
import pytest
from reference import clip
from test_eval_run import write

from streamvid.cli import main
from streamvid.evaluation.manifest import write_manifest
from streamvid.evaluation.types import Segment, Video
from streamvid.io.ffmpeg import ffmpeg_binary

METRICS = "vbench.temporal_flickering,long.freeze"


def ffmpeg(*arguments):
    subprocess.run([ffmpeg_binary(), "-v", "error", "-y", *map(str, arguments)], check=True)


def two_sizes(path):
    """One file whose pictures grow in the middle; ffmpeg and OpenCV scale them without a word."""
    parts = []
    for size in ("64x48", "96x64"):
        part = path.with_name(f"{size}.ts")
        source = f"testsrc=size={size}:rate=16:duration=1"
        ffmpeg("-f", "lavfi", "-i", source, "-c:v", "libx264", "-pix_fmt", "yuv420p", part)
        parts.append(part.read_bytes())
        part.unlink()
    path.write_bytes(b"".join(parts))


def torn(path):
    write(path, clip("d_drift"))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def pictures_of_sizes(folder):
    folder.mkdir()
    for number, height in enumerate((32, 32, 48)):
        cv2.imwrite(str(folder / f"{number}.png"), np.zeros((height, 64, 3), np.uint8))


# name: how it is made, and what the report says of it
BAD = {
    "empty-0.mp4": (lambda path: path.write_bytes(b""), "the file is empty"),
    "noise-0.mp4": (lambda path: path.write_bytes(bytes(range(256)) * 20), "it is no video that can be read"),
    "torn-0.mp4": (torn, ""),
    "one_frame-0.mp4": (lambda path: write(path, clip("c_pan")[:1]), "it has one frame"),
    "two_sizes-0.mp4": (two_sizes, "its pictures change from 64x48 to 96x64 px"),
    "sizes": (pictures_of_sizes, "frame 2 is 64 x 48 px and the first is 64 x 32"),
    "sound-0.mp4": (
        lambda path: ffmpeg("-f", "lavfi", "-i", "sine=duration=1", "-c:a", "aac", path),
        "it has sound but no picture",
    ),
}


def score(output, *videos, metrics=METRICS, options=()):
    """Exit code and problems of `streamvid eval score`."""
    command = [
        "eval",
        "score",
        *map(str, videos),
        "-o",
        str(output),
        "--metrics",
        metrics,
        "--quiet",
        *options,
    ]
    code = main(command)
    results = json.loads((output / "results.json").read_text())
    report = (output / "report.html").read_text()
    assert all(line.split(":")[0] in report for line in results["problems"])
    return code, results


def test_bad_videos_are_one_line_each_and_the_run_goes_on(tmp_path, capsys):
    folder = tmp_path / "videos"
    folder.mkdir()
    write(folder / "good-0.mp4", clip("d_drift"))
    for name, (make, _) in BAD.items():
        make(folder / name)
    code, results = score(tmp_path / "run", folder)
    assert code == 0 and len(results["problems"]) == len(BAD), results["problems"]
    for name, (_, reason) in BAD.items():
        lines = [line for line in results["problems"] if line.startswith(f"{name.split('.')[0]}:")]
        assert len(lines) == 1 and reason in lines[0] and "\n" not in lines[0], (name, results["problems"])
    told = results["metrics"]["vbench.temporal_flickering"]
    assert (told["used"], told["of"]) == (1, 1 + len(BAD))
    assert f"{len(BAD)} problems:" in capsys.readouterr().err
    assert "Problems (7)" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize("name", BAD)
def test_strict_fails_for_each(name, tmp_path):
    BAD[name][0](tmp_path / name)
    assert score(tmp_path / "run", tmp_path / name, options=["--strict"])[0] == 1
    assert score(tmp_path / "run", tmp_path / name)[0] == 0


def test_strict_passes_what_is_good(tmp_path):
    write(tmp_path / "good-0.mp4", clip("d_drift"))
    code, results = score(tmp_path / "run", tmp_path / "good-0.mp4", options=["--strict"])
    assert code == 0 and results["problems"] == []


FITS = Video("v-0", "v-0.mp4", "v", fps=16.0)
MISFITS = {
    "tells of 50 frames": replace(FITS, segments=(Segment(0, 50, "a"),)),
    "do not join": replace(FITS, segments=(Segment(0, 10, "a"), Segment(12, 40, "b"))),
    "chunk border at frame 45": replace(FITS, borders=(12, 45)),
    "says 24 frames per second": replace(FITS, fps=24.0),
    "there is no such file": replace(FITS, path="gone.mp4"),
}


@pytest.mark.parametrize("reason", MISFITS)
def test_manifests_that_do_not_fit(reason, tmp_path):
    write(tmp_path / "v-0.mp4", clip("d_drift"))
    video = replace(MISFITS[reason], path=str(tmp_path / MISFITS[reason].path))
    write_manifest(tmp_path / "manifest.jsonl", [video])
    code, results = score(tmp_path / "run", tmp_path, metrics="long.freeze", options=["--strict"])
    assert code == 1 and [line for line in results["problems"] if line.startswith("v-0:") and reason in line]
    assert score(tmp_path / "run", tmp_path, metrics="long.freeze")[0] == 0


def test_lines_of_a_manifest_that_are_none_and_files_that_it_does_not_list(tmp_path):
    write(tmp_path / "v-0.mp4", clip("d_drift"))
    write(tmp_path / "stray-0.mp4", clip("d_drift"))
    good = json.dumps({"id": "v-0", "path": "v-0.mp4"})
    (tmp_path / "manifest.jsonl").write_text(f'{good}\n{{"id": "w-0"}}\nnonsense\n{good}\n')
    code, results = score(tmp_path / "run", tmp_path, metrics="long.freeze", options=["--strict"])
    said = "\n".join(results["problems"])
    assert code == 1 and results["videos"] == 1 and len(results["problems"]) == 4
    assert said.count("is no video") == 2 and "v-0 is listed twice" in said
    assert "stray-0.mp4: is not in manifest.jsonl" in said
    assert (
        main(["eval", "score", str(tmp_path / "none"), "-o", str(tmp_path / "other")]) == 2
    )  # nothing at all


def test_names_that_vbench_would_misread(tmp_path):
    write(tmp_path / "my_clip-0.mp4", clip("c_pan"))
    write(tmp_path / "take-2024-01-02.mp4", clip("c_pan"))
    metrics = "vbench_long.temporal_flickering"
    code, results = score(tmp_path / "run", tmp_path, metrics=metrics, options=["--strict"])
    assert code == 1 and len(results["problems"]) == 2
    assert any("my_clip-0" in line and "'_'" in line for line in results["problems"])
    assert any("take-2024-01-02" in line and "sample's number" in line for line in results["problems"])
    assert results["metrics"][metrics]["used"] == 2  # they are measured all the same
    # without a dimension of VBench names do not matter
    assert score(tmp_path / "run", tmp_path, metrics="long.freeze", options=["--strict"])[0] == 0
