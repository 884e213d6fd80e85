"""The training loop: a killed run resumed is the run that was not, and exports averaged weights."""

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from streamvid.errors import UserError
from streamvid.training.optimizers import Muon, build_optimizers, learning_rate_factor
from streamvid.training.trainer import Stage, Trainer, TrainerOptions


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the trainer catches it."""


class Fit(Stage):
    """Fits noise with a convolution (Muon's) and a bias (AdamW's). May be killed before a step, or get a NaN there."""

    layout = torch.contiguous_format

    def __init__(self, kill_at: int = -1, nan_at: int = -1):
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Conv2d(3, 4, 3).to(memory_format=self.layout)
        self.kill_at, self.nan_at = kill_at, nan_at
        self.seen: list[dict[str, torch.Tensor]] = []  # weights before each step

    def trainable(self):
        return self.network

    def batch(self, seed, step, process):
        if step == self.kill_at:
            raise Killed
        self.seen.append({name: value.clone() for name, value in self.network.state_dict().items()})
        torch.manual_seed(hash((seed, step, process)))
        scale = math.nan if step == self.nan_at else 1.0
        return {"image": scale * torch.randn(2, 3, 5, 5), "target": torch.randn(2, 4, 3, 3)}

    def forward(self, batch):
        error = self.network(batch["image"]) - batch["target"]
        return error.square().mean(), {"bias": error.mean().detach()}

    def validate(self, output, step):
        return {"weight": float(self.network.weight.sum())}

    def export(self, output):
        output.mkdir(exist_ok=True)
        torch.save(self.network.state_dict(), output / "network.pt")


def trainer(folder, stage=None, **changes) -> Trainer:
    options = {
        "steps": 6,
        "checkpoint_every": 3,
        "log_every": 1,
        "warmup": 2,
        "mixed_precision": "no",
        **changes,
    }
    return Trainer(stage or Fit(), TrainerOptions(output=str(folder), **options))


def log(folder, name="log.jsonl") -> list[dict]:
    rows = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def exported(folder) -> dict[str, torch.Tensor]:
    return torch.load(folder / "model" / "network.pt", weights_only=True)


def assert_same_run(one, other) -> None:
    assert log(one) == log(other)
    for name, value in exported(one).items():
        assert torch.equal(value, exported(other)[name])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of 6 steps without accident."""
    folder = tmp_path_factory.mktemp("whole")
    trainer(folder, validate_every=2).run()
    return folder


@pytest.mark.parametrize("kill_at", [2, 3, 5])
def test_a_killed_run_resumed_is_the_run_that_was_not(kill_at, whole, tmp_path):
    with pytest.raises(Killed):
        trainer(tmp_path, Fit(kill_at), validate_every=2).run()
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 4, "lo')  # and died while it wrote
    resumed = Fit()
    trainer(tmp_path, resumed, validate_every=2).run()
    assert len(resumed.seen) == (6 if kill_at < 3 else 3)
    assert_same_run(tmp_path, whole)
    assert log(tmp_path, "validation.jsonl") == log(whole, "validation.jsonl")


class ChannelsLast(Fit):
    layout = torch.channels_last


def test_channels_last_weights_learn_the_same_and_survive_a_kill(whole, tmp_path):
    """A checkpoint holds contiguous tensors, the optimizer's momentum has the order of the weight's memory."""
    trainer(tmp_path / "whole", ChannelsLast()).run()
    with pytest.raises(Killed):
        trainer(tmp_path / "killed", ChannelsLast(kill_at=5)).run()
    resumed = ChannelsLast()
    trainer(tmp_path / "killed", resumed).run()
    assert len(resumed.seen) == 3 and not resumed.network.weight.is_contiguous()
    assert_same_run(tmp_path / "killed", tmp_path / "whole")
    start, plain, last = (
        weights["weight"]
        for weights in (Fit().network.state_dict(), exported(whole), exported(tmp_path / "whole"))
    )
    assert (last - plain).norm() < 0.02 * (plain - start).norm()


