"""Training of the causal student: batches, losses, noise couplings, and rollouts that are streams."""

from itertools import islice

import numpy as np
import pytest
import tiny
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import save_file
from streamvid.pipelines.pipeline_streamvid import StreamVidPipeline
from transformers import UMT5Config, UMT5EncoderModel

from streamvid.errors import UserError
from streamvid.methods import Method
from streamvid.schedule import FewStepFlowScheduler
from streamvid.training import student_stage
from streamvid.training.latents import BLOCKS, Clips
from streamvid.training.student_stage import (
    VALIDATION_CLIPS,
    StudentStage,
    couple_noise,
    mean_latents,
    subject_weight,
)
from streamvid.training.text_stage import build_tokenizer
from streamvid.transformer import CausalWanTransformer3DModel
from streamvid.world.scene import ATTRIBUTES, change_scene, sample_scene

TRANSFORMER = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "text_dim": 16,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 2,
    "text_len": 40,
}
SCHEDULER = {"shift": 3.0, "denoising_steps": [1000, 500], "prediction_type": "sample"}
WINDOW = {"frames_per_block": 3, "window": 12, "sink": 3, "positions": "cache_relative"}
CLIPS = VALIDATION_CLIPS + 40


def synthetic_clips(count: int = CLIPS) -> dict[str, torch.Tensor]:
    """Clips whose latents follow from their labels; every third is late, every second switches at a block."""
    rng = np.random.default_rng(0)
    colours = torch.from_numpy(rng.standard_normal((8, 16)))
    labels, late = [], []
    for index in range(count):
        scene = sample_scene(rng)
        other = change_scene(rng, scene, 2) if index % 2 else scene
        switch = int(rng.integers(1, BLOCKS))
        labels.append([(other if block >= switch else scene).labels() for block in range(BLOCKS)])
        late.append(index % 3 == 2)
    labels = torch.tensor(labels)
    place = list(ATTRIBUTES).index("colour")
    picture = colours[labels[..., place]].repeat_interleave(3, 1)[..., None, None]  # N 15 C 1 1
    noise = torch.from_numpy(rng.standard_normal((count, 15, 16, 4, 4)))
    return {
        "latents": (picture + 0.3 * noise).half(),
        "labels": labels,
        "scenery": torch.from_numpy(rng.random((count, 6))).float(),
        "late": torch.tensor(late),
    }


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """Clips, a text encoder with its tokenizer and a VAE."""
    root = tmp_path_factory.mktemp("student")
    (root / "latents").mkdir()
    save_file(synthetic_clips(), root / "latents" / "shard_0000.safetensors")
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    config = UMT5Config(
        vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, pad_token_id=0
    )
    UMT5EncoderModel(config).save_pretrained(root / "text" / "text_encoder")
    tokenizer.save_pretrained(root / "text" / "tokenizer")
    tiny.vae(residual=True).save_pretrained(root / "vae")
    return {name: str(root / name) for name in ("latents", "text", "vae")}


@pytest.fixture
def stage(folders):
    def build(seed: int = 0, **options) -> StudentStage:
        torch.manual_seed(seed)
        parts = {"transformer": TRANSFORMER, "scheduler": SCHEDULER, "window": WINDOW, **folders}
        return StudentStage(**{**parts, "batch_size": 4, "first_block_batch": 6, **options})

    return build


def wake(made: StudentStage) -> StudentStage:
    """Random weights instead of zeros, so that predictions depend on everything."""
    made.transformer.load_state_dict(tiny.transformer(**TRANSFORMER).state_dict())
    return made


def prepared(made: StudentStage, kind: str, index=(0, 1, 3, 4), seed: int = 0):
    """A batch of chosen clips (2, 5, 8, ... are late; odd ones switch)."""
    return made._prepare(made.clips, torch.as_tensor(list(index)), kind, np.random.default_rng(seed))


# --- batches --------------------------------------------------------------------------------------------------------

KINDS = ["first block", "teacher forcing", "rollout"]


