"""Prompts and shards: what was written comes back, and what is broken is told in one sentence."""

import json

import pytest
import torch

from streamvid.errors import UserError
from streamvid.training.datasets import ClipShards, ShardWriter, batches, check_frames, load_prompts

FACTS = {"kind": "latents", "shape": [6, 2, 3, 4]}


def write(folder, shards: int = 2) -> list[torch.Tensor]:
    writer = ShardWriter(folder, FACTS)
    clips = [torch.randn(3, *FACTS["shape"]).half() for _ in range(shards)]
    for index, tensor in enumerate(clips):
        writer.write(f"s{index}", tensor, [[f"clip {index} {n}", "then"] for n in range(3)])
    return clips


def test_prompts_of_text_and_jsonl(tmp_path):
    (tmp_path / "a.txt").write_text("a fox\n\n  a cat, running \n")
    assert load_prompts(tmp_path / "a.txt") == [("a fox",), ("a cat, running",)]
    (tmp_path / "a.jsonl").write_text('{"prompt": "a fox"}\n{"prompts": ["a cat", "a dog"], "more": 1}\n')
    assert load_prompts(tmp_path / "a.jsonl") == [("a fox",), ("a cat", "a dog")]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", None, "cannot be read .FileNotFoundError.: give a text or JSONL file"),
        ("a.txt", " \n\n", "is empty: write one prompt per line"),
        ("a.jsonl", '{"prompt": "a"}\n{"fox": 1}\n', "line 2: must be an object such as"),
        ("a.jsonl", "fox\n", "line 1: must be an object"),
        ("a.jsonl", '{"prompts": []}\n', "line 1"),
        ("a.jsonl", '{"prompt": " "}\n', "line 1"),
    ],
)
def test_prompts_that_cannot_be_used(tmp_path, name, text, message):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        load_prompts(tmp_path / name)


def test_clips_come_back_in_the_order_of_their_shards(tmp_path):
    written = torch.cat(write(tmp_path))
    shards = ClipShards(tmp_path)
    assert len(shards) == 6 and shards.shape == (6, 2, 3, 4)
    clips, prompts = shards.batch([4, 0])
    assert torch.equal(clips, written[[4, 0]].float()) and prompts == ["clip 1 1", "clip 0 0"]
    assert shards.prompts[5] == ("clip 1 2", "then")


def test_a_killed_writer_goes_on(tmp_path):
    write(tmp_path, 1)
    again = ShardWriter(tmp_path, FACTS)
    assert "s0" in again and "s1" not in again
    with pytest.raises(UserError, match="holds clips with another shape"):
        ShardWriter(tmp_path, {**FACTS, "shape": [3, 2, 3, 4]})


def damage(folder, kind: str) -> None:
    shard = folder / "s1.safetensors"
    if kind == "cut short":
        shard.write_bytes(shard.read_bytes()[:-5])
    elif kind == "bytes changed":
        content = bytearray(shard.read_bytes())
        content[2:30] = b"x" * 28
        shard.write_bytes(bytes(content))
    elif kind == "gone":
        shard.unlink()
    elif kind == "manifest":
        (folder / "manifest.json").write_text("{")
    elif kind == "no manifest":
        (folder / "manifest.json").unlink()
    elif kind == "empty":
        (folder / "manifest.json").write_text(json.dumps({**FACTS, "shards": {}}))
    elif kind == "other clips":
        ShardWriter(folder / "x", FACTS).write("s1", torch.zeros(2, 6, 2, 3, 4), [["a"], ["b"]])
        manifest = json.loads((folder / "manifest.json").read_text())
        (folder / "x" / "s1.safetensors").rename(shard)
        manifest["shards"]["s1"]["bytes"] = shard.stat().st_size
        (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("cut short", r"shard .*s1.safetensors has \d+ bytes and not \d+: delete it"),
        ("bytes changed", "shard .*s1.safetensors is damaged: delete it"),
        ("gone", "shard .*s1.safetensors is missing: delete it"),
        ("other clips", "shard .*s1.safetensors does not hold 3 clips with prompts"),
        ("manifest", "manifest.json is damaged: delete it and make the clips again"),
        ("no manifest", "has no manifest.json: make the clips"),
        ("empty", "holds no clips: make some first"),
    ],
)
def test_a_broken_folder(tmp_path, kind, message):
    write(tmp_path)
    damage(tmp_path, kind)
    with pytest.raises(UserError, match=message) as failure:
        ClipShards(tmp_path)
    assert "\n" not in str(failure.value)


def test_clips_must_fit_the_model(tmp_path):
    write(tmp_path)
    shards = ClipShards(tmp_path)
    check_frames(shards, 6, (2, 3, 4), 3)
    with pytest.raises(
        UserError, match=r"holds latents of \[2, 3, 4\] per frame and the model's are \[2, 3, 5\]"
    ):
        check_frames(shards, 6, (2, 3, 5), 3)
    with pytest.raises(UserError, match="frames = 9 is more than the 6 of the clips"):
        check_frames(shards, 9, (2, 3, 4), 3)
    with pytest.raises(UserError, match="frames = 4 must be a multiple of frames_per_block = 3"):
        check_frames(shards, 4, (2, 3, 4), 3)
    with pytest.raises(UserError, match="holds clips of kind 'latents': give a folder of 'ode'"):
        ClipShards(tmp_path, "ode")


def test_batches():
    assert [list(b) for b in batches(range(5), 2)] == [[0, 1], [2, 3], [4]]
