"""Users' own videos: clips, captions, latents."""

import io
import json
import tarfile

import numpy as np
import pytest
import tiny
import torch

from streamvid.decoding import encode, encoder_state
from streamvid.errors import UserError
from streamvid.io.writers import open_writer
from streamvid.training.datasets import ClipShards
from streamvid.training.encode import captioned_videos, clips_of, encode_folder


def video(path, frames: int, fps: float = 16, size=(48, 64), step: int = 4):
    """Frame t is grey of value step * t."""
    with open_writer(path, fps) as writer:
        writer.write(np.stack([np.full((*size, 3), min(255, step * t), np.uint8) for t in range(frames)]))
    return path


@pytest.fixture
def folder(tmp_path):
    """Two captioned videos, of 50 and of 30 frames."""
    (tmp_path / "more").mkdir()
    video(tmp_path / "b.mp4", 50)
    (tmp_path / "b.txt").write_text("a red\n fox\n")
    video(tmp_path / "more" / "a.mp4", 30)
    (tmp_path / "more" / "a.json").write_text(json.dumps({"caption": "a blue bird"}))
    return tmp_path


def test_captions_beside_videos(folder):
    assert [(video.path.name, video.caption) for video in captioned_videos(folder)] == [
        ("b.mp4", "a red fox"),
        ("a.mp4", "a blue bird"),
    ]
    (folder / "b.txt").write_text(" ")
    with pytest.raises(UserError, match=r"b.mp4 has no caption: write what it shows into b.txt"):
        captioned_videos(folder)
    (folder / "b.txt").unlink()
    with pytest.raises(UserError, match="has no caption"):
        captioned_videos(folder)
    (folder / "b.txt").write_text("x")
    (folder / "more" / "a.json").write_text("{")
    with pytest.raises(UserError, match=r"the caption beside .*a.mp4 cannot be read"):
        captioned_videos(folder)
    with pytest.raises(UserError, match="holds no videos"):
        captioned_videos(folder / "nowhere")


@pytest.mark.parametrize(("fps", "step"), [(16, 1), (8, 2), (32, 0.5)])
def test_frames_are_those_shown_at_their_time(tmp_path, fps, step):
    clips = list(clips_of(video(tmp_path / "x.mp4", 50), 9, fps, 32, 32))
    assert len(clips) == int(50 / step) // 9 and clips[0].shape == (3, 9, 32, 32)
    grey = torch.cat([clip.mean((0, 2, 3)) for clip in clips])
    expected = torch.tensor([min(255, 4 * round(i * step)) for i in range(len(grey))]) / 127.5 - 1
    assert (grey - expected).abs().max() < (0.03 if step >= 1 else 0.05)


def test_frames_are_scaled_and_cropped_in_the_middle(tmp_path):
    wide = np.zeros((1, 32, 96, 3), np.uint8)
    wide[:, :, 32:64] = 255
    with open_writer(tmp_path / "x.mp4", 16) as writer:
        writer.write(np.repeat(wide, 5, 0))
    (clip,) = clips_of(tmp_path / "x.mp4", 5, 16, 16, 16)
    assert clip[:, :, 4:12, 4:12].min() > 0.9


def test_a_folder_becomes_shards(folder, model_folder, tmp_path):
    output = tmp_path / "latents"
    arguments = {"model": model_folder, "frames": 3, "videos_per_shard": 1, "device": "cpu"}
    encode_folder(str(folder), str(output), **arguments)
    shards = ClipShards(output)
    assert shards.shape == (3, *tiny.LATENT) and len(shards) == 50 // 9 + 30 // 9
    assert shards.batch([0, 5])[1] == ["a red fox", "a blue bird"]
    first = next(clips_of(folder / "b.mp4", 9, 16, 32, 32))
    vae = tiny.vae()
    with torch.no_grad():
        expected = encode(vae, first[None], encoder_state(vae), None)[0].transpose(0, 1)
    torch.testing.assert_close(shards[0], expected, rtol=1e-2, atol=1e-2)
    stamp = (output / "clips_00000.safetensors").stat().st_mtime_ns
    (output / "clips_00001.safetensors").unlink()
    manifest = json.loads((output / "manifest.json").read_text())
    del manifest["shards"]["clips_00001"]
    (output / "manifest.json").write_text(json.dumps(manifest))
    encode_folder(str(folder), str(output), **arguments)  # only what is missing
    assert (output / "clips_00000.safetensors").stat().st_mtime_ns == stamp and len(ClipShards(output)) == 8