def test_a_batch_is_a_pure_function_of_seed_step_and_process(stage):
    made = stage(rollout_from=0)
    for step in range(6):
        one, other = made.batch(0, step, 0), made.batch(0, step, 1)
        noise = torch.randn(1)
        twin = stage(rollout_from=0).batch(0, step, 1)
        assert torch.equal(noise, torch.randn(1))  # the noise of the step follows too
        assert one["kind"] == other["kind"] == twin["kind"]  # all processes do the same work
        assert not torch.equal(one["scenery"], other["scenery"])
        for name in ("latents", "scenery", "text", "weight"):
            assert torch.equal(other[name], twin[name])


def kinds_of(made: StudentStage, steps=range(400)) -> list[str]:
    made._prepare = lambda clips, index, kind, rng: {"kind": kind, "index": index}
    return [made.batch(0, step, 0)["kind"] for step in steps]


def test_shares_of_the_kinds_of_steps(stage):
    kinds = kinds_of(stage(first_block_share=0.2, rollout_share=0.5, rollout_from=0))
    assert [kinds.count(kind) / 400 for kind in KINDS] == pytest.approx([0.2, 0.3, 0.5], abs=0.07)
    kinds = kinds_of(stage(first_block_share=0.2, rollout_share=0.5, rollout_from=300))
    assert "rollout" not in kinds[:300] and "rollout" in kinds[300:]
    assert set(kinds_of(stage(first_block_share=1.0), range(50))) == {"first block"}


def test_sizes_and_clips_of_the_kinds_of_steps(stage):
    made = stage(batch_size=5, first_block_batch=7, rollout_from=0)
    made._prepare = lambda clips, index, kind, rng: {"kind": kind, "index": index}
    drawn = {kind: set() for kind in KINDS}
    for step in range(200):
        batch = made.batch(0, step, 0)
        index = batch["index"].tolist()
        assert len(set(index)) == (7 if batch["kind"] == "first block" else 5)
        drawn[batch["kind"]].update(index)
    late = set(torch.nonzero(made.clips.late)[:, 0].tolist())
    assert drawn["rollout"].isdisjoint(late)  # a rollout needs the whole story
    assert drawn["teacher forcing"] >= late and drawn["first block"] >= late


def test_validation_clips_are_not_trained_on(stage):
    made = stage()
    assert (len(made.validation_clips), len(made.clips)) == (VALIDATION_CLIPS, 40)
    whole = synthetic_clips()
    assert torch.equal(made.clips.latents, whole["latents"][VALIDATION_CLIPS:])
    assert torch.equal(made.clips.late, whole["late"][VALIDATION_CLIPS:])


@pytest.mark.parametrize("options", [{"first_block_batch": 41}, {"batch_size": 28}])
def test_too_few_clips_are_refused(options, stage):
    with pytest.raises(UserError, match=r"holds 104 clips and a step needs more: encode at least"):
        stage(**options)


def test_every_block_has_the_text_of_its_scene(stage):
    made = stage()
    batch = prepared(made, "teacher forcing", range(12))
    assert batch["text"].shape == (12, 5, 40, 16)
    labels = made.clips.labels[:12]
    for row in range(12):
        for one in range(BLOCKS):
            for other in range(BLOCKS):
                same = torch.equal(batch["text"][row, one], batch["text"][row, other])
                assert same == torch.equal(labels[row, one], labels[row, other])


def test_the_frozen_encoder_has_no_dropout(stage):
    made = stage().train()
    assert made.transformer.training and not made.text_encoder.training
    prompts = ["a small red ball bounces"]
    assert torch.equal(made._encode(prompts), made._encode(prompts))
    assert not any(parameter.requires_grad for parameter in made.text_encoder.parameters())


