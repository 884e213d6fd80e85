"""docs/training.md, "Your own videos": its commands, run as they stand there, at a tiny size."""

import re
import shlex
from pathlib import Path

import numpy as np

from streamvid.cli import main
from streamvid.io.video import read_video
from streamvid.io.writers import open_writer
from streamvid.training.datasets import ClipShards

ROOT = Path(__file__).resolve().parents[2]


def commands() -> list[list[str]]:
    section = (ROOT / "docs" / "training.md").read_text().split("## Your own videos")[1].split("\n## ")[0]
    blocks = re.findall(r"```sh\n(.*?)```", section, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("streamvid ")]


def test_from_a_folder_of_videos_to_a_stream(model_folder, tmp_path, monkeypatch):
    (tmp_path / "my_videos").mkdir()
    rng = np.random.default_rng(0)
    for name in ("one", "two"):
        with open_writer(tmp_path / "my_videos" / f"{name}.mp4", 16) as writer:
            writer.write(rng.integers(0, 255, (60, 32, 48, 3), np.uint8))
        (tmp_path / "my_videos" / f"{name}.txt").write_text("a red fox walks in the snow")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    found = commands()
    assert [command[0] for command in found] == ["train", "train", "train", "generate"]
    tiny = {
        "configs/train/own_data_encode.yaml": [f"stage.model={model_folder}"],
        "configs/train/own_data.yaml": [
            *(f"stage.model.folder={model_folder}", "stage.model.lora_rank=2", "stage.batch_size=1"),
            *("trainer.steps=2", "stage.flow.frames=15"),
        ],
    }
    for command in found:
        extra = next((tiny[word] for word in command if word in tiny), [])
        if command[0] == "generate":
            command = [re.sub(r"\[\d+s\]", "[1s]", word) for word in command]
        assert main([*command, *extra]) == 0, command
    assert len(ClipShards("runs/own_latents")) == 2  # 60 frames hold one clip of 57
    (video,) = tmp_path.glob("*.mp4")
    assert len(list(read_video(video))) > 8
