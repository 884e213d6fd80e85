"""Runs: resume, what is computed again, several processes, bad videos. The real command on real files."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import cv2
import imageio_ffmpeg
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
    frames = imageio_ffmpeg.read_frames(str(source.path), pix_fmt="rgb24")
    assert next(frames)["size"] == (96, 64)
    assert b"".join(frames) == clip(name).tobytes()


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
    def arguments(count: str) -> list[str]:
        options = ["--metrics", METRICS, "--processes", count, "--quiet"]
        return ["score", str(videos), "-o", str(tmp_path / count), *options]

    assert main(["eval", *arguments("1")]) == 0
    line, environment = command(*arguments("2"))
    subprocess.run(line, env=environment, check=True, capture_output=True, timeout=300)
    for name in ("results.json", "series.json", "scores.json", "per_video.csv", "per_second.csv"):
        one, two = ((tmp_path / count / name).read_bytes() for count in "12")
        assert one == two and len(one) > 0
    assert len(list((tmp_path / "2" / "shards").iterdir())) == 2


def test_killed_and_resumed_gives_the_same_and_computes_the_rest_only(videos, tmp_path):
    def arguments(folder: str) -> list[str]:
        return ["score", str(videos), "-o", str(tmp_path / folder), "--metrics", "long.*", "--quiet"]

    assert main(["eval", *arguments("whole")]) == 0
    line, environment = command(*arguments("killed"))
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
    assert main(["eval", *arguments("killed")]) == 0
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
