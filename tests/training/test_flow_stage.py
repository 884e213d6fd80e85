"""Flow matching on real clips: closed forms, what blocks attend, and recycled errors."""

import pytest
import tiny
import torch

from streamvid.errors import UserError
from streamvid.methods import load_method
from streamvid.schedule import training_weights
from streamvid.training.causal_forward import clip_x0, joint_levels, joint_windows, method_plans
from streamvid.training.datasets import ShardWriter
from streamvid.training.error_recycling import ErrorBank, RecyclingOptions
from streamvid.training.flow_stage import FlowStage
from streamvid.window import WindowOptions


@pytest.fixture
def stage(model_folder, latents_folder):
    def build(method="longlive", recycling=None, batch_size=2, overrides=None, **flow) -> FlowStage:
        torch.manual_seed(0)
        model = {"folder": model_folder, "method": method, "overrides": overrides or {}}
        options = {"frames": 12, "unconditional_share": 0.0, **flow}
        return FlowStage(model, latents_folder, batch_size, options, recycling).train()

    return build


def test_the_bidirectional_loss_in_closed_form(stage):
    for weighting in ("gaussian", "x0", "none"):
        made = stage(weighting=weighting)
        batch = made.batch(0, 0, 0)
        loss, numbers = made(batch)
        x_0, noise, t = batch["x_0"], batch["noise"], batch["timestep"]
        assert (t == t[:, :1]).all()  # one level per clip
        sigma = made.scheduler.sigma(t)[:, None, :, None, None]
        x_t = (1 - sigma) * x_0 + sigma * noise
        flow = made.transformer(x_t, t, made.encode(batch["prompts"])).sample
        error = (flow - (noise - x_0)).square()
        if weighting == "gaussian":
            row = made.scheduler.nearest_index(t)
            error = error * training_weights(made.scheduler.timesteps)[row][:, None, :, None, None]
        elif weighting == "x0":
            error = error * sigma**2 / (sigma**2 + 0.05)
        torch.testing.assert_close(loss, error.mean(), rtol=1e-3, atol=1e-5)
        assert numbers["x0_error"] > 0


def test_causal_contexts_have_a_level_per_block_and_see_what_a_stream_sees(stage):
    """Teacher forcing: block by block through the cache of inference."""
    made = stage(context="teacher_forcing", overrides={"window": 9})
    batch = made.batch(0, 0, 0)
    times = batch["timestep"]
    assert (times.unflatten(1, (4, 3)).std(-1) == 0).all() and len(times[0].unique()) == 4
    made.transformer.requires_grad_(False)
    x_t = made.denoiser.noisy(batch["x_0"], batch["noise"], times)
    text = made.encode(batch["prompts"])
    with torch.no_grad():
        predicted = clip_x0(made.denoiser, x_t, times, text, made.plans, batch["x_0"])
        cache = tiny.context_cache(made.method.window_options(), batch=2)
        kv, found = made.transformer.prompt_kv(text), []
        for block in range(4):
            own = slice(3 * block, 3 * block + 3)
            plan = cache.planner.plan()
            cache.begin(plan)
            noisy, t = x_t[:, :, own], times[:, own]
            output = made.transformer(noisy, t, prompt_kv=kv, context=cache).sample
            found.append(made.scheduler.x0_from_output(output, noisy, made.denoiser.sigma(t)))
            made.transformer(batch["x_0"][:, :, own], torch.zeros(2, 3), prompt_kv=kv, context=cache)
            cache.commit(plan, batch["x_0"][:, :, own])
    torch.testing.assert_close(predicted, torch.cat(found, 2), rtol=1e-4, atol=1e-4)


def test_options_of_the_flow_count(stage):
    def loss(**changes):
        made = stage(**{"context": "teacher_forcing", **changes})
        return made(made.batch(0, 0, 0))[0].item()

    plain = loss()
    assert loss(context_noise=500.0) != plain and loss(context="diffusion_forcing") != plain
    assert loss(unconditional_share=1.0) != plain
    assert loss(unconditional_share=1.0) != loss(unconditional_share=1.0, negative_prompt="night falls")


