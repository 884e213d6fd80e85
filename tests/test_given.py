"""Streams that go on from a given picture or clip: as if they had made it themselves."""

from itertools import islice

import imageio.v3 as imageio
import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from test_stream import Trap, same
from test_stream_methods import SMALL

from streamvid.ahead import decode_ahead
from streamvid.decoding import decode, decoder_state
from streamvid.errors import UserError
from streamvid.generate import generate
from streamvid.given import encode_frames, fill_blocks, frames_of
from streamvid.script import load_script

FOX, CAT = "a red fox walks", "the blue cat sleeps"
# not those whose window depends on noisy frames too: blocks in the making, and queries that choose tokens
METHODS = {
    name: changes for name, changes in SMALL.items() if name not in ("rolling_forcing", "deep_forcing")
}
METHODS |= {"longlive": {}, "krea": {}, "memrope": {}}
METHODS["longlive2_multishot"] = {"frames_per_block": 2, "window": 8, "sink": 2}


def pictures(frames: int, height: int = 32, width: int = 32) -> np.ndarray:
    return np.random.default_rng(frames).integers(0, 256, (frames, height, width, 3), np.uint8)


def start(prompt=FOX, **options):
    return tiny.pipeline().stream(prompt, **{"decode_pixels": False, **options})


@pytest.mark.parametrize("method", METHODS)
def test_a_stream_goes_on_from_its_own_frames(method):
    """The blocks of one stream, given to another with the same noise from there on, lead to the same blocks."""
    options = {"method": method, "overrides": METHODS[method]}
    first = start(seed=4, **options)
    made = [next(first).latents for _ in range(6)]
    noise = first.noise
    second = start(noise=lambda block, step, frames: noise(block + 6, step, frames), **options)
    second.begin_with(torch.cat(made, 2))
    assert second.cache.planner.slot_of == first.cache.planner.slot_of
    for block in range(3):
        one, other = next(first), next(second)
        torch.testing.assert_close(one.latents, other.latents, atol=1e-4, rtol=0)
        assert (other.index, one.attended) == (block, other.attended)


@pytest.mark.parametrize("method", ["rolling_forcing", "deep_forcing"])
def test_other_methods_go_on_from_a_clip_longer_than_their_window(method):
    clip = pictures(1 + 4 * 15)
    stream = start(method=method, overrides=SMALL[method], video=clip)
    chunks = list(islice(stream, 3))
    assert [chunk.index for chunk in chunks] == [0, 1, 2] and chunks[0].attended[-1] >= 17
    assert all(chunk.latents.isfinite().all() for chunk in chunks)
    other = next(start(method=method, overrides=SMALL[method], video=clip[::-1]))
    assert not torch.allclose(chunks[0].latents, other.latents, atol=1e-2)


def test_the_first_chunk_goes_on_where_the_clip_ends():
    """Pixels are the end of one decoding of the clip's latents and the stream's."""
    pipe, clip = tiny.pipeline(), pictures(21)
    stream = start(video=clip, decode_pixels=True)
    chunks = list(islice(stream, 2))
    given = encode_frames(pipe.vae, clip[None])
    assert torch.equal(stream.given, given) and given.shape[2] == 6
    latents = torch.cat([given, *(chunk.latents for chunk in chunks)], 2)
    with torch.no_grad():
        pixels = decode(pipe.vae, latents, decoder_state(pipe.vae))[0].permute(1, 2, 3, 0)
    expected = (pixels.add(1) * 127.5).round().byte().numpy()[21:]
    assert np.array_equal(np.concatenate([chunk.frames for chunk in chunks]), expected)
    assert [(c.index, c.first_frame, len(c.frames)) for c in chunks] == [(0, 0, 12), (1, 12, 12)]
    beside = decode_ahead(start(video=clip, blocks=2))
    assert all(np.array_equal(one.videos, other.videos) for one, other in zip(chunks, beside, strict=True))


def test_latents_are_those_of_the_encoder_however_long_the_clip():
    vae, clip = tiny.pipeline().vae, pictures(1 + 4 * 20)
    pixels = torch.from_numpy(clip).permute(3, 0, 1, 2)[None] / 127.5 - 1
    with torch.no_grad():
        mean = vae.encode(pixels).latent_dist.mode()
    shift, scale = (
        torch.tensor(v).view(1, -1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std)
    )
    torch.testing.assert_close(encode_frames(vae, clip[None]), (mean - shift) / scale, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("frames", "kept"), [(1, 1), (8, 8), (9, 9), (20, 9), (21, 21), (32, 21), (33, 33)])
def test_clips_fill_whole_blocks(frames, kept):
    clip = pictures(frames, 2, 2)
    filled = fill_blocks(clip, 3, 4)
    assert len(filled) % 12 == 9 and np.array_equal(filled[-kept:], clip[-kept:])
    assert (filled[: len(filled) - kept] == clip[0]).all()