# --- losses ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_clips(kind, stage):
    made = stage(context_noise=0.0)
    batch = prepared(made, kind, (0, 1, 3))
    optimizer = torch.optim.AdamW(made.trainable().parameters(), lr=8e-3)
    losses = []
    for _ in range(20):
        torch.manual_seed(0)  # the same noise
        loss, metrics = made(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    assert list(metrics) == [f"error_{kind.replace(' ', '_')}"] and metrics[next(iter(metrics))] > 0
    assert all(parameter.grad is None for parameter in made.text_encoder.parameters())


def test_a_new_student_predicts_zero_and_all_of_it_learns(stage):
    made = stage()
    for step in range(3):  # zero projections open one after the other
        loss, _ = made(prepared(made, "teacher forcing"))
        loss.backward()
        if step == 0:
            predicted = made._predict(
                None, torch.ones(1, 1, 16, 3, 4, 4), torch.ones(1, 1, 3), torch.ones(1, 1, 40, 16), None
            )
            assert (predicted == 0).all()
        torch.optim.SGD(made.transformer.parameters(), lr=0.1).step()
    made.transformer.zero_grad()
    made(prepared(made, "teacher forcing"))[0].backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in made.transformer.parameters())


def test_late_clips_count_where_the_window_is_true(stage):
    """Blocks 1 and 2 of a late clip lack the blocks before them; 3 and 4 have all but the gap."""
    made = stage()
    index = torch.tensor([0, 2, 4, 5])
    batch, late = prepared(made, "teacher forcing", index), made.clips.late[index]
    assert late.tolist() == made.clips.late[:6][index].tolist() and 0 < late.sum() < 4
    counted = batch["weight"].amax((2, 3)) > 0
    assert counted[~late].all()
    assert counted[late].tolist() == [[True] * 3 + [False] * 6 + [True] * 6] * int(late.sum())
    # what is not counted does not reach the loss
    made._predict = lambda context, noisy, *_: torch.zeros_like(noisy)
    batch["recached"] = None
    losses = []
    for other in (0.0, 1e3):
        batch["latents"] = batch["latents"].clone()
        batch["latents"][late, :, 3:9] = other
        torch.manual_seed(0)
        losses.append(made(batch)[0].item())
    assert losses[0] == losses[1]


def test_first_block_steps_see_the_first_block_only(stage):
    made = stage(noisy_streams=2)
    batch = prepared(made, "first block")
    assert batch["latents"].shape == (4, 16, 3, 4, 4) and batch["text"].shape[1] == 1
    assert batch["recached"] is None
    seen = []
    made._predict = lambda *arguments: seen.append(arguments) or arguments[1]
    made(batch)
    context, noisy, sigma, *_ = seen[0]
    assert context is None and noisy.shape == (4, 4, 16, 3, 4, 4) and sigma.shape == (4, 4, 3)


def test_after_a_recache_old_blocks_are_told_the_new_prompt_and_not_counted(stage):
    made = stage()
    index = [i for i in range(12) if i % 2 and not made.clips.late[i]]
    for seed in range(20):
        batch = prepared(made, "teacher forcing", index, seed)
        if (batch["recached"] < BLOCKS).any() and (batch["recached"] == BLOCKS).any():
            break
    labels, text = made.clips.labels[index], batch["text"]
    context = made._context_text(text, batch["recached"])
    made._predict = lambda context, noisy, *_: torch.zeros_like(noisy)
    for row, first in enumerate(batch["recached"].tolist()):
        if first == BLOCKS:
            assert torch.equal(context[row], text[row])
            continue
        switch = next(b for b in range(1, BLOCKS) if not torch.equal(labels[row, b], labels[row, b - 1]))
        assert first == switch
        assert torch.equal(context[row, 0], text[row, 0])  # the sink keeps its prompt
        assert all(torch.equal(context[row, block], text[row, first]) for block in range(1, BLOCKS))
    losses = []
    for other in (0.0, 1e3):  # frames before the switch do not reach the loss
        for row, first in enumerate(batch["recached"].tolist()):
            if first < BLOCKS:
                batch["latents"][row, :, : 3 * first] = other
        torch.manual_seed(0)
        losses.append(made(batch)[0].item())
    assert losses[0] == losses[1]