def test_weights_beside_clips_count(model_folder, tmp_path):
    """The loss is linear in them; folders without weights are refused."""
    clips, losses = tiny.clip(1, 12, batch=3).transpose(1, 2).half(), []
    halves = torch.zeros(3, 12, 4, 4)
    for name, weights in (("left", halves), ("right", halves), ("both", halves + 1)):
        weights = weights.clone()
        if name != "both":
            weights[..., slice(0, 2) if name == "left" else slice(2, 4)] = 1
        writer = ShardWriter(
            tmp_path / name, {"kind": "latents", "shape": [12, *tiny.LATENT], "weights": True}
        )
        writer.write("a", clips, [["a red fox"]] * 3, weights=weights.half())
        flow = {"frames": 12, "unconditional_share": 0.0, "weighted": True}
        made = FlowStage({"folder": model_folder}, str(tmp_path / name), 2, flow)
        losses.append(made(made.batch(0, 0, 0))[0])
        assert made.shards.weights([0]).shape == (1, 1, 12, 4, 4)
    left, right, both = losses
    plain = FlowStage({"folder": model_folder}, str(tmp_path / "left"), 2, {**flow, "weighted": False})
    torch.testing.assert_close(left + right, both)
    torch.testing.assert_close(both, plain(plain.batch(0, 0, 0))[0])
    assert abs(left - right) > 1e-4


def test_clips_held_out_are_validated_on_and_never_drawn(stage, tmp_path):
    made = stage(held_out=6, batch_size=2)
    drawn = {tuple(made.batch(0, step, 0)["prompts"]) for step in range(20)}
    assert len({p for pair in drawn for p in pair}) == 2
    with torch.no_grad():
        assert made.eval().validate(tmp_path, 0) == made.validate(tmp_path, 1) != {}
    assert stage().validate(tmp_path, 0) == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": "fox"}, "stage.flow.context = 'fox' is not known: choose one of bidirectional"),
        ({"weighting": "fox"}, "stage.flow.weighting = 'fox' is not known"),
        ({"context": "moving_buffer"}, "needs a method with sampler = rolling"),
        ({"batch_size": 9}, "stage.batch_size = 9 must be between 1 and the 8 clips"),
        ({"frames": 15}, "frames = 15 is more than the 12"),
        ({"recycling": {}}, "stage.recycling needs stage.flow.context = teacher_forcing"),
        ({"fox": 1}, "stage.flow.fox is not an option"),
        ({"weighted": True}, "weighted = true needs clips with weights, and .* has none"),
    ],
)
def test_mistakes_are_one_sentence(stage, options, message):
    with pytest.raises(UserError, match=message):
        stage(**options)


# --- moving buffer ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", range(3))
def test_windows_lie_end_to_end_and_see_what_the_rolling_stream_sees(offset):
    options, blocks = WindowOptions(2, 12, 2, "sink_before_window", joint_blocks=3), 8
    plans = joint_windows(options, blocks, offset)
    assert [frame for plan in plans for frame in plan.frames] == list(range(2 * blocks))
    assert len(plans[0].own) == 2 * (offset + 1)
    levels = joint_levels(plans, 2, 3, blocks)[::2].tolist()
    expected = []
    for block in range(blocks):  # window w holds blocks w - 2 .. w
        window = next(w for w in range(block, block + 3) if w % 3 == offset)
        expected.append(window - block)
    assert levels == expected


def test_a_moving_buffer_has_rising_noise_and_trains(stage):
    made = stage("streamdit", context="moving_buffer")
    method = load_method("streamdit")
    batch = made.batch(0, 0, 0)
    assert batch["joint"] is not None
    size = method.frames_per_block
    start = 0
    for plan in batch["joint"]:
        times = batch["timestep"][:, start : start + len(plan.own) : size]
        assert (times.diff(dim=1) > 0).all()  # newer is noisier
        start += len(plan.own)
    loss, _ = made(batch)
    loss.backward()
    assert made.transformer.blocks[0].attn1.to_q.weight.grad.abs().sum() > 0
    again = made.batch(0, 1, 0)
    assert not torch.equal(batch["timestep"], again["timestep"])


