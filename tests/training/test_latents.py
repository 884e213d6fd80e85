"""Clips encoded once: their layout, late ones and first blocks too, and that a killed run goes on."""

from itertools import pairwise

import numpy as np
import pytest
import tiny
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file, save_file

from streamvid.errors import UserError
from streamvid.training import latents
from streamvid.training.latents import BLOCKS, CLIP_FRAMES, FIRST_BLOCKS, encode_shards, load_clips
from streamvid.world.render import render_clip
from streamvid.world.sampling import block_start
from streamvid.world.scene import Scene, Scenery


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("vae")
    tiny.vae(residual=True).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def vae(vae_folder) -> AutoencoderKLWan:
    return AutoencoderKLWan.from_pretrained(vae_folder, dtype=torch.bfloat16)


OPTIONS = {"shards": 2, "first_block_shards": 1, "clips_per_shard": 2, "late_share": 0.5, "seed": 1}


@pytest.fixture(scope="module")
def shards(vae_folder, tmp_path_factory):
    """Two shards of two clips, half of them late, and one of two first blocks."""
    folder = tmp_path_factory.mktemp("latents")
    encode_shards(vae_folder, folder, **OPTIONS)
    return folder


def test_a_shard_holds_clips(shards):
    clips = load_clips(shards)
    assert len(clips) == 4 and clips.latents.shape == (4, 15, 16, 16, 16)
    assert clips.latents.dtype == torch.float16 and clips.latents.isfinite().all()
    assert clips.labels.shape == (4, 5, 7) and clips.scenery.shape == (4, 6)
    assert clips.late.dtype == torch.bool and 0 < clips.late.sum() < 4
    for labels, scenery in zip(clips.labels.tolist(), clips.scenery.tolist(), strict=True):
        assert [list(Scene.from_labels(scene).labels()) for scene in labels] == labels
        assert list(Scenery.from_cells(scenery).cells()) == scenery


def test_a_shard_of_first_blocks_holds_first_blocks(shards):
    first = load_clips(shards, FIRST_BLOCKS)
    assert len(first) == 2 and first.latents.shape == (2, 3, 16, 16, 16)
    assert first.latents.dtype == torch.float16 and first.latents.isfinite().all()
    assert first.labels.shape == (2, 1, 7) and first.scenery.shape == (2, 6)
    assert not first.scenery.is_floating_point() and not first.late.any()


class Spy:
    """Records what is rendered."""

    def __init__(self, monkeypatch):
        self.calls = []
        monkeypatch.setattr(latents, "render_clip", self)

    def __call__(self, shots, scenery, frames, first_frame=0):
        self.calls.append((shots, scenery, frames, first_frame))
        return render_clip(shots, scenery, frames, first_frame=first_frame)


def scene_of(shots, block: int) -> Scene:
    return [scene for start, scene in shots if start <= block_start(block)][-1]


@pytest.mark.parametrize("seed", range(3))
def test_a_clip_is_the_render_of_its_labels(seed, vae, monkeypatch):
    spy = Spy(monkeypatch)
    encoded, labels, scenery, late = latents._clip(vae, np.random.default_rng(seed))
    ((shots, drawn, frames, first),) = spy.calls
    assert (frames, first, late) == (CLIP_FRAMES, 0, False)
    assert torch.equal(encoded, latents.encode_frames(vae, render_clip(shots, drawn, CLIP_FRAMES)))
    assert labels == [scene_of(shots, block).labels() for block in range(BLOCKS)]
    assert Scenery.from_cells(scenery) == drawn


@pytest.mark.parametrize("seed", range(3))
def test_a_first_block_is_the_beginning_of_a_render(seed, vae, monkeypatch):
    spy = Spy(monkeypatch)
    encoded, labels, scenery, late = latents._clip(vae, np.random.default_rng(seed), blocks=1)
    ((shots, drawn, frames, first),) = spy.calls
    assert (frames, first, late, len(shots)) == (block_start(1), 0, False, 1)
    whole = render_clip(shots, drawn, CLIP_FRAMES)
    assert torch.equal(encoded, latents.encode_frames(vae, whole[: block_start(1)])) and len(encoded) == 3
    assert labels == [shots[0][1].labels()] and Scenery.from_cells(scenery) == drawn


@pytest.mark.parametrize("seed", range(3))
def test_a_late_clip_is_a_beginning_and_four_blocks_of_later(seed, vae, monkeypatch):
    spy = Spy(monkeypatch)
    encoded, labels, scenery, late = latents._late_clip(vae, np.random.default_rng(seed))
    (shots, drawn, frames, start), (first_shots, same, first_frames, zero) = spy.calls
    assert late and same == drawn and Scenery.from_cells(scenery) == drawn
    # block 0 is the encoding of the stream's beginning
    assert (first_shots, first_frames, zero) == (shots[:1], block_start(1), 0)
    assert torch.equal(encoded[:3], latents.encode_frames(vae, render_clip(shots[:1], drawn, 9)))
    # the others are blocks m .. m + 3; the block before them only warms the encoder up
    m = start // 12 + 1
    assert frames == CLIP_FRAMES and start + 9 == block_start(m) and 6 <= m <= 80
    segment = render_clip(shots, drawn, CLIP_FRAMES, first_frame=start)
    assert torch.equal(encoded[3:], latents.encode_frames(vae, segment)[3:])
    assert labels == [scene_of(shots, block).labels() for block in (0, m, m + 1, m + 2, m + 3)]