def test_noise_levels_are_those_of_the_sampler_and_some_between(stage):
    made = stage()
    torch.manual_seed(0)
    clean = torch.zeros(200, 16, 15, 4, 4)
    noisy, sigma = made._noisy(clean, 2, torch.rand(200, 6))
    assert noisy.shape == (200, 2, 16, 15, 4, 4) and sigma.shape == (200, 2, 15)
    per_block = sigma.unflatten(2, (BLOCKS, 3))
    assert (per_block == per_block[..., :1]).all()  # one level per block
    levels = torch.tensor(made.scheduler.step_sigmas)
    share = (sigma[..., None] == levels).any(-1).float().mean()
    assert share == pytest.approx(0.75, abs=0.04) and sigma.min() >= 0 and sigma.max() <= 1
    spread = noisy.transpose(2, 3).flatten(3).std(-1)  # of clean latents 0: sigma itself
    torch.testing.assert_close(spread, sigma, atol=0.2, rtol=0)
    assert spread.mean() == pytest.approx(sigma.mean().item(), rel=0.01)


def test_context_noise_is_in_half_of_the_clips_up_to_its_limit(stage):
    torch.manual_seed(0)
    clean = torch.zeros(400, 16, 3, 4, 4)
    level = stage(context_noise=0.4)._noised_context(clean).flatten(1).std(1)
    noised = level > 0
    assert noised.float().mean() == pytest.approx(0.5, abs=0.1)
    assert level[noised].mean() == pytest.approx(0.2, abs=0.02) and level.max() < 0.45
    assert torch.equal(stage(context_noise=0.0)._noised_context(clean), clean)


# --- closed forms ---------------------------------------------------------------------------------------------------


def projections(noise: torch.Tensor) -> torch.Tensor:
    """Of the noise on the six unit vectors of the coupling, `[B, S, 6]`."""
    return noise[:, :, :6, 0, :4, :4].sum((-1, -2)) / 4


def test_coupled_noise_has_the_quantile_as_its_projection():
    noise, scenery = torch.randn(50, 2, 8, 3, 5, 6), torch.rand(50, 6)
    coupled = couple_noise(noise, scenery, torch.ones(50, 2, dtype=torch.bool))
    quantile = torch.special.ndtri(scenery.clamp(1e-4, 1 - 1e-4))
    for stream in range(2):
        torch.testing.assert_close(projections(coupled)[:, stream], quantile, atol=1e-5, rtol=1e-5)
    # all other directions stay: the rest of the patch, other channels, frames and places
    mean, old = (x[:, :, :6, 0, :4, :4].mean((-1, -2), keepdim=True) for x in (coupled, noise))
    rest, before = coupled.clone(), noise.clone()
    rest[:, :, :6, 0, :4, :4] -= mean
    before[:, :, :6, 0, :4, :4] -= old
    torch.testing.assert_close(rest, before, atol=1e-5, rtol=0)


def test_coupling_touches_chosen_streams_only():
    noise, scenery = torch.randn(6, 3, 8, 3, 4, 4), torch.rand(6, 6)
    only, given = torch.tensor([[True, False, True], [False, True, False]] * 3), noise.clone()
    coupled = couple_noise(noise, scenery, only)
    assert torch.equal(coupled[~only], noise[~only])
    assert all(not torch.equal(one, other) for one, other in zip(coupled[only], noise[only], strict=True))
    assert torch.equal(noise, given)  # a copy is made


