"""What a step costs: against PyTorch's own count, and told by the command."""

import json
from pathlib import Path

import pytest
import tiny
import torch
from torch.utils.flop_counter import FlopCounterMode

from streamvid.cli import main
from streamvid.training.dry_run import Work, counted_flops, describe, forward_flops
from streamvid.training.options import TrainerOptions
from streamvid.training.run import train
from streamvid.training.stage import Stage

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "train"


def test_operations_of_a_forward_are_those_that_pytorch_counts():
    model = tiny.transformer(num_attention_heads=4, attention_head_dim=32, ffn_dim=512, num_layers=3)
    model.attention_name = "reference"
    clip, kv = tiny.clip(0, 4), model.prompt_kv(tiny.text(0, 1))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(clip, torch.tensor([500.0]), prompt_kv=kv)
    tokens = 4 * tiny.TOKENS
    time = 4 * 2 * (16 * 128 + 128**2 + 6 * 128**2)  # of the timestep's embedding, one per frame
    assert forward_flops(model, tokens, tokens) == pytest.approx(counter.get_total_flops() - time, rel=0.01)


def test_a_backward_is_two_forwards_and_checkpointing_one_more():
    model = tiny.transformer()
    plain = Work("x", model, 2, 8, 8).flops
    assert plain == 2 * forward_flops(model, 8, 8)
    assert Work("x", model, 2, 8, 8, True).flops == 3 * plain
    model.enable_gradient_checkpointing()
    assert Work("x", model, 2, 8, 8, True).flops == 4 * plain
    assert Work("x", model, 2, 8, 8).flops == plain


def test_the_command_tells_and_trains_nothing(model_folder, prompt_file, tmp_path, capsys):
    place = [
        f"trainer.output={tmp_path / 'run'}",
        f"stage.model.folder={model_folder}",
        f"stage.prompts={prompt_file}",
    ]
    assert main(["train", "--dry-run", str(CONFIGS / "smoke_self_forcing.yaml"), *place]) == 0
    told = capsys.readouterr().out
    count = sum(p.numel() for p in tiny.transformer().parameters())
    assert f"generator: {count / 1000:.2f} k parameters, {count / 1000:.2f} k learn" in told
    for part in ("frozen beside them", "GiB", "exit steps", "critic's own loss", "TFLOP", "4 steps"):
        assert part in told
    assert not (tmp_path / "run").exists()
    train(str(CONFIGS / "smoke_longlive_long.yaml"), place, dry_run=True)
    lora = 2 * 4 * (4 * (24 + 24) * 2 + (24 + 32) * 2)
    assert f"{lora / 1000:.2f} k learn" in capsys.readouterr().out


def test_measured_steps_tell_how_long_a_run_takes_and_train_nothing(
    model_folder, prompt_file, tmp_path, capsys
):
    place = [
        f"trainer.output={tmp_path / 'run'}",
        f"stage.model.folder={model_folder}",
        f"stage.prompts={prompt_file}",
        "trainer.steps=7200",
    ]
    command = ["train", str(CONFIGS / "smoke_self_forcing.yaml"), *place, "--dry-run", "--measure-steps", "2"]
    assert main([*command, "--timing", str(tmp_path / "hours.jsonl")]) == 0
    row = json.loads((tmp_path / "hours.jsonl").read_text())
    assert row["config"] == "smoke_self_forcing.yaml" and (row["steps"], row["measured_steps"]) == (7200, 2)
    assert 0 < row["seconds_per_step"] < 60
    assert row["hours"] == pytest.approx(2 * row["seconds_per_step"], abs=0.01)
    assert f"measured 2 steps: {row['seconds_per_step']:g} s each" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    assert main(["train", *command[1:-3], "--measure-steps", "2"]) == 2
    assert "--measure-steps needs --dry-run" in capsys.readouterr().err
    assert main([*command[:-2], "--timing", "x"]) == 2
    assert "--timing needs --measure-steps" in capsys.readouterr().err


def test_stages_that_do_not_say_are_counted():
    class Lines(Stage):
        def __init__(self):
            super().__init__()
            self.line = torch.nn.Linear(4, 5)

        def trainable(self):
            return self.line

        def batch(self, seed, step, process):
            return {"x": torch.ones(3, 4)}

        def forward(self, batch):
            return self.line(batch["x"]).sum(), {}

    stage = Lines()
    assert counted_flops(stage) == 2 * (2 * 3 * 4 * 5)  # forward, and backward by the weight
    assert stage.line.weight.grad is None
    told = describe(stage, TrainerOptions(output="x", steps=1000, accumulate=2))[-1]
    assert (
        "a step on one process: 4.8e-10 TFLOP, counted in one that was made; 1000 steps: 4.8e-10 PFLOP"
        in told
    )


def test_jobs_have_nothing_to_describe(tmp_path, capsys):
    path = tmp_path / "job.yaml"
    path.write_text("kind: assemble\nstage: {}\n")
    assert main(["train", "--dry-run", str(path)]) == 2
    assert "kind = assemble has no training loop to describe" in capsys.readouterr().err
