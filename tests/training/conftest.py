"""Folders that the stages of transformers start from."""

import pytest
import tiny
from accelerate.state import AcceleratorState

from streamvid.training.datasets import ShardWriter

PROMPTS = [
    "a red fox walks in the snow",
    "a blue bird sleeps",
    "the cat runs in the night",
    "rain falls in the city",
]


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """accelerate keeps one state per process, and a run of another precision needs another."""
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> str:
    """A whole tiny pipeline, 32 x 32 pixels, method longlive."""
    folder = tmp_path_factory.mktemp("model")
    tiny.new_pipeline().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def prompt_file(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(PROMPTS) + "\n")
    return str(path)


@pytest.fixture(scope="session")
def latents_folder(tmp_path_factory) -> str:
    """Eight clips of 12 latent frames in two shards."""
    folder = tmp_path_factory.mktemp("latents")
    writer = ShardWriter(folder, {"kind": "latents", "shape": [12, *tiny.LATENT]})
    for shard in range(2):
        clips = tiny.clip(40 + shard, 12, batch=4).transpose(1, 2).half()
        writer.write(f"clips_{shard:05d}", clips, [[prompt] for prompt in PROMPTS])
    return str(folder)