def test_a_kill_between_the_renames_of_a_checkpoint_loses_nothing(whole, tmp_path):
    with pytest.raises(Killed):
        trainer(tmp_path, Fit(kill_at=5)).run()
    (tmp_path / "checkpoint").rename(tmp_path / "checkpoint.old")
    (tmp_path / "checkpoint.new").mkdir()  # half written
    resumed = Fit()
    trainer(tmp_path, resumed).run()
    assert len(resumed.seen) == 3
    assert_same_run(tmp_path, whole)


def test_a_finished_run_is_not_trained_again(whole, tmp_path):
    stage = Fit()
    trainer(tmp_path, Fit()).run()
    trainer(tmp_path, stage).run()
    assert stage.seen == []
    assert_same_run(tmp_path, whole)


def test_the_export_holds_averaged_weights(tmp_path):
    stage = Fit()
    trainer(tmp_path, stage, ema=0.75).run()
    own = [*stage.seen[1:], stage.network.state_dict()]  # after each step
    average = own[0]
    for weights in own[1:]:
        average = {name: 0.75 * average[name] + 0.25 * weights[name] for name in average}
    for name, value in exported(tmp_path).items():
        torch.testing.assert_close(value, average[name])
        assert not torch.equal(value, own[-1][name])
    assert log(tmp_path, "validation.jsonl")[-1]["weight"] == pytest.approx(
        float(average["weight"].sum()), rel=1e-4
    )


def test_without_an_average_the_export_holds_the_last_weights(tmp_path):
    stage = Fit()
    trainer(tmp_path, stage, ema=0).run()
    for name, value in exported(tmp_path).items():
        assert torch.equal(value, stage.network.state_dict()[name])


def test_a_loss_that_is_not_finite_names_its_step(tmp_path):
    with pytest.raises(
        UserError, match=r"loss is nan at step 4: lower muon_lr / adamw_lr and resume from .*checkpoint"
    ):
        trainer(tmp_path, Fit(nan_at=4)).run()
    assert [row["step"] for row in log(tmp_path)] == [0, 1, 2, 3]
    trainer(tmp_path).run()  # the checkpoint is from before
    assert [row["step"] for row in log(tmp_path)] == [0, 1, 2, 3, 4, 5]


def test_another_seed_is_another_run(whole, tmp_path):
    trainer(tmp_path, seed=1).run()
    assert log(tmp_path)[0]["loss"] != log(whole)[0]["loss"]


# --- optimizers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("warmup", "decay"), [(20, 0.45), (1, 1.0), (0, 0.0)])
def test_learning_rate_has_a_closed_form(warmup, decay):
    steps = 100
    for step in range(steps):
        rising = (step + 1) / warmup if step + 1 < warmup else 1.0
        falling = (steps - step) / (decay * steps) if steps - step < decay * steps else 1.0
        assert learning_rate_factor(step, steps, warmup, decay) == pytest.approx(rising * falling)
    assert learning_rate_factor(steps - 1, steps, warmup, decay) > 0


def test_learning_rates_reach_the_optimizers(tmp_path):
    made = trainer(tmp_path, muon_lr=1.0, adamw_lr=0.5, warmup=4, decay_fraction=0.5)
    rates = []
    for step in range(6):
        made._train_step(step)
        rates.append([group["lr"] for optimizer in made.optimizers for group in optimizer.param_groups])
    expected = np.array([learning_rate_factor(step, 6, 4, 0.5) for step in range(6)])
    assert np.array(rates) == pytest.approx(np.stack([expected, 0.5 * expected], 1))


