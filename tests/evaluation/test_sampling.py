"""Sampling and preprocessing against recorded values of the official code."""

import re

import numpy as np
import pytest
import torch
from reference import METRICS, NAMES, SCORING, clip

from streamvid.evaluation.flow import (
    dynamic_interval,
    dynamic_threshold,
    dynamic_votes,
    static_threshold,
    static_votes,
)
from streamvid.evaluation.sampling import (
    for_clip,
    for_dino,
    for_musiq,
    frames_per_second,
    middle_frames,
    musiq_size,
    prompt_of_name,
)


@pytest.mark.parametrize(("key", "expected"), METRICS["get_frame_indices"].items())
def test_sampled_frames(key, expected):
    if match := re.fullmatch(r"middle_num(\d+)_len(\d+)", key):
        assert middle_frames(int(match[1]), int(match[2])) == expected
    else:
        match = re.fullmatch(r"fps([\d.]+)_len(\d+)_fps([\d.]+)", key)
        assert frames_per_second(float(match[1]), int(match[2]), float(match[3])) == expected


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("key", "prepare"), [("clip_transform_224", for_clip), ("dino_transform_224", for_dino)]
)
def test_preprocessing(name, key, prepare):
    recorded = METRICS["preprocess"][name][key]
    images = prepare(clip(name))
    assert list(images.shape) == recorded["shape"]
    seen = [images.mean(), images.std(), images.min(), images.max()]
    assert [float(v) for v in seen] == pytest.approx(
        [recorded[name] for name in ("mean", "std", "min", "max")], abs=1e-5
    )
    probe = [images[0, 0, 5, 7], images[-1, 2, 100, 200], images[1, 1, -3, -4]]
    assert [float(v) for v in probe] == pytest.approx(recorded["probe"], abs=1e-5)


@pytest.mark.parametrize(("key", "expected"), METRICS["imaging_quality_transform_shapes"].items())
def test_musiq_sizes(key, expected):
    mode, height, width = re.fullmatch(r"(\w+)_(\d+)x(\d+)", key).groups()
    noise = torch.from_numpy(np.full((1, int(height), int(width), 3), 127.5, np.float32))
    assert list(for_musiq(noise.numpy(), mode).shape[-2:]) == expected[0]
    if mode != "shorter_centercrop":
        assert list(musiq_size(int(height), int(width), mode)) == expected[0]


@pytest.mark.parametrize(("key", "expected"), METRICS["flow_threshold_params"].items())
def test_thresholds_of_flow(key, expected):
    height, width, frames = map(int, re.fullmatch(r"(\d+)x(\d+)_n(\d+)", key).groups())
    assert dynamic_threshold(height, width) == expected["dynamic_degree"]["thres"]
    assert dynamic_votes(frames) == expected["dynamic_degree"]["count_num"]
    assert static_threshold(height, width) == expected["static_filter"]["thres"]
    assert static_votes(frames) == expected["static_filter"]["count_num"]


def test_intervals_of_dynamic_degree():
    for fps, interval in METRICS["dynamic_degree_interval_by_fps"].items():
        assert dynamic_interval(float(fps)) == interval


def test_prompts_of_file_names():
    for name, prompt in METRICS["get_prompt_from_filename"].items():
        assert prompt_of_name(name) == prompt
    assert SCORING