def pack(path, members: dict[str, object]):
    """A tar file of files or texts."""
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            data = content.encode() if isinstance(content, str) else content.read_bytes()
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return path


def test_tar_files_are_folders_in_one_file(folder, model_folder, tmp_path):
    """WebDataset's form: the shards of a folder of videos and of a tar file of the same videos are the same."""
    packed = tmp_path / "packed"
    packed.mkdir()
    captions = {"x/b.txt": "a red fox", "x/c.json": json.dumps({"caption": "a blue bird"})}
    videos = {"x/b.mp4": folder / "b.mp4", "x/c.mp4": folder / "more" / "a.mp4"}
    pack(packed / "shard-000.tar", {**captions, **videos, "x/b.cls": "3"})
    found = captioned_videos(packed)
    assert [(video.member, video.caption) for video in found] == [
        ("x/b.mp4", "a red fox"),
        ("x/c.mp4", "a blue bird"),
    ]
    assert captioned_videos(packed / "shard-000.tar") == found
    arguments = {"model": model_folder, "frames": 3, "device": "cpu"}
    encode_folder(str(packed), str(tmp_path / "one"), **arguments)
    plain = tmp_path / "plain"
    plain.mkdir()
    for name, content in {**captions, **videos}.items():
        data = content.encode() if isinstance(content, str) else content.read_bytes()
        (plain / name[2:]).write_bytes(data)
    encode_folder(str(plain), str(tmp_path / "two"), **arguments)
    one, two = ClipShards(tmp_path / "one"), ClipShards(tmp_path / "two")
    assert len(one) == len(two) > 4 and one.prompts == two.prompts
    assert torch.equal(one.batch(range(len(one)))[0], two.batch(range(len(two)))[0])


def test_tar_files_that_cannot_be_used_are_told(folder, tmp_path):
    video = {"a.mp4": folder / "b.mp4"}
    with pytest.raises(UserError, match=r"x\.tar: a\.mp4 has no caption: write what it shows into a\.txt"):
        captioned_videos(pack(tmp_path / "x.tar", video))
    with pytest.raises(UserError, match=r"the caption beside .*x\.tar: a\.mp4 cannot be read"):
        captioned_videos(pack(tmp_path / "x.tar", {**video, "a.json": "{"}))
    whole = pack(tmp_path / "x.tar", {"a.txt": "a fox", **video})
    assert len(captioned_videos(whole)) == 1
    whole.write_bytes(whole.read_bytes()[: (folder / "b.mp4").stat().st_size // 2 + 1024])
    with pytest.raises(UserError, match=r"x\.tar .*(cut short|no tar file)"):
        captioned_videos(whole)
    whole.write_bytes(b"no tar file at all" * 100)
    with pytest.raises(UserError, match=r"x\.tar is no tar file that can be read"):
        captioned_videos(whole)


def test_what_cannot_be_encoded_is_told(folder, model_folder, tmp_path):
    with pytest.raises(UserError, match=r"holds no video of 13.8 s: lower frames = 56"):
        encode_folder(str(folder), str(tmp_path / "x"), model_folder, frames=56, device="cpu")
    with pytest.raises(UserError, match="height = 33 and width = 32 must be multiples of 8"):
        encode_folder(str(folder), str(tmp_path / "x"), model_folder, height=33, device="cpu")
    with pytest.raises(UserError, match="is not on this machine"):
        encode_folder(str(folder), str(tmp_path / "x"), "some/model", device="cpu")
    with pytest.raises(UserError, match="runs in one process"):
        encode_folder(str(folder), str(tmp_path / "x"), model_folder, processes=2)