@pytest.mark.parametrize("shape", [(6, 5), (4, 3, 3, 3), (8, 2, 1, 3, 3)])
def test_muon_updates_a_convolution_as_the_matrix_it_is(shape):
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(shape))
    matrix = nn.Parameter(weight.detach().flatten(1).clone())
    ours = Muon([weight], lr=0.1, weight_decay=0.05)
    theirs = torch.optim.Muon(
        [matrix], lr=0.1, weight_decay=0.05, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    for step in range(4):
        for optimizer in (ours, theirs):
            optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
        gradient = torch.randn(shape)
        weight.grad, matrix.grad = gradient, gradient.flatten(1)
        ours.step(), theirs.step()
        assert torch.equal(weight.detach().flatten(1), matrix.detach())
        ours.zero_grad()
        assert weight.grad is None
    ours.step()  # nothing to learn, nothing changes
    assert torch.equal(weight.detach().flatten(1), matrix.detach())


def test_hidden_matrices_go_to_muon_and_the_rest_to_adamw():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.hidden, self.deep = nn.Linear(4, 4), nn.Conv3d(4, 2, 3)
            self.patch_embedding, self.proj_out = nn.Linear(4, 4), nn.Linear(4, 4)
            self.scale_shift_table = nn.Parameter(torch.zeros(1, 6, 4))
            self.one = nn.Conv2d(1, 4, 1)  # a matrix of one column is a vector
            self.frozen = nn.Linear(4, 4).requires_grad_(False)

    network = Network()
    name_of = {id(parameter): name for name, parameter in network.named_parameters()}
    muon, adamw = build_optimizers(network, muon_lr=0.02, adamw_lr=0.01, weight_decay=0.1)
    assert [name_of[id(p)] for p in muon.originals] == ["hidden.weight", "deep.weight"]
    rest = {name_of[id(p)] for p in adamw.param_groups[0]["params"]}
    assert rest == {n for n in name_of.values() if "frozen" not in n} - {"hidden.weight", "deep.weight"}
    assert (muon.param_groups[0]["lr"], adamw.param_groups[0]["lr"]) == (0.02, 0.01)
    (only,) = build_optimizers(network, muon_lr=0.0, adamw_lr=0.01)
    assert isinstance(only, torch.optim.AdamW) and len(only.param_groups[0]["params"]) == len(name_of) - 2


# --- phases, micro-batches, accidents -------------------------------------------------------------------------------


class Two(Fit):
    """A generator and a critic that fit noise; the critic learns in every step."""

    def __init__(self, **accidents):
        super().__init__(**accidents)
        self.critic = nn.Linear(4, 4)

    def parts(self):
        return {"generator": self.network, "critic": self.critic}

    def phases(self, step):
        return ("generator", "critic") if step % 2 == 0 else ("critic",)

    def phase_batch(self, phase, seed, step, process):
        if step == self.kill_at:
            raise Killed
        # from the numbers that the trainer seeds for every phase
        return {"image": torch.randn(2, 3, 5, 5), "target": torch.randn(2, 4, 3, 3), "phase": phase}

    def forward(self, batch):
        image = self.network(batch["image"])
        error = image - batch["target"]
        if batch["phase"] == "critic":
            error = self.critic(image.detach().movedim(1, -1)) - batch["target"].movedim(1, -1)
        return error.square().mean(), {"random": torch.rand(())}


def test_phases_move_their_part_at_their_rate_and_survive_a_kill(tmp_path):
    options = {"muon_lr": 0.0, "adamw_lr": 1e-3, "critic_lr": 0.1, "warmup": 0, "decay_fraction": 0.0}
    trainer(tmp_path / "whole", Two(), **options).run()
    rows = log(tmp_path / "whole")
    assert "generator_loss" in rows[0] and "generator_loss" not in rows[1]
    assert all("critic_gradient_norm" in row for row in rows)
    assert rows[0]["generator_random"] != rows[0]["critic_random"]
    with pytest.raises(Killed):
        trainer(tmp_path / "killed", Two(kill_at=4), **options).run()
    trainer(tmp_path / "killed", Two(), **options).run()
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    made = trainer(tmp_path / "rates", Two(), **options)
    before = {name: p.clone() for name, p in made.stage.named_parameters()}
    made._train_step(1)
    moved = {name: float((p - before[name]).abs().max()) for name, p in made.stage.named_parameters()}
    assert moved["network.weight"] == 0 and moved["critic.weight"] == pytest.approx(0.1, rel=0.01)
    made._train_step(0)
    step = (made.stage.network.weight - before["network.weight"]).abs().max()
    assert float(step) == pytest.approx(1e-3, rel=0.01)


def test_micro_batches_are_a_mean(tmp_path):
    """Two micro-batches of a step are those of processes 0 and 1, and weigh one half each."""

    class Halves(Fit):
        def batch(self, seed, step, process):
            halves = [Fit.batch(self, seed, step, number) for number in (0, 1)]
            return {name: torch.cat([half[name] for half in halves]) for name in halves[0]}

    trainer(tmp_path / "two", Fit(), accumulate=2).run()
    trainer(tmp_path / "one", Halves()).run()
    for name, value in exported(tmp_path / "one").items():
        torch.testing.assert_close(exported(tmp_path / "two")[name], value, rtol=1e-3, atol=1e-5)
    assert log(tmp_path / "two")[0]["loss"] == pytest.approx(log(tmp_path / "one")[0]["loss"], rel=1e-4)


def test_a_step_that_is_not_finite_may_be_skipped(tmp_path, capsys):
    stage = Fit(nan_at=3)
    trainer(tmp_path, stage, on_nan="skip", ema=0, warmup=0).run()
    assert "step 3: loss is nan, update skipped" in capsys.readouterr().out
    rows = log(tmp_path)
    assert rows[3] == {"step": 3, "skipped": 1.0} and len(rows) == 6
    for name in stage.seen[3]:
        assert torch.equal(stage.seen[3][name], stage.seen[4][name])
        assert not torch.equal(stage.seen[4][name], stage.seen[5][name])


def test_a_gradient_that_is_not_finite_is_caught_too(tmp_path):
    class Spike(Fit):
        def forward(self, batch):
            loss, metrics = super().forward(batch)
            return loss + (self.network.bias[0] * 0).sqrt() * 0, metrics  # the root has no slope at 0

    with pytest.raises(UserError, match="gradient norm is nan at step 0"):
        trainer(tmp_path, Spike()).run()


def test_averages_start_when_they_are_told_to(tmp_path):
    stage = Fit()
    trainer(tmp_path, stage, ema=0.5, ema_from=4).run()
    own = [*stage.seen[1:], stage.network.state_dict()]  # after each step
    average = {name: 0.5 * own[4][name] + 0.5 * own[5][name] for name in own[0]}
    for name, value in exported(tmp_path).items():
        torch.testing.assert_close(value, average[name])


def test_checkpoints_wait_until_the_stage_is_at_rest(tmp_path):
    class Busy(Fit):
        def at_rest(self):
            return len(self.seen) % 4 == 0  # after the fourth step

    with pytest.raises(Killed):
        trainer(tmp_path, Busy(kill_at=4), checkpoint_every=2).run()
    resumed = Busy()
    trainer(tmp_path, resumed, checkpoint_every=2).run()
    assert len(resumed.seen) == 2


def test_a_checkpoint_of_another_configuration_is_one_sentence(tmp_path):
    trainer(tmp_path).run()
    with pytest.raises(UserError, match="has a checkpoint that does not fit this configuration") as failure:
        trainer(tmp_path, Two(), steps=9).run()
    assert "\n" not in str(failure.value)


def test_numbers_reach_tensorboard_once(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with pytest.raises(Killed):
        trainer(tmp_path, Fit(kill_at=5), report="tensorboard", validate_every=3).run()
    trainer(tmp_path, report="tensorboard", validate_every=3).run()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    found = {event.step: event.value for event in events.Scalars("log/loss")}
    assert found == pytest.approx({row["step"]: row["loss"] for row in log(tmp_path)}, rel=1e-4)
    assert [e.step for e in events.Scalars("log/loss")] == list(range(6))
    assert "validation/weight" in events.Tags()["scalars"]


def test_numbers_reach_weights_and_biases_without_a_network(tmp_path, monkeypatch):
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    trainer(tmp_path / "run", report="wandb", validate_every=3).run()
    wandb.teardown()  # its own process writes the file, when it likes: wait for the end of that one
    (file,) = (tmp_path / "run").glob("wandb/offline-run-*/run-run.wandb")
    written = file.read_bytes()
    assert written.count(b"log/loss") >= 6 and b"validation/weight" in written


def test_weights_and_biases_that_cannot_begin_are_one_sentence(tmp_path, monkeypatch):
    import wandb

    def refuse(**arguments):
        raise wandb.errors.UsageError("api_key not configured\n(no-tty)")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(
        UserError, match=r"cannot begin \(api_key not configured \(no-tty\)\): log in, set WANDB_MODE"
    ):
        trainer(tmp_path, report="wandb").run()


def test_reports_that_are_not_installed_are_told(tmp_path, monkeypatch):
    import sys

    for name, module in (("wandb", "wandb"), ("tensorboard", "torch.utils.tensorboard")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(UserError, match=f"report = '{name}' needs"):
            trainer(tmp_path, report=name).run()
