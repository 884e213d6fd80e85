"""Runs: resume, what is computed again, several processes, bad videos. The real command on real files."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import cv2
import numpy as np
import pytest
from reference import NAMES, clip

from streamvid.cli import main
from streamvid.evaluation.backbones import Backbones
from streamvid.evaluation.evaluate import evaluate
from streamvid.evaluation.manifest import find_videos
from streamvid.evaluation.produce import ArchiveWriter
from streamvid.evaluation.registry import resolve
from streamvid.evaluation.run import Evaluation, assigned, read_shards
from streamvid.evaluation.sources import FileSource, open_source
from streamvid.evaluation.types import Segment, Video

METRICS = "vbench.temporal_flickering,drift.luma,long.freeze,vbench.subject_consistency"
SETTINGS = {"protocol": None, "model": None, "method": None, "deviations": [], "primary": []}


def write(path, frames, fps=16):
    writer = ArchiveWriter(path, fps, *frames.shape[1:3])
    writer.write(frames)
    writer.close()


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    for name in NAMES:
        write(folder / f"{name}-0.mp4", clip(name))
    return folder


def command(*arguments, **environment):
    return [sys.executable, "-m", "streamvid.cli", "eval", *map(str, arguments)], {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        **environment,
    }


@pytest.mark.parametrize("name", NAMES)
def test_archives_keep_every_bit(videos, name):
    source = FileSource(videos / f"{name}-0.mp4")
    assert np.array_equal(np.stack(list(source.frames())), clip(name))
    assert source.measure.fps == 16 and source.measure.frames == len(clip(name))


def test_score_resumes_and_computes_only_what_is_new(videos, tmp_path):
    requests, found = resolve(METRICS.split(",")), find_videos([videos], [])
    evaluation = Evaluation(tmp_path, found, requests, Backbones(tmp_path / "none"), quiet=True)
    evaluation.run()
    assert len(evaluation.computed) == 4 * len(NAMES)
    again = replace(evaluation, computed=[])
    again.run()
    assert again.computed == []
    more = replace(evaluation, requests=resolve([*METRICS.split(","), "long.loop"]), computed=[])
    more.run()
    assert {metric for _, metric in more.computed} == {"long.loop"} and len(more.computed) == len(NAMES)
    other = replace(
        evaluation, requests=resolve([{"name": "drift.luma", "definition": "slope"}]), computed=[]
    )
    other.run()
    assert len(other.computed) == len(NAMES)
    changed = [replace(found[0], segments=(Segment(0, 10, "a"), Segment(10, 33, "b"))), *found[1:]]
    facts = replace(evaluation, videos=changed, computed=[])
    facts.run()
    assert {video for video, _ in facts.computed} == {found[0].id}


def test_a_torn_line_is_told_and_computed_again(videos, tmp_path):
    requests, found = resolve(["drift.luma"]), find_videos([videos], [])
    first = evaluate(tmp_path, found, requests, SETTINGS, quiet=True)
    shard = tmp_path / "shards" / "rank0.jsonl"
    lines = shard.read_text().splitlines(keepends=True)
    shard.write_text("".join(lines[:-1]) + lines[-1][: len(lines[-1]) // 2])
    assert len(read_shards(tmp_path).problems) == 1
    evaluation = Evaluation(tmp_path, found, requests, Backbones(), quiet=True)
    evaluation.run()
    assert len(evaluation.computed) == 1
    second = evaluate(tmp_path, found, requests, SETTINGS, quiet=True)
    assert second["metrics"] == first["metrics"] and "cannot be read" in second["problems"][0]


def test_a_replaced_file_is_measured_again(videos, tmp_path):
    write(tmp_path / "v-0.mp4", clip("a_static"))
    requests = resolve(["long.freeze"])
    run = tmp_path / "run"
    first = evaluate(run, find_videos([tmp_path / "v-0.mp4"], []), requests, SETTINGS, quiet=True)
    write(tmp_path / "v-0.mp4", clip("c_pan"))
    second = evaluate(run, find_videos([tmp_path / "v-0.mp4"], []), requests, SETTINGS, quiet=True)
    assert first["metrics"]["long.freeze"]["value"] == 1.0
    assert second["metrics"]["long.freeze"]["value"] == 0.0


def test_one_and_two_processes_give_the_same_bytes(videos, tmp_path):
    for count in (1, 2):
        arguments = ("score", videos, "-o", tmp_path / str(count), "--metrics", METRICS, "--processes", count)
        line, environment = command(*arguments, "--quiet")
        subprocess.run(line, env=environment, check=True, capture_output=True, timeout=300)
    for name in ("results.json", "series.json", "scores.json", "per_video.csv", "per_second.csv"):
        one, two = ((tmp_path / str(count) / name).read_bytes() for count in (1, 2))
        assert one == two and len(one) > 0
    assert len(list((tmp_path / "2" / "shards").iterdir())) == 2


def test_killed_and_resumed_gives_the_same_and_computes_the_rest_only(videos, tmp_path):
    line, environment = command("score", videos, "-o", tmp_path / "whole", "--metrics", "long.*", "--quiet")
    subprocess.run(line, env=environment, check=True, capture_output=True, timeout=300)
    line[line.index(str(tmp_path / "whole"))] = str(tmp_path / "killed")
    process = subprocess.Popen(line, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    shard = tmp_path / "killed" / "shards" / "rank0.jsonl"
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        if shard.is_file() and shard.read_text().count('"metric"') >= 1:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.002)
    process.wait()
    before = read_shards(tmp_path / "killed").records
    assert before
    subprocess.run(line, env=environment, check=True, capture_output=True, timeout=300)
    written = [json.loads(text) for text in shard.read_text().splitlines() if '"key"' in text]
    keys = [record["key"] for record in written]
    assert len(keys) == len(set(keys)) and set(before) <= set(keys)
    for name in ("results.json", "series.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()


def test_missing_weights_skip_with_a_reason_and_leave_no_total(videos, tmp_path):
    found = find_videos([videos], [])
    results = evaluate(
        tmp_path, found, resolve(["vbench.*"]), SETTINGS, weights=str(tmp_path / "none"), quiet=True
    )
    entry = results["metrics"]["vbench.subject_consistency"]
    assert entry["value"] is None and entry["used"] == 0
    assert "facebook/dino-vitb16" in next(iter(entry["without_value"]))
    assert results["scores"]["vbench"]["total"]["value"] is None
    assert "subject_consistency" in results["scores"]["vbench"]["missing"]
    assert results["metrics"]["vbench.temporal_flickering"]["value"] == pytest.approx(
        0.9544807426602233, abs=1e-8
    )


def test_bad_videos_are_one_line_each_and_the_run_goes_on(videos, tmp_path, capsys):
    folder = tmp_path / "bad"
    folder.mkdir()
    write(folder / "good-0.mp4", clip("d_drift"))
    write(folder / "one_frame-0.mp4", clip("c_pan")[:1])
    (folder / "empty-0.mp4").write_bytes(b"")
    (folder / "noise-0.mp4").write_bytes(bytes(range(256)) * 20)
    whole = (folder / "good-0.mp4").read_bytes()
    (folder / "torn-0.mp4").write_bytes(whole[: len(whole) // 2])
    sound = ["-f", "lavfi", "-i", "sine=duration=1", "-c:a", "aac", str(folder / "sound-0.mp4")]
    from streamvid.io.ffmpeg import ffmpeg_binary

    subprocess.run([ffmpeg_binary(), "-v", "error", *sound], check=True)
    frames = folder / "sizes"
    frames.mkdir()
    for number, height in enumerate((32, 32, 48)):
        cv2.imwrite(str(frames / f"{number}.png"), np.zeros((height, 64, 3), np.uint8))
    arguments = ["eval", "score", str(folder), "-o", str(tmp_path / "run"), "--metrics", METRICS]
    assert main([*arguments, "--quiet"]) == 0
    problems = json.loads((tmp_path / "run" / "results.json").read_text())["problems"]
    expected = {
        "empty-0": "empty",
        "noise-0": "no video",
        "torn-0": "",
        "sound-0": "sound but no picture",
        "sizes": "frame 2 is 64 x 48 px",
    }
    for name, reason in expected.items():
        lines = [line for line in problems if line.startswith(f"{name}:")]
        assert len(lines) == 1 and reason in lines[0] and "\n" not in lines[0], problems
    assert not any(line.startswith(("good-0", "one_frame-0")) for line in problems)
    told = json.loads((tmp_path / "run" / "results.json").read_text())["metrics"][
        "vbench.temporal_flickering"
    ]
    assert told["used"] == 1 and "skipped: it has fewer than two frames" in told["without_value"]
    assert "empty-0: the file is empty" in (tmp_path / "run" / "report.html").read_text()
    assert main([*arguments, "--quiet", "--strict"]) == 1
    assert (
        main(["eval", "score", str(folder / "good-0.mp4"), "-o", str(tmp_path / "ok"), "--quiet", "--strict"])
        == 0
    )


def test_manifests_that_do_not_fit(videos, tmp_path):
    from streamvid.evaluation.manifest import write_manifest

    write(tmp_path / "v-0.mp4", clip("d_drift"))
    write(tmp_path / "stray-0.mp4", clip("d_drift"))
    fits = Video("v-0", str(tmp_path / "v-0.mp4"), "v", fps=16.0)
    cases = {
        "tells of 50 frames": replace(fits, segments=(Segment(0, 50, "a"),)),
        "do not join": replace(fits, segments=(Segment(0, 10, "a"), Segment(12, 40, "b"))),
        "chunk border at frame 45": replace(fits, borders=(12, 45)),
        "says 24 frames per second": replace(fits, fps=24.0),
        "there is no such file": replace(fits, path=str(tmp_path / "gone.mp4")),
    }
    for number, (reason, video) in enumerate(cases.items()):
        write_manifest(tmp_path / "manifest.jsonl", [video])
        problems = []
        found = find_videos([tmp_path], problems)
        assert any("stray-0.mp4: is not in manifest.jsonl" in line for line in problems)
        results = evaluate(tmp_path / f"run{number}", found, resolve(["long.freeze"]), SETTINGS, quiet=True)
        assert [reason in line for line in results["problems"]] == [True], results["problems"]
    (tmp_path / "manifest.jsonl").write_text('{"id": "v-0"}\nnonsense\n')
    problems = []
    assert find_videos([tmp_path], problems) == [] and len([p for p in problems if "is no video" in p]) == 2


def test_names_that_vbench_would_misread(videos, tmp_path, capsys):
    write(tmp_path / "my_clip-0.mp4", clip("c_pan"))
    write(tmp_path / "take-2024-01-02.mp4", clip("c_pan"))
    arguments = ["eval", "score", str(tmp_path), "-o", str(tmp_path / "run"), "--quiet"]
    main([*arguments, "--metrics", "vbench_long.temporal_flickering"])
    problems = json.loads((tmp_path / "run" / "results.json").read_text())["problems"]
    assert any("my_clip-0" in line and "'_'" in line for line in problems)
    assert any("take-2024-01-02" in line and "sample's number" in line for line in problems)
    main([*arguments, "--metrics", "long.freeze"])
    assert json.loads((tmp_path / "run" / "results.json").read_text())["problems"] == []


def test_work_is_shared_evenly_and_completely():
    videos = [Video(f"v{i}", "") for i in range(20)]
    costs = [float(1 + i % 7) for i in range(20)]
    for ranks in (1, 2, 3):
        parts = [assigned(videos, costs, rank, ranks) for rank in range(ranks)]
        assert sorted(v.id for part in parts for v in part) == sorted(v.id for v in videos)
        loads = [sum(costs[int(v.id[1:])] for v in part) for part in parts]
        assert max(loads) - min(loads) <= max(costs)


def test_folders_of_frames_are_videos(tmp_path):
    for number, frame in enumerate(clip("c_pan")[:20]):
        cv2.imwrite(str(tmp_path / f"{number:04d}.png"), frame[..., ::-1])
    source = open_source(tmp_path, fps=8.0)
    assert np.array_equal(np.stack(list(source.frames())), clip("c_pan")[:20]) and source.measure.fps == 8.0