def test_coupled_noise_is_standard_normal():
    """For uniform scenery: moments of the coupled directions and their neighbours, and no correlations."""
    torch.manual_seed(0)
    count = 20_000
    noise, scenery = torch.randn(count, 1, 6, 1, 4, 4), torch.rand(count, 6)
    coupled = couple_noise(noise, scenery, torch.ones(count, 1, dtype=torch.bool))[:, 0, :, 0].flatten(1)
    error = 4 / count**0.5
    assert coupled.mean(0).abs().max() < error
    covariance = coupled.T @ coupled / count
    assert (covariance - torch.eye(96)).abs().max() < 1.5 * error
    for moment, expected in ((3, 0.0), (4, 3.0)):
        assert (coupled**moment).mean() == pytest.approx(expected, abs=0.06)
    ordered = (coupled[:, :16].sum(1) / 4).sort().values  # Kolmogorov-Smirnov
    distance = (torch.special.ndtr(ordered) - torch.arange(count) / count).abs().max()
    assert distance < 1.63 / count**0.5


def some_clips() -> Clips:
    data = synthetic_clips(30)
    return Clips(data["latents"], data["labels"], data["scenery"], data["late"])


def test_mean_latents_are_those_of_a_backdrop():
    clips = some_clips()
    means = mean_latents(clips)
    assert means.shape == (4 * 4 * 3, 16, 4, 4)
    names = list(ATTRIBUTES)
    ground, sky, weather = (names.index(name) for name in ("ground", "sky", "weather"))
    frames = {}
    for clip in range(len(clips)):
        for block in range(BLOCKS):
            row = clips.labels[clip, block].tolist()
            key = (row[ground] * 4 + row[sky]) * 3 + row[weather]
            frames.setdefault(key, []).extend(clips.latents[clip, 3 * block : 3 * block + 3].float())
    for key in range(48):
        expected = torch.stack(frames[key]).mean(0) if key in frames else torch.zeros(16, 4, 4)
        torch.testing.assert_close(means[key], expected, atol=1e-5, rtol=1e-4)


def test_what_deviates_from_its_backdrop_weighs_more():
    labels = some_clips().labels[:2]
    means = torch.zeros(48, 16, 4, 4)
    latents = torch.full((2, 16, 15, 4, 4), 0.01)
    latents[:, :, :, 1, 2] = 1.0  # the subject
    weight = subject_weight(latents, labels, means)
    deviation = torch.full((4, 4), 0.01)
    deviation[1, 2] = 1.0
    expected = 0.4 + 0.6 * (deviation / deviation.mean()).clamp_max(6)
    torch.testing.assert_close(weight, expected.expand(2, 15, 4, 4))
    assert weight.max() == pytest.approx(4.0)
    even = subject_weight(torch.ones(2, 16, 15, 4, 4), labels, means)
    torch.testing.assert_close(even, torch.ones(2, 15, 4, 4))  # nothing stands out: all weigh 1


# --- rollouts -------------------------------------------------------------------------------------------------------


def record(made: StudentStage, monkeypatch):
    """Prompts, and the noise of every block and step, as a rollout uses them."""
    prompts, draws = [], {}
    encode, sample = made._encode, student_stage.few_step_block

    def spy_encode(texts):
        prompts.extend(texts)
        return encode(texts)

    def spy_sample(transformer, scheduler, steps, plan, kv, cache, noise, on_step):
        def kept(block, step, frames):
            return draws.setdefault((block, step), noise(block, step, frames))

        return sample(transformer, scheduler, steps, plan, kv, cache, kept, on_step=on_step)

    monkeypatch.setattr(made, "_encode", spy_encode)
    monkeypatch.setattr(student_stage, "few_step_block", spy_sample)
    return prompts, draws


