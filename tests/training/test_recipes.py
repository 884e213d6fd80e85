"""The smoke configurations of all recipes run to their end, and what they export streams."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from streamvid.models import load_pipeline
from streamvid.training.run import train

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "train"
FILE = "diffusion_pytorch_model.safetensors"
RECIPES = ["self_forcing", "longlive_long", "longlive2", "rolling_forcing", "reward_forcing", "sid", "gan"]


def config(name: str) -> str:
    return str(CONFIGS / f"smoke_{name}.yaml")


def places(output, model_folder, prompt_file) -> list[str]:
    return [f"trainer.output={output}", f"stage.model.folder={model_folder}", f"stage.prompts={prompt_file}"]


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "transformer" / FILE)


def rows(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", RECIPES)
def test_a_distillation_recipe_runs_and_streams(name, model_folder, prompt_file, latents_folder, tmp_path):
    real = [f"stage.latents={latents_folder}"] if name == "gan" else []
    train(config(name), [*places(tmp_path, model_folder, prompt_file), *real])
    log = rows(tmp_path)
    assert log[-1]["step"] == len(log) - 1 and {"critic_loss", "critic_gradient_norm"} <= set(log[-1])
    assert {"generator_loss", "generator_normaliser", "generator_exit_step"} <= set(log[0])
    assert ("generator_gan" in log[0]) == ("critic_gan" in log[0]) == (name == "gan")
    assert ("generator_reward" in log[0]) == (name == "reward_forcing")
    before, after = (
        load_file(Path(model_folder) / "transformer" / FILE),
        weights(tmp_path),
    )
    assert set(before) == set(after)
    assert any(not torch.equal(before[key], after[key]) for key in before)
    assert (tmp_path / "model" / "lora.safetensors").exists() == (name == "longlive_long")
    stream = load_pipeline(str(tmp_path / "model"), "cpu", "float32").stream("a red fox", blocks=2)
    assert next(stream).frames.shape == (29 if name == "longlive2" else 9, 32, 32, 3)  # blocks of 8, of 3


FLOWS = ["flow_teacher", "teacher_forcing", "diffusion_forcing", "moving_buffer", "consistency"]


@pytest.mark.parametrize("name", FLOWS)
def test_a_recipe_on_real_clips_runs_and_streams(name, model_folder, latents_folder, tmp_path):
    data = "data" if name == "consistency" else "latents"
    train(
        config(name),
        [
            f"trainer.output={tmp_path}",
            f"stage.model.folder={model_folder}",
            f"stage.{data}={latents_folder}",
        ],
    )
    assert len(rows(tmp_path)) == 4 and (tmp_path / "validation.jsonl").exists() == (name != "consistency")
    assert next(load_pipeline(str(tmp_path / "model"), "cpu", "float32").stream("a fox")).frames.shape[0] == 9


def test_ode_paths_and_the_regression_onto_them(model_folder, prompt_file, tmp_path):
    folder, paths = f"stage.model.folder={model_folder}", tmp_path / "paths"
    train(config("ode_pairs"), [folder, f"stage.prompts={prompt_file}", f"stage.output={paths}"])
    train(config("ode_init"), [folder, f"stage.data={paths}", f"trainer.output={tmp_path / 'run'}"])
    assert rows(tmp_path / "run")[-1]["loss"] > 0
    assert set(weights(tmp_path / "run")) == set(load_file(Path(model_folder) / "transformer" / FILE))


def test_sample_videos_with_contact_sheets(model_folder, prompt_file, tmp_path):
    settings = ["trainer.sample_every=2", "trainer.sample_blocks=2", "trainer.sample_prompt=a red fox"]
    train(config("self_forcing"), [*places(tmp_path, model_folder, prompt_file), *settings])
    for step in (2, 4):
        from streamvid.io.video import read_video

        assert len(list(read_video(tmp_path / "samples" / f"step_{step:06d}.mp4"))) == 9 + 12
        assert (tmp_path / "samples" / f"step_{step:06d}.png").stat().st_size > 1000


def test_frozen_parts_are_in_no_checkpoint(model_folder, prompt_file, tmp_path):
    train(config("self_forcing"), [*places(tmp_path, model_folder, prompt_file), "trainer.steps=1"])
    saved = load_file(tmp_path / "checkpoint" / "model.safetensors")
    assert {name.split(".")[0] for name in saved} == {"transformer", "critic"}


def test_two_processes_are_one_that_accumulates_twice(model_folder, prompt_file, tmp_path):
    """Generator and critic, two optimizers, different prompts in every micro-batch."""
    folders = [tmp_path / "two", tmp_path / "one"]
    settings = ["trainer.ema=0", "trainer.steps=3"]
    train(config("self_forcing"), [*places(folders[0], model_folder, prompt_file), *settings], processes=2)
    train(
        config("self_forcing"),
        [*places(folders[1], model_folder, prompt_file), *settings, "trainer.accumulate=2"],
    )
    before = load_file(Path(model_folder) / "transformer" / FILE)
    two, one = weights(folders[0]), weights(folders[1])
    for name, start in before.items():
        moved = (one[name] - start).norm()
        assert moved > 0 and (two[name] - one[name]).norm() < 0.02 * moved, name
    critics = [load_file(folder / "checkpoint" / "model.safetensors") for folder in folders]
    for name, tensor in critics[1].items():
        if name.startswith("critic"):
            torch.testing.assert_close(critics[0][name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["self_forcing", "longlive_long"])
def test_a_run_killed_by_force_goes_on_to_the_same_weights(name, model_folder, prompt_file, tmp_path):
    """Also in the middle of a long stream: checkpoints fall between streams."""
    settings = ["trainer.steps=12", "trainer.checkpoint_every=3", "trainer.mixed_precision=no"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    command = [sys.executable, "-m", "streamvid.cli", "train", config(name)]
    command += [*places(killed, model_folder, prompt_file), *settings]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        end = time.monotonic() + 400
        while not (killed / "checkpoint").is_dir():
            assert process.poll() is None and time.monotonic() < end, process.stderr.read()
            time.sleep(0.01)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    for folder in (killed, whole):
        train(config(name), [*places(folder, model_folder, prompt_file), *settings])
    resumed, straight = weights(killed), weights(whole)
    for key, value in straight.items():
        assert torch.equal(value, resumed[key]), key
    seen = [{k: v for k, v in row.items() if k != "seconds"} for row in rows(killed)]
    assert seen == [{k: v for k, v in row.items() if k != "seconds"} for row in rows(whole)]