def draw_nothing(monkeypatch) -> None:
    """Empty latents, as many as the frames would give."""
    monkeypatch.setattr(latents, "render_clip", lambda shots, scenery, frames, **_: frames)
    monkeypatch.setattr(latents, "encode_frames", lambda vae, frames: torch.zeros((frames + 3) // 4, 1, 1, 1))


def test_late_clips_switch_in_the_past_or_where_it_is_seen(monkeypatch):
    draw_nothing(monkeypatch)
    kinds = set()
    for seed in range(60):
        _, labels, _, _ = latents._late_clip(None, np.random.default_rng(seed))
        changed = tuple(one != other for one, other in pairwise(labels))
        assert not changed[1]  # blocks m and m + 1 are in one shot
        kinds.add(changed)
    assert len(kinds) == 6  # gap changed or not, times: no switch, before m + 2, before m + 3


def test_finished_shards_are_not_encoded_again(shards, vae_folder, monkeypatch):
    before = {path.name: path.read_bytes() for path in shards.iterdir()}
    names = ["clips_0000", "clips_0001", "first_0000"]
    assert sorted(before) == [f"{name}.safetensors" for name in names]
    real = latents.encode_frames

    def never(*_):
        raise AssertionError("encoded again")

    monkeypatch.setattr(latents, "encode_frames", never)
    encode_shards(vae_folder, shards, **OPTIONS)
    monkeypatch.setattr(latents, "encode_frames", real)
    for name in names[1:]:
        (shards / f"{name}.safetensors").unlink()
        (shards / f"{name}.tmp").write_bytes(b"killed while it was written")
    assert len(load_clips(shards)) == 2
    with pytest.raises(UserError):
        load_clips(shards, FIRST_BLOCKS)
    encode_shards(vae_folder, shards, **OPTIONS)
    assert {path.name: path.read_bytes() for path in shards.iterdir()} == before


def test_processes_share_the_shards(shards, vae_folder, tmp_path, monkeypatch):
    """What a shard holds does not depend on who makes it."""
    made = []

    class Pool:
        def __init__(self, processes):
            assert processes == 2

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def starmap(self, function, jobs):
            for job in jobs:
                made.append(job[2])
                function(*job)

    monkeypatch.setattr(latents, "get_context", lambda kind: type("Context", (), {"Pool": Pool}))
    encode_shards(vae_folder, tmp_path, **OPTIONS, processes=2)
    assert made == [[("clips", 0), ("first", 0)], [("clips", 1)]]
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in shards.iterdir()}
    for path in shards.iterdir():
        one, other = load_file(path), load_file(tmp_path / path.name)
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_options_have_an_effect(vae_folder, tmp_path, monkeypatch):
    draw_nothing(monkeypatch)

    def clips(name, **options):
        plain = {"shards": 1, "first_block_shards": 1, "clips_per_shard": 20}
        encode_shards(vae_folder, tmp_path / name, **{**plain, **options})
        return load_clips(tmp_path / name)

    def first_blocks(name):
        return load_clips(tmp_path / name, FIRST_BLOCKS)

    plain = clips("plain")
    assert len(plain) == 20 and len(clips("more", shards=2, clips_per_shard=3)) == 6
    assert not torch.equal(plain.labels, clips("seed", seed=5).labels)
    assert len(first_blocks("plain")) == 20 and len(first_blocks("more")) == 3
    assert len(clips("first", first_block_shards=3)) == 20 and len(first_blocks("first")) == 60
    assert torch.equal(first_blocks("first").labels[:20], first_blocks("plain").labels)
    assert not torch.equal(first_blocks("seed").labels, first_blocks("plain").labels)
    distinct = {tuple(row) for row in first_blocks("first").labels.flatten(1).tolist()}
    assert len(distinct) > 55  # every shard draws anew
    assert clips("none", late_share=0.0).late.sum() == 0
    assert clips("all", late_share=1.0).late.all()
    assert 0 < plain.late.sum() < 12


@pytest.mark.parametrize("kind", ["clips", "first"])
def test_a_folder_without_shards_of_a_kind_is_refused(kind, tmp_path, vae_folder, monkeypatch):
    draw_nothing(monkeypatch)
    encode_shards(vae_folder, tmp_path, shards=int(kind != "clips"), first_block_shards=int(kind != "first"))
    assert len(load_clips(tmp_path, {"clips": "first", "first": "clips"}[kind])) == 100
    with pytest.raises(UserError, match=rf"latents = '.*' holds no shards of {kind}: run the stage of kind"):
        load_clips(tmp_path, kind)


@pytest.mark.parametrize("content", [b"x" * 200, b"", None])
def test_a_shard_that_is_damaged_is_named(content, tmp_path):
    """Rubbish, an empty file, and a file of other tensors."""
    path = tmp_path / "clips_0000.safetensors"
    if content is None:
        save_file({"fox": torch.zeros(1)}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"shard .*clips_0000.safetensors is damaged: delete it and run"):
        load_clips(tmp_path)
