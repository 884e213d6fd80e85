"""The quality dimensions against values of the official code (networks replaced by stand-ins on both sides)."""

import hashlib
from dataclasses import replace

import cv2
import numpy as np
import pytest
from reference import METRICS, NAMES, OFFICIAL, clip, stand_ins

from streamvid.evaluation.engine import measure
from streamvid.evaluation.registry import resolve
from streamvid.evaluation.results import aggregate
from streamvid.evaluation.sources import ArraySource
from streamvid.evaluation.types import Video


def outcomes(metric, fps=16.0, **options):
    """Of the five clips, in order."""
    requests = resolve([{"name": metric, **options}])
    found = []
    for name in NAMES:
        video = Video(id=name, path=f"{name}.mp4")
        found.append(measure(video, ArraySource(clip(name), fps), requests, stand_ins())[metric][0])
    assert all(outcome.status == "ok" for outcome in found), found
    return found


def scores(metric, **options):
    return [outcome.score for outcome in outcomes(metric, **options)]


@pytest.mark.parametrize("name", NAMES)
def test_clips_are_the_recorded_ones(name):
    assert hashlib.sha256(clip(name).tobytes()).hexdigest() == OFFICIAL["clips"][name]["sha256_of_raw_bytes"]


def test_temporal_flickering():
    recorded = METRICS["temporal_flickering"]["lossless"]
    found = outcomes("vbench.temporal_flickering")
    for name, outcome in zip(NAMES, found, strict=True):
        assert outcome.score == pytest.approx(recorded["per_video"][name], abs=1e-8)
        assert outcome.series["per_pair"] == pytest.approx(recorded["mae_seq"][name], abs=1e-4)
    mean = aggregate("vbench.temporal_flickering", found).value
    assert mean == pytest.approx(recorded["aggregate"], abs=1e-8)


@pytest.mark.parametrize(
    ("metric", "key", "tolerance"),
    [
        ("subject_consistency", "subject_consistency_stub_grid8", 1e-5),
        ("background_consistency", "background_consistency_stub_grid8", 1e-5),
        ("aesthetic_quality", "aesthetic_quality_stub", 1e-5),
        ("motion_smoothness", "motion_smoothness_stub_blend", 1e-6),
    ],
)
def test_dimensions_around_stand_ins(metric, key, tolerance):
    found = outcomes(f"vbench.{metric}")
    recorded = METRICS[key]
    for name, outcome in zip(NAMES, found, strict=True):
        assert outcome.score == pytest.approx(recorded["per_video"][name], abs=tolerance)
    assert aggregate(f"vbench.{metric}", found).value == pytest.approx(recorded["aggregate"], abs=tolerance)


@pytest.mark.parametrize(
    ("metric", "by_frames", "by_videos"),
    [("subject_consistency", 0.755872, 0.765955), ("background_consistency", 0.747029, 0.756332)],
)
def test_frames_weigh_equally_and_videos_would_not(metric, by_frames, by_videos):
    found = outcomes(f"vbench.{metric}")
    assert aggregate(f"vbench.{metric}", found).value == pytest.approx(by_frames, abs=1e-5)
    same = [replace(outcome, weight=1.0) for outcome in found]
    assert aggregate(f"vbench.{metric}", same).value == pytest.approx(by_videos, abs=1e-5)


def test_imaging_quality():
    recorded = METRICS["imaging_quality_stub_laplacian"]["longer"]
    found = outcomes("vbench.imaging_quality")
    for name, outcome in zip(NAMES, found, strict=True):
        assert 100 * outcome.score == pytest.approx(recorded["per_video"][name], abs=1e-4)
    assert aggregate("vbench.imaging_quality", found).value == pytest.approx(recorded["aggregate"], abs=1e-6)


def test_dynamic_degree_votes():
    recorded = METRICS["dynamic_degree_stub_dis_medium"]
    for name, outcome in zip(NAMES, outcomes("vbench.dynamic_degree"), strict=True):
        assert bool(outcome.score) == recorded[name]["dynamic"]
        assert outcome.details["threshold"] == recorded[name]["thres"]
        assert outcome.details["votes"] == recorded[name]["count_num"]
        assert outcome.details["frames"] == recorded[name]["frames_used"]
        assert len(outcome.series["top5"]) == len(recorded[name]["top5pct_mean_flow"])
        # flow depends on the version of OpenCV; its size does not much
        assert np.mean(outcome.series["top5"]) == pytest.approx(
            np.mean(recorded[name]["top5pct_mean_flow"]), rel=0.1, abs=0.05
        )
        if cv2.__version__.startswith("4.11."):
            assert outcome.series["top5"] == pytest.approx(recorded[name]["top5pct_mean_flow"], abs=1e-3)


def test_static_filter():
    requests = resolve([{"name": "vbench.temporal_flickering", "static_filter": "dis"}])
    for name in NAMES:
        source = ArraySource(clip(name), 16.0)
        outcome, _ = measure(Video(id=name, path=name), source, requests, stand_ins())[
            "vbench.temporal_flickering"
        ]
        assert (outcome.status == "ok") == METRICS["static_filter_stub_dis_medium"][name]["static"]


def test_the_frame_rate_decides_which_frames_are_looked_at():
    assert outcomes("vbench.dynamic_degree", fps=8.0)[0].details["frames"] == 33
    assert outcomes("vbench.dynamic_degree", fps=24.0)[0].details["frames"] == 11


def test_the_size_rule_of_musiq_is_an_option():
    big = np.random.default_rng(0).integers(0, 255, (1, 300, 1024, 3)).astype(np.uint8)
    found = {
        mode: measure(
            Video(id="v", path="v"),
            ArraySource(big, 16.0),
            resolve([{"name": "vbench.imaging_quality", "mode": mode}]),
            stand_ins(),
        )["vbench.imaging_quality"][0].score
        for mode in ("longer", "None")
    }
    assert found["longer"] != found["None"]


def test_a_dimension_skips_prompts_of_others_and_short_videos():
    requests = resolve(["vbench.temporal_flickering", "vbench.motion_smoothness"])
    video = Video(id="v", path="v", dimensions=("color",))
    told = measure(video, ArraySource(clip("c_pan"), 16.0), requests, stand_ins())
    assert all(o.status == "skipped" and "color" in o.reason and o.score is None for o, _ in told.values())
    told = measure(Video(id="v", path="v"), ArraySource(clip("c_pan")[:1], 16.0), requests, stand_ins())
    assert all(o.status == "skipped" and "fewer than" in o.reason for o, _ in told.values())