def test_forms_of_a_picture_are_one_and_so_are_those_of_a_clip(tmp_path):
    clip = pictures(9)
    Image.fromarray(clip[0]).save(tmp_path / "it.png")
    pils = [Image.fromarray(frame) for frame in clip]
    tensors = torch.from_numpy(clip).permute(0, 3, 1, 2) / 255
    forms = (tmp_path / "it.png", str(tmp_path / "it.png"), pils[0], clip[0], clip[0] / 255, tensors[0])
    for image in forms:
        assert np.array_equal(frames_of("image", image, 32, 32), clip[:1])
    for video in (clip, pils, tensors, list(clip), clip.astype(np.float64) / 255):
        assert np.array_equal(frames_of("video", video, 32, 32), clip)
    imageio.imwrite(tmp_path / "it.mp4", pictures(9, 64, 64), fps=8, macro_block_size=16)
    assert frames_of("video", tmp_path / "it.mp4", 32, 32).shape == (9, 32, 32, 3)


def test_pictures_of_another_shape_are_cut_around_the_middle():
    wide = np.zeros((32, 96, 3), np.uint8)
    wide[:, 32:64] = 200
    assert (frames_of("image", wide, 32, 32) == 200).mean() > 0.9


def test_a_picture_changes_the_video_and_each_of_a_batch_has_its_own():
    one, other = (Image.fromarray(frame) for frame in pictures(2))
    latents = {
        name: next(start([FOX, FOX], seed=[1, 1], image=image)).latents
        for name, image in (("both", [one, other]), ("one", one))
    }
    assert torch.equal(latents["both"][0], latents["one"][0])
    assert not torch.allclose(latents["both"][1], latents["one"][1], atol=1e-2)
    assert not torch.allclose(next(start(seed=1)).latents[0], latents["one"][0], atol=1e-2)


def test_a_script_starts_its_shots_when_the_timeline_says():
    script = load_script(
        {"shots": [{"prompt": FOX, "duration": 1}, {"prompt": CAT, "duration": 2, "transition": "cut"}] * 2}
    )
    stream = start(script, image=pictures(1)[0], decode_pixels=True)
    chunks = {chunk.index: chunk for chunk in stream}
    for shot in stream.timeline.shots:
        assert chunks[shot.first_block].media_time == shot.start
    assert sum(chunk.videos.shape[1] for chunk in chunks.values()) == stream.timeline.frames


@pytest.mark.parametrize("mode", ["exact", "compact"])
def test_saved_forked_and_reset_streams_still_know_what_was_given(mode, tmp_path):
    stream = start(image=pictures(1)[0], decode_pixels=True)
    stream.save(tmp_path / "it.stream", mode)
    copies = [stream.fork(), tiny.pipeline().load_stream(tmp_path / "it.stream")]
    first = list(islice(stream, 2))
    for copy in copies:
        chunks = list(islice(copy, 2))
        assert all(map(same, first, chunks)) or mode == "compact"
        copy.reset()
        again = list(islice(copy, 2))
        assert same(first[1], again[1]) and np.array_equal(first[0].videos, again[0].videos)


@pytest.mark.parametrize("prompt", [FOX, f"{FOX} [2s] | {CAT} [2s]"])
def test_a_reset_shows_what_was_given_under_the_prompt_that_begins(prompt):
    """Not under the latest one: the first shot's, or one that waits."""
    options = {"image": pictures(1)[0], "blocks": 4}
    stream = start(prompt, **options)
    list(islice(stream, 3))
    if prompt == FOX:
        stream.prompt(CAT)
    stream.reset()
    for one, other in zip(stream, start(CAT if prompt == FOX else prompt, **options), strict=True):
        assert torch.equal(one.latents, other.latents)


def test_a_reset_that_fails_while_given_frames_are_shown_undoes_itself():
    stream = start(image=pictures(1)[0])
    list(islice(stream, 2))
    untouched = stream.fork()
    stream.reset()
    with Trap(tiny.pipeline()) as trap, pytest.raises(MemoryError):
        trap.left, trap.error = 1, MemoryError()
        next(stream)
    stream.mailbox.restart = None
    assert all(map(same, islice(untouched, 2), islice(stream, 2)))


BAD = [
    ({"image": pictures(1)[0], "video": pictures(9)}, "image and video are both given"),
    ({"image": "none.png"}, "image = 'none.png' cannot be read"),
    ({"video": "none.mp4"}, r"video 'none\.mp4' does not exist"),
    ({"video": []}, r"video = '\[\]' has no frames: give a path"),
    ({"image": 5}, r"image has a frame of another form \(int\): give a path"),
    ({"image": np.full((32, 32, 3), 2.0)}, r"image has numbers outside \[0, 1\]"),
    ({"image": [pictures(1)[0]] * 2}, "image has 2 entries for 1 videos"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "message"), BAD, ids=[message[:20] for _, message in BAD])
def test_mistakes_are_told_in_one_sentence(options, message):
    with pytest.raises(UserError, match=message) as error:
        start(**options)
    assert "\n" not in str(error.value)


def test_generate_goes_on_from_a_picture(tmp_path, monkeypatch):
    monkeypatch.setattr("streamvid.generate.load_pipeline", lambda *_: tiny.pipeline())
    Image.fromarray(pictures(1)[0]).save(tmp_path / "it.png")
    script = load_script(f"{FOX} [1s]")
    videos = []
    for name, image in (("plain", None), ("given", tmp_path / "it.png")):
        path = generate(script, tmp_path / f"{name}.mp4", image=image, quiet=True)
        videos.append(imageio.imread(path))
    assert len(videos[0]) == 21 and len(videos[1]) == 24
