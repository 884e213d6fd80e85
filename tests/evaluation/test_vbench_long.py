"""VBench-Long against recorded values: clips, durations, mapping, fusion; and that windows on frames are clips."""

import json
from pathlib import Path

import numpy as np
import pytest
from reference import NAMES, SCORING, clip, stand_ins

from streamvid.evaluation.engine import measure
from streamvid.evaluation.metrics.vbench_long import clip_seconds, fused, mapped, split
from streamvid.evaluation.registry import resolve
from streamvid.evaluation.results import aggregate
from streamvid.evaluation.sources import ArraySource
from streamvid.evaluation.types import Video, ok

SUITE = Path(__file__).parents[2] / "configs" / "evaluation" / "suites" / "vbench.jsonl"


@pytest.mark.parametrize(("key", "expected"), SCORING["split_video_into_clips"].items())
def test_clips(key, expected):
    name, fps, seconds = key.rsplit("_", 2)
    found = split(len(clip(name)), float(fps[3:]), float(seconds[3:]))
    assert len(found) == len(expected)
    for (start, stop), row in zip(found, expected, strict=True):
        assert stop - start == row["frames"] and (name == "a_static" or start in row["start_candidates"])


@pytest.mark.parametrize(
    ("frames", "clips", "last"),
    [(81, 3, 49), (157, 5, 125), (477, 15, 445), (501, 16, 469), (957, 30, 925), (1005, 32, 973)],
)
def test_clips_of_published_lengths(frames, clips, last):
    found = split(frames, 16, 2.0)
    assert len(found) == clips and found[-1] == (last, frames)


def test_fractional_rates_count_as_their_integer_part():
    assert split(60, 23.976, 2.0) == [(0, 46), (14, 60)]


def test_durations_of_the_suite():
    prompts = {}
    for line in SUITE.read_text().splitlines():
        entry = json.loads(line)
        prompts.setdefault(entry["prompt"], []).append(entry["dimensions"])
    counted = {}
    for line in SUITE.read_text().splitlines():
        entry = json.loads(line)
        together = [name for dims in prompts[entry["prompt"]] for name in dims]
        key = f"{'+'.join(entry['dimensions'])}={clip_seconds('', together)}"
        counted[key] = counted.get(key, 0) + 1
    assert counted == SCORING["get_duration_from_json_mix"]


@pytest.mark.parametrize("dimension", ["subject_consistency", "background_consistency"])
def test_fusion(dimension):
    recorded = SCORING["fuse_inclip_clip2clip"][f"{dimension}_devTrue"]
    found = []
    for row in recorded["detail"]:
        raw = row["clip2clip_score"] or None
        if raw is not None:
            assert mapped(dimension, raw) == pytest.approx(row["mapped_clip2clip_score"], abs=1e-12)
        found.append(fused(dimension, row["inclip_score"], raw))
        assert found[-1] == pytest.approx(row["video_results"], abs=1e-12)
    assert np.mean(found) == pytest.approx(recorded["fused"], abs=1e-12)
    assert fused(dimension, 0.8, 0.0) == 0.8


@pytest.mark.parametrize("name", NAMES)
def test_windows_on_frames_are_clips(name):
    frames, metrics = (
        clip(name),
        ["temporal_flickering", "motion_smoothness", "dynamic_degree", "imaging_quality"],
    )
    requests = resolve([f"vbench_long.{metric}" for metric in metrics])
    found = measure(Video(id=name, path=name), ArraySource(frames, 8.0), requests, stand_ins())
    for metric in metrics:
        outcome, _ = found[f"vbench_long.{metric}"]
        alone = [
            measure(
                Video(id=name, path=name),
                ArraySource(frames[a:b], 8.0),
                resolve([f"vbench.{metric}"]),
                stand_ins(),
            )[f"vbench.{metric}"][0].score
            for a, b in split(len(frames), 8.0, 2.0)
        ]
        assert outcome.series["per_clip"] == pytest.approx(alone, abs=1e-12)
        assert outcome.score == pytest.approx(np.mean(alone), abs=1e-12) and outcome.weight == len(alone)


def test_clip_to_clip_looks_at_first_frames_only():
    frames = clip("d_drift")
    backbones = stand_ins(dinov2=stand_ins().get("dino"))
    requests = resolve(["vbench_long.subject_consistency", "long.subject_clip_to_clip"])
    found = measure(Video(id="v", path="v"), ArraySource(frames, 8.0), requests, backbones)
    firsts = frames[[0, 16, 24]]
    raw = measure(
        Video(id="v", path="v"), ArraySource(firsts, 8.0), resolve(["vbench.subject_consistency"]), backbones
    )["vbench.subject_consistency"][0].score
    fused_outcome = found["vbench_long.subject_consistency"][0]
    assert found["long.subject_clip_to_clip"][0].score == pytest.approx(raw, abs=1e-6)
    assert fused_outcome.details["clip_to_clip"] == pytest.approx(raw, abs=1e-6)
    in_clip = fused_outcome.details["in_clip"]
    assert fused_outcome.score == pytest.approx(
        0.5 * in_clip + 0.5 * mapped("subject_consistency", raw), abs=1e-6
    )


def test_one_clip_has_no_clip_to_clip():
    backbones = stand_ins(dinov2=stand_ins().get("dino"))
    requests = resolve(["vbench_long.subject_consistency", "long.subject_clip_to_clip"])
    found = measure(Video(id="v", path="v"), ArraySource(clip("c_pan")[:20], 16.0), requests, backbones)
    assert found["vbench_long.subject_consistency"][0].details["clip_to_clip"] is None
    assert found["long.subject_clip_to_clip"][0].status == "skipped"


def test_clips_count_equally():
    """Officially values are grouped by clip: a video of two clips weighs twice as much as one of one."""
    recorded = SCORING["reorganize_clips_results"]
    videos = {}
    for row in recorded["input"]:
        videos.setdefault(Path(row["video_path"]).parent.name, []).append(row["video_results"])
    outcomes = [ok(np.mean(values), weight=len(values)) for values in videos.values()]
    assert sorted(map(len, videos.values())) == [1, 1, 1, 2]
    found = aggregate("vbench_long.temporal_flickering", outcomes).value
    assert found == pytest.approx(recorded["all_results"], abs=1e-12)
    assert SCORING["reorganize_imaging"]["all_results"] == 0.715  # of 71.5: ours are stored as 0..1
