"""`streamvid train`: configurations, several processes, and a killed run that goes on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from streamvid.cli import main
from streamvid.errors import UserError
from streamvid.training import run
from streamvid.training.text_stage import TextStage

ROOT = Path(__file__).resolve().parents[2]
CONFIG = {
    "kind": "text",
    "stage": {
        "encoder": {
            "d_model": 16,
            "d_kv": 8,
            "num_heads": 2,
            "d_ff": 16,
            "num_layers": 1,
            "dropout_rate": 0.0,
        },
        "batch_size": 8,
    },
    "trainer": {
        "steps": 3,
        "muon_lr": 0.02,
        "adamw_lr": 0.02,
        "warmup": 1,
        "ema": 0,
        "mixed_precision": "no",
        "log_every": 1000,
    },
}


def config_file(folder: Path, **trainer) -> str:
    settings = {"output": str(folder / "run"), **CONFIG["trainer"], **trainer}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({**CONFIG, "trainer": settings}))
    return str(path)


def exported(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "text_encoder" / "model.safetensors")


# --- configurations -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs" / "train").glob("*.yaml")), ids=lambda path: path.stem
)
def test_shipped_configurations_are_whole(path):
    config = run.load_config(path)
    module, name = {**run.STAGES, **run.JOBS}[config["kind"]].split(":")
    function = getattr(__import__(module, fromlist=[name]), name)
    run.inspect.signature(function).bind(**config["stage"])


def test_overrides_change_single_fields(tmp_path):
    config = run.load_config(config_file(tmp_path), ["trainer.steps=7", "stage.encoder.d_ff=4"])
    assert config["trainer"]["steps"] == 7 and config["stage"]["encoder"]["d_ff"] == 4
    assert config["trainer"]["warmup"] == 1


TRAINER = "trainer: {output: x, steps: 1}\n"
MISTAKES = {
    "no YAML": ("kind: [", [], "is no configuration .* mend it"),
    "no mapping": ("- kind\n", [], "is no configuration|top-level fields"),
    "empty": ("", [], "top-level fields must be kind, stage and trainer"),
    "a field too many": ("kind: text\nstage: {}\nfox: 1\n", [], "top-level fields must be"),
    "no stage": ("kind: text\n" + TRAINER, [], "top-level fields must be"),
    "unknown kind": (
        "kind: fox\nstage: {}\n" + TRAINER,
        [],
        "kind = 'fox' is not known: choose one of vae, tiny_decoder, text",
    ),
    "stage is a list": ("kind: text\nstage: [1]\n" + TRAINER, [], r"stage = \[1\] must be a mapping"),
    "no trainer": ("kind: text\nstage: {}\n", [], "trainer.output is missing"),
    "trainer is a number": ("kind: text\nstage: {}\ntrainer: 3\n", [], "trainer = 3 must be a mapping"),
    "no steps": ("kind: text\nstage: {}\ntrainer: {output: x}\n", [], "trainer.steps is missing: add it"),
    "unknown option": (
        "kind: text\nstage: {}\n" + TRAINER,
        ["trainer.stepps=3"],
        "trainer.stepps is not an option: choose from accumulate, adamw_lr",
    ),
    "text for a number": (
        "kind: text\nstage: {}\n" + TRAINER,
        ["trainer.steps=many"],
        "trainer.steps = 'many' must be a value of type int",
    ),
    "a fraction": (
        "kind: text\nstage: {}\n" + TRAINER,
        ["trainer.steps=1.5"],
        "trainer.steps = 1.5 .* type int",
    ),
    "no rest": (
        "kind: text\nstage: {}\n" + TRAINER,
        ["trainer.log_every=0"],
        "log_every = 0 must be at least 1",
    ),
    "negative seed": (
        "kind: text\nstage: {}\n" + TRAINER,
        ["trainer.seed=-1"],
        "seed = -1 must be at least 0",
    ),
    "unknown precision": (
        "kind: text\nstage: {}\n" + TRAINER,
        ["trainer.mixed_precision=int8"],
        "mixed_precision = 'int8' is not known: choose one of no, bf16, fp16",
    ),
    "a missing value": ("kind: text\nstage: {x: '${nowhere}'}\n" + TRAINER, [], "is no configuration"),
    "no override": ("kind: text\nstage: {}\n" + TRAINER, ["fox"], "top-level fields must be"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_bad_configuration(mistake, tmp_path):
    text, overrides, message = MISTAKES[mistake]
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as failure:
        run.load_config(path, overrides)
    assert str(path) in str(failure.value) and "\n" not in str(failure.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["stage.fox=1"], "unexpected keyword argument 'fox': choose from encoder, batch_size, word_dropout"),
        (["kind=vae"], "stage of kind vae: .* choose from vae, frames, crop"),
        (["kind=vae", "stage={}"], "give vae, .* or start_from"),
        (["kind=vae", "stage={start_from: a/b/c}"], "stage of kind vae: .* check its folders"),
        (["kind=student"], "stage of kind student: missing a required argument|unexpected keyword"),
        (["--processes", "0"], "processes = 0 must be at least 1"),
    ],
)
def test_a_bad_stage_is_one_sentence(overrides, message, tmp_path, capsys):
    import re

    path = config_file(tmp_path)
    if overrides[-1].startswith("stage={"):  # replaces the whole stage
        config = yaml.safe_load(Path(path).read_text())
        Path(path).write_text(yaml.safe_dump({**config, "stage": yaml.safe_load(overrides.pop()[6:])}))
    assert main(["train", path, *overrides]) == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert re.search(message, sentence)
    assert not (tmp_path / "run" / "model").exists()


def test_jobs_get_the_processes_of_the_command(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("streamvid.training.latents.encode_shards", lambda **options: calls.append(options))
    path = tmp_path / "latents.yaml"
    path.write_text(
        "kind: latents\nstage: {vae: v, output: o, shards: 2, first_block_shards: 1, processes: 3}\n"
    )
    run.train(path)
    run.train(path, ["stage.seed=5"], processes=2)
    assert [call["processes"] for call in calls] == [3, 2] and calls[1]["seed"] == 5


@pytest.fixture(autouse=True)
def no_validation(monkeypatch):
    """It costs a second and changes nothing."""
    monkeypatch.setattr(TextStage, "validate", lambda self, output, step: {})


# --- runs -----------------------------------------------------------------------------------------------------------


def test_the_seed_chooses_weights_and_batches(tmp_path):
    path = config_file(tmp_path)
    weights = []
    for name, seed in (("one", 1), ("two", 1), ("three", 2)):
        torch.manual_seed(len(weights))  # what was drawn before does not matter
        run.train(path, [f"trainer.output={tmp_path / name}", f"trainer.seed={seed}"])
        weights.append(exported(tmp_path / name))
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name])
        assert not torch.equal(value, weights[2][name]) or (value == 1).all()


class Both(TextStage):
    """One process that does the work of two: their batches in one step."""

    def batch(self, seed, step, process):
        return {"parts": [super(Both, self).batch(seed, step, rank) for rank in (0, 1)]}

    def forward(self, batch):
        losses, metrics = zip(*[super(Both, self).forward(part) for part in batch["parts"]], strict=True)
        return torch.stack(losses).mean(), metrics[0]


def test_two_processes_are_one_with_twice_the_batch(tmp_path, monkeypatch, capfd):
    path = config_file(tmp_path)
    assert main(["train", path, "--processes", "2"]) == 0, capfd.readouterr().err
    together = exported(tmp_path / "run")
    monkeypatch.setitem(run.STAGES, "text", f"{__name__}:Both")
    run.train(path, [f"trainer.output={tmp_path / 'one'}"])
    alone = exported(tmp_path / "one")
    run.train(path, [f"trainer.output={tmp_path / 'none'}", "trainer.steps=0"])
    before = exported(tmp_path / "none")
    assert set(together) == set(alone) == set(before) and len(before) > 8
    for name, start in before.items():  # Muon's and AdamW's
        moved = (alone[name] - start).norm()
        assert moved > 0 and not torch.equal(together[name], start), name
        assert (together[name] - alone[name]).norm() < 0.02 * moved, name
    states = {path.name for path in (tmp_path / "run" / "checkpoint").iterdir()}
    assert {"random_states_0.pkl", "random_states_1.pkl"} <= states  # every process wrote its part
    cards = [(tmp_path / name / "model" / "README.md").read_text() for name in ("run", "one")]
    assert "2 processes" in cards[0] and "1 process," in cards[1]


def test_a_killed_run_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    path = config_file(tmp_path, steps=80, checkpoint_every=8, ema=0.9)
    dropout = ["stage.encoder.dropout_rate=0.2"]  # random numbers within a step
    process = subprocess.Popen(
        [sys.executable, "-m", "streamvid.cli", "train", path, *dropout],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    try:
        end = time.monotonic() + 400
        while not (tmp_path / "run" / "checkpoint").is_dir():
            assert process.poll() is None and time.monotonic() < end, process.stderr.read()
            time.sleep(0.01)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    assert process.returncode == -signal.SIGKILL and not (tmp_path / "run" / "model").exists()

    steps, batch = [], TextStage.batch
    monkeypatch.setattr(
        TextStage, "batch", lambda self, *place: steps.append(place[1]) or batch(self, *place)
    )
    assert main(["train", path, *dropout]) == 0
    assert steps == list(range(steps[0], 80)) and steps[0] >= 8 and steps[0] % 8 == 0  # it goes on
    assert main(["train", path, *dropout, f"trainer.output={tmp_path / 'whole'}"]) == 0
    resumed, whole = exported(tmp_path / "run"), exported(tmp_path / "whole")
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name


def test_processes_that_fail_are_one_sentence_of_ours(tmp_path, monkeypatch, capsys):
    class Failed:
        returncode = 1

    commands = []

    def call(command, env):
        commands.append((command, env))
        return Failed

    monkeypatch.setattr(run.subprocess, "run", call)
    path = config_file(tmp_path, threads=3)
    assert main(["train", path, "trainer.steps=5", "--processes", "4"]) == 2
    assert capsys.readouterr().err.startswith(f"streamvid: training {path} on 4 processes failed")
    ((command, environment),) = commands
    assert "--nproc_per_node=4" in command and command[-3:] == ["train", path, "trainer.steps=5"]
    assert environment["OMP_NUM_THREADS"] == "3"
