"""Clips of the world for the published chain: where they begin, what they are told, where the loss looks."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch

from streamvid.errors import UserError
from streamvid.training import world_clips
from streamvid.training.datasets import ClipShards
from streamvid.world.prompts import parse
from streamvid.world.render import render_clip
from streamvid.world.scene import Scene, is_held_out, sample_scene, sample_scenery


def scene_of(prompt: str) -> Scene:
    return Scene(**{"weather": "clear", **parse(prompt)})


def test_a_start_is_the_beginning_of_a_stream():
    shots, _, first, prompt = world_clips.draw_clip(np.random.default_rng(0), "starts", switch_share=1.0)
    assert first == 0 and shots == [(0, scene_of(prompt))]


def test_a_later_clip_begins_with_the_last_picture_of_the_overlap():
    """As `ClipStart.still` makes it: latent frame f ends with pixel 4 f, and a chunk of a stream follows three frames on."""
    switched = 0
    for seed in range(40):
        shots, _, first, prompt = world_clips.draw_clip(np.random.default_rng(seed), "later", 0.4)
        frame = first // 4  # whose last picture the clip begins with
        assert first % 4 == 0 and frame % 3 == 0 and 0 < frame <= 3 * world_clips.LAST_BLOCK
        chunk = 4 * (frame + 2) + 1  # the first pixel of latent frame + 3
        assert shots[-1][1] == scene_of(prompt)
        if len(shots) == 2:
            switched += 1
            assert (
                shots[1][0] == chunk
                and 1
                <= sum(a != b for a, b in zip(shots[0][1].labels(), shots[1][1].labels(), strict=True))
                <= 2
            )
    assert 8 <= switched <= 24


def test_weights_lie_on_the_subject():
    rng = np.random.default_rng(1)
    scene, scenery = sample_scene(rng), sample_scenery(rng)
    weights = world_clips.subject_weights([(0, scene)], scenery, 9, 0, 8).float()
    assert weights.shape == (3, 16, 16) and weights.min() == pytest.approx(0.4, abs=1e-3)
    assert 1.5 < weights.max() <= 4.001
    differs = np.abs(
        render_clip([(0, scene)], scenery, 1).astype(int)
        - render_clip([(0, scene)], scenery, 1, subject=False).astype(int)
    )
    places = torch.from_numpy(differs.max(-1)[0]).unflatten(0, (16, 8)).unflatten(2, (16, 8)).amax((1, 3)) > 0
    assert torch.equal(weights[0] > 0.4003, places) and 3 < int(places.sum()) < 100


def test_prompts_of_streams_change_and_show_nothing_held_out():
    rows = world_clips.draw_prompts(30, seed=0)
    for row in rows:
        scenes = [scene_of(prompt) for prompt in row]
        assert len(row) == 3 and not any(map(is_held_out, scenes))
        for one, other in pairwise(scenes):
            assert 1 <= sum(a != b for a, b in zip(one.labels(), other.labels(), strict=True)) <= 2
    assert rows == world_clips.draw_prompts(30, seed=0) != world_clips.draw_prompts(30, seed=1)


@pytest.fixture
def quick(monkeypatch):
    """No VAE: latents are the first pixel of each latent frame."""
    from diffusers import AutoencoderKLWan

    config = {"temperal_downsample": [True, True], "patch_size": 2, "z_dim": 2}
    monkeypatch.setattr(AutoencoderKLWan, "load_config", classmethod(lambda cls, folder: config))
    monkeypatch.setattr(AutoencoderKLWan, "from_pretrained", classmethod(lambda cls, folder, dtype: None))
    monkeypatch.setattr(world_clips, "channels_last", lambda vae: vae)
    made = []

    def encode(vae, frames):
        made.append(len(frames))
        return torch.full(((len(frames) + 3) // 4, 2, 16, 16), float(frames[0, 0, 0, 0])).half()

    monkeypatch.setattr(world_clips, "encode_frames", encode)
    return made


def test_shards_of_both_kinds_and_a_killed_job_goes_on(quick, tmp_path):
    arguments = {
        "vae": "x",
        "output": str(tmp_path),
        "starts": 2,
        "later": 1,
        "clips_per_shard": 2,
        "frames": 3,
    }
    world_clips.make_world_clips(**arguments, prompts=4)
    starts, later = ClipShards(tmp_path / "starts"), ClipShards(tmp_path / "later")
    assert (len(starts), len(later)) == (4, 2) and starts.shape == (3, 2, 16, 16)
    assert quick == [9] * 6 and starts.weights([0, 3]).shape == (2, 1, 3, 16, 16)
    both = ClipShards([tmp_path / "starts", tmp_path / "later"])
    assert both.prompts == starts.prompts + later.prompts
    assert torch.equal(both.batch([4])[0], later.batch([0])[0])
    assert len((tmp_path / "prompts.jsonl").read_text().splitlines()) == 4
    before = starts.batch([2, 3])[0]
    manifest = json.loads((tmp_path / "starts" / "manifest.json").read_text())
    del manifest["shards"]["clips_00001"]  # killed before it was listed
    (tmp_path / "starts" / "manifest.json").write_text(json.dumps(manifest))
    world_clips.make_world_clips(**arguments, prompts=4)
    assert len(quick) == 8 and torch.equal(ClipShards(tmp_path / "starts").batch([2, 3])[0], before)
    with pytest.raises(UserError, match=r"stage.frames = 4 must be a multiple of 3"):
        world_clips.make_world_clips(**{**arguments, "frames": 4})