def test_a_rollout_is_a_stream(stage, monkeypatch):
    """The contexts that the student learns from are, bit for bit, what a stream with the same noise makes."""
    made = wake(stage())
    prompts, draws = record(made, monkeypatch)
    batch = prepared(made, "rollout", (0, 1, 3))
    torch.manual_seed(0)
    own, noisy, sigma = made._own_inputs(batch)
    told = [prompts[row * BLOCKS : (row + 1) * BLOCKS] for row in range(3)]
    assert any(len(set(row)) > 1 for row in told)  # a prompt switches on the way

    pipe = StreamVidPipeline(
        made.tokenizer, made.text_encoder, made.transformer, tiny.vae(), made.scheduler, height=32, width=32
    )
    stream = pipe.stream(
        [row[0] for row in told],
        method=Method("student", transition="cross_only", **WINDOW),
        noise=lambda block, step, frames: draws[block, step],
        attention="reference",
        decode_pixels=False,
    )
    for block, chunk in enumerate(islice(stream, BLOCKS)):
        assert torch.equal(chunk.latents, own[:, :, 3 * block : 3 * block + 3])
        if block + 1 < BLOCKS:
            stream.prompt([row[block + 1] for row in told])

    # noisy inputs: step 0 is the noise itself, step 1 the first prediction with new noise
    levels = list(made.scheduler.step_sigmas)
    assert sorted(sigma[0, :, 0].tolist()) == sorted(levels) and (sigma == sigma[:1, :, :1]).all()
    first = sigma[0, :, 0].tolist().index(levels[0])
    drawn = torch.cat([draws[block, 0] for block in range(BLOCKS)], 2)
    assert torch.equal(noisy[:, first], drawn)
    quantile = torch.special.ndtri(batch["scenery"].clamp(1e-4, 1 - 1e-4))
    torch.testing.assert_close(
        projections(draws[0, 0][:, None])[:, 0], quantile, atol=1e-5, rtol=1e-5
    )  # the first block's noise names the clip's scenery


def test_noisy_streams_of_a_rollout(stage):
    made = wake(stage(noisy_streams=1))
    _, noisy, sigma = made._own_inputs(prepared(made, "rollout"))
    assert noisy.shape == (4, 1, 16, 15, 4, 4) and sigma.shape == (4, 1, 15)


def test_a_stage_goes_on_from_a_saved_transformer(stage, tmp_path):
    saved = wake(stage())
    saved.export(tmp_path)
    resumed = stage(seed=5, start_from=str(tmp_path / "transformer"))
    batch = prepared(saved, "teacher forcing")
    losses = []
    for made in (saved, resumed, stage()):
        torch.manual_seed(0)
        losses.append(made(batch)[0].item())
    assert losses[0] == losses[1] != losses[2]


def test_window_and_schedule_are_options(stage):
    batch = prepared(stage(), "teacher forcing")

    def loss(**options) -> float:
        made = wake(stage(**options))
        torch.manual_seed(0)
        return made(batch)[0].item()

    plain = loss()
    assert loss(window={**WINDOW, "window": 6}) != plain
    assert loss(window={**WINDOW, "window": 6}) != loss(window={**WINDOW, "window": 6, "sink": 0})
    assert loss(window={**WINDOW, "positions": "absolute"}) != plain
    assert loss(scheduler={**SCHEDULER, "shift": 1.0}) != plain
    assert loss(context_noise=1.0) != plain
    assert stage(transformer={**TRANSFORMER, "num_layers": 1}).transformer.config.num_layers == 1


def test_validation_measures_rollouts_and_shows_some(stage, tmp_path):
    made = wake(stage())
    made.validation_clips = student_stage._select(made.validation_clips, torch.arange(VALIDATION_CLIPS) < 12)
    numbers = made.validate(tmp_path, 7)
    assert list(numbers) == [f"rollout_error_{block}" for block in range(BLOCKS)]
    assert all(value > 0 for value in numbers.values()) and (tmp_path / "step_7.png").is_file()
    torch.manual_seed(99)
    assert made.validate(tmp_path, 7) == numbers  # whatever was drawn before


def test_the_export_is_what_a_pipeline_loads(stage, tmp_path):
    made = wake(stage())
    made.export(tmp_path)
    transformer = CausalWanTransformer3DModel.from_pretrained(tmp_path / "transformer")
    for name, value in made.transformer.state_dict().items():
        assert torch.equal(value, transformer.state_dict()[name])
    assert FewStepFlowScheduler.from_pretrained(tmp_path / "scheduler").steps == made.scheduler.steps
    assert isinstance(AutoencoderKLWan.from_pretrained(made.vae_path), AutoencoderKLWan)