def test_a_joint_window_in_one_forward_is_the_rolling_forward(stage):
    made = stage("rolling_forcing", context="moving_buffer")
    made.transformer.requires_grad_(False)
    options = made.method.window_options(5)
    plans = joint_windows(options, 4, 1)
    clean, noise = tiny.clip(1, 12, 2), tiny.clip(2, 12, 2)
    times = torch.linspace(900, 300, 12).expand(2, -1)
    text = tiny.text(3, 2)
    with torch.no_grad():
        together = clip_x0(made.denoiser, noise, times, text, method_plans(made.method, 4), clean, 0.0, plans)
        cache = tiny.context_cache(options, batch=2)
        kv = made.transformer.prompt_kv(text)
        for block in range(2):
            own = slice(3 * block, 3 * block + 3)
            plan = cache.planner.plan()
            cache.begin(plan)
            made.transformer(clean[:, :, own], torch.zeros(2, 3), prompt_kv=kv, context=cache)
            cache.commit(plan, clean[:, :, own])
        plan = cache.planner.plan(6)
        cache.begin(plan)
        output = made.transformer(noise[:, :, 6:], times[:, 6:], prompt_kv=kv, context=cache).sample
    alone = made.scheduler.x0_from_output(output, noise[:, :, 6:], made.denoiser.sigma(times[:, 6:]))
    torch.testing.assert_close(together[:, :, 6:], alone, rtol=1e-4, atol=1e-4)


# --- error recycling --------------------------------------------------------------------------------------------------


def bank(**options) -> ErrorBank:
    return ErrorBank(RecyclingOptions(**{"buckets": 4, "entries": 2, "warmup": 0, **options}), (1, 1, 1), 1)


ALWAYS = {"clean": 0.0, "context": 1.0, "latent": 1.0, "noise": 1.0, "scale": 0.5}


def test_errors_are_kept_by_timestep_and_put_back(rng=None):
    import numpy as np

    made, rng = bank(**ALWAYS), np.random.default_rng(0)
    times, sigma = torch.tensor([[900.0, 100.0]]), torch.tensor([0.9, 0.1]).view(1, 1, 2, 1, 1)
    error = torch.tensor([2.0, 8.0]).view(1, 1, 2, 1, 1)
    zeros = torch.zeros(1, 1, 2, 1, 1)
    assert torch.equal(made.inject(rng, zeros, zeros, zeros, times)[1], zeros)  # nothing is known yet
    made.remember(rng, error, sigma, times)
    assert made.filled.tolist() == [1, 0, 0, 1]
    clean, latent, noise = made.inject(rng, zeros, zeros, zeros, times)
    torch.testing.assert_close(latent, 0.5 * error)
    torch.testing.assert_close(noise, -0.5 * error / sigma * (1 - sigma), rtol=1e-2, atol=1e-2)
    assert set(clean.flatten().tolist()) <= {1.0, 4.0}
    elsewhere = made.inject(rng, zeros, zeros, zeros, torch.tensor([[600.0, 400.0]]))[1]
    assert torch.equal(elsewhere, zeros)


@pytest.mark.parametrize("part", ["context", "latent", "noise"])
def test_probabilities_of_errors(part):
    import numpy as np

    made, rng = (
        bank(**{**ALWAYS, "context": 0.0, "latent": 0.0, "noise": 0.0, part: 0.5, "clean": 0.2}),
        np.random.default_rng(0),
    )
    one = torch.ones(1, 1, 1, 1, 1)
    made.remember(rng, one, 0.5 * one, torch.tensor([[500.0]]))
    zero, counts = torch.zeros(1, 1, 1, 1, 1), np.zeros(3)
    for _ in range(400):
        counts += [
            bool(t.abs().sum() > 0) for t in made.inject(rng, zero, zero, zero, torch.tensor([[500.0]]))
        ]
    expected = [160 if name == part else 0 for name in ("context", "latent", "noise")]
    assert counts == pytest.approx(expected, abs=45)


def test_errors_change_the_loss_once_the_bank_is_warm(stage):
    made = stage(
        context="teacher_forcing",
        recycling={"buckets": 2, "entries": 4, "warmup": 1, "clean": 0.0, "latent": 1.0},
    )
    first, _ = made(made.batch(0, 0, 0))
    second, _ = made(made.batch(0, 0, 0))
    assert first != second and int(made.bank.filled.sum()) > 0
    assert "bank.latents" in made.state_dict()
