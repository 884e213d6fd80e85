"""Training of the causal student: batches, losses, noise couplings, and rollouts that are streams."""

import re
import shutil
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import save_file
from streamvid.pipelines.pipeline_streamvid import StreamVidPipeline
from test_noise_coupling import projections
from transformers import UMT5Config, UMT5EncoderModel

from streamvid.errors import UserError
from streamvid.methods import Method
from streamvid.schedule import FewStepFlowScheduler
from streamvid.training import student_stage
from streamvid.training.latents import BLOCKS, Clips
from streamvid.training.noise_coupling import COUPLED_PLACES, PLACES
from streamvid.training.student_stage import (
    COUPLED_SIGMA,
    FIRST_STEP_SHARE,
    VALIDATION_CLIPS,
    StudentStage,
    _beside,
    mean_latents,
    subject_weight,
)
from streamvid.training.text_stage import build_tokenizer
from streamvid.transformer import CausalWanTransformer3DModel, PromptKV
from streamvid.world.scene import ATTRIBUTES, SCENERY, change_scene, sample_scene, sample_scenery

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
CLIPS, FIRST_BLOCKS = VALIDATION_CLIPS + 40, 13


COUPLED = [list(SCENERY).index(name) for name in COUPLED_PLACES]  # columns of a clip's cells
K = len(COUPLED)


def synthetic_clips(count: int = CLIPS, seed: int = 0) -> dict[str, torch.Tensor]:
    """Clips whose latents follow from their labels; every third is late, every second switches at a block."""
    rng = np.random.default_rng(seed)
    colours = torch.from_numpy(rng.standard_normal((8, 16)))
    labels, late = [], []
    for index in range(count):
        scene = sample_scene(rng)
        other = change_scene(rng, scene, 2) if index % 2 else scene
        switch = int(rng.integers(1, BLOCKS))
        labels.append([(other if block >= switch else scene).labels() for block in range(BLOCKS)])
        late.append((index - VALIDATION_CLIPS) % 3 == 2)
    labels = torch.tensor(labels)
    place = list(ATTRIBUTES).index("colour")
    picture = colours[labels[..., place]].repeat_interleave(3, 1)[..., None, None]  # N 15 C 1 1
    noise = torch.from_numpy(rng.standard_normal((count, 15, 16, 4, 4)))
    return {
        "latents": (picture + 0.3 * noise).half(),
        "labels": labels,
        "scenery": torch.tensor([sample_scenery(rng).cells() for _ in range(count)]),
        "late": torch.tensor(late),
    }


def synthetic_first_blocks(count: int = FIRST_BLOCKS) -> dict[str, torch.Tensor]:
    """The beginnings of other clips."""
    clips = synthetic_clips(count, seed=1)
    beginnings = {
        "latents": clips["latents"][:, :3].contiguous(),
        "labels": clips["labels"][:, :1].contiguous(),
    }
    return {**clips, **beginnings, "late": torch.zeros(count, dtype=torch.bool)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """Clips, a text encoder with its tokenizer and a VAE."""
    root = tmp_path_factory.mktemp("student")
    (root / "latents").mkdir()
    save_file(synthetic_clips(), root / "latents" / "clips_0000.safetensors")
    save_file(synthetic_first_blocks(), root / "latents" / "first_0000.safetensors")
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
        return StudentStage(
            **{**parts, "batch_size": 4, "first_block_batch": 6, "scenery_weight": 0.0, **options}
        )

    return build


def wake(made: StudentStage) -> StudentStage:
    """Random weights instead of zeros, so that predictions depend on everything."""
    made.transformer.load_state_dict(tiny.transformer(**TRANSFORMER).state_dict())
    return made


def prepared(made: StudentStage, kind: str, index=(0, 1, 3, 4), seed: int = 0):
    """A batch of chosen clips: 2, 5, 8, ... are late, odd ones switch."""
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
    made._prepare = lambda clips, index, kind, rng: {"kind": kind, "index": index, "clips": clips}
    drawn = {kind: set() for kind in KINDS}
    for step in range(200):
        batch = made.batch(0, step, 0)
        index = batch["index"].tolist()
        first = batch["kind"] == "first block"
        assert len(set(index)) == (7 if first else 5)
        assert batch["clips"] is (made.first_blocks if first else made.clips)
        drawn[batch["kind"]].update(index)
    late = set(torch.nonzero(made.clips.late)[:, 0].tolist())
    assert drawn["rollout"] == set(range(40)) - late  # a rollout needs the whole story
    assert drawn["teacher forcing"] == set(range(40)) and drawn["first block"] == set(range(FIRST_BLOCKS))


def test_first_block_steps_learn_the_shards_of_first_blocks(stage):
    made, stored = stage(first_block_share=1.0, first_block_batch=FIRST_BLOCKS), synthetic_first_blocks()
    batch = made.batch(0, 0, 0)
    expected = {
        row.numpy().tobytes(): place for row, place in zip(stored["latents"], stored["scenery"], strict=True)
    }
    for latents, scenery in zip(batch["latents"], batch["scenery"], strict=True):
        cells = expected.pop(latents.transpose(0, 1).half().contiguous().numpy().tobytes())
        assert torch.equal((scenery * torch.tensor(PLACES)).floor().long(), cells[COUPLED])
    assert not expected  # all of them, once
    loss, metrics = made(batch)
    assert loss > 0 and list(metrics) == ["error_first_block"]


def test_scenery_of_a_batch_is_anywhere_in_its_places(stage):
    """A place on the grid is an interval of [0, 1): quantiles of uniform places are then standard normal."""
    made = stage()
    torch.manual_seed(0)
    batches = torch.stack([prepared(made, "first block", range(40))["scenery"] for _ in range(5)])
    inside = batches * torch.tensor(PLACES) - made.clips.scenery[:, COUPLED]  # 5 40 K
    assert inside.min() >= 0 and inside.max() <= 1
    count = inside[..., 0].numel()
    assert (inside.flatten(0, 1).mean(0) - 0.5).abs().max() < 4 / (12 * count) ** 0.5
    assert (inside.flatten(0, 1).square().mean(0) - 1 / 3).abs().max() < 4 * (4 / 45 / count) ** 0.5
    assert all(len(batches[:, clip, 0].unique()) == 5 for clip in range(40))


def test_validation_clips_are_not_trained_on(stage):
    made = stage()
    assert (len(made.validation_clips), len(made.clips)) == (VALIDATION_CLIPS, 40)
    whole = synthetic_clips()
    assert torch.equal(made.clips.latents, whole["latents"][VALIDATION_CLIPS:])
    assert torch.equal(made.clips.late, whole["late"][VALIDATION_CLIPS:])


def test_too_few_clips_are_refused(stage):
    assert stage(batch_size=27, first_block_batch=FIRST_BLOCKS).batch_size == 27  # of 40, 13 are late
    for size in (28, 41):
        with pytest.raises(UserError, match=r"holds 104 clips and a step needs more: encode at least"):
            stage(batch_size=size)
    with pytest.raises(UserError) as failure:
        stage(first_block_batch=FIRST_BLOCKS + 1)
    assert re.fullmatch(
        r"first_block_batch = 14 is more than the 13 first blocks in latents = '\S+': "
        r"lower it or encode more with first_block_shards",
        str(failure.value),
    )


def test_shards_of_both_kinds_are_needed(stage, folders, tmp_path):
    for kind, other in (("first", "clips"), ("clips", "first")):
        (tmp_path / kind).mkdir()
        shutil.copy(Path(folders["latents"]) / f"{other}_0000.safetensors", tmp_path / kind)
        with pytest.raises(UserError) as failure:
            stage(latents=str(tmp_path / kind))
        assert re.fullmatch(
            rf"latents = '\S+' holds no shards of {kind}: run the stage of kind latents first",
            str(failure.value),
        )


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


def test_the_work_of_a_step_is_the_tokens_that_it_sends_through_the_network(stage):
    """With all steps of one kind, counted at the network's input; with gradient and without."""
    for kind, shares in (
        ("first block", (1.0, 0.0)),
        ("teacher forcing", (0.0, 0.0)),
        ("rollout", (0.0, 1.0)),
    ):
        made = stage(batch_size=3, first_block_batch=5, first_block_share=shares[0], rollout_share=shares[1])
        rows, columns = made.transformer.token_grid(*made.clips.latents.shape[-2:])
        seen = {True: 0, False: 0}
        forward = made.transformer.forward

        def count(
            hidden_states=None, *arguments, seen=seen, forward=forward, size=rows * columns, **keywords
        ):
            if hidden_states is not None:
                seen[torch.is_grad_enabled()] += hidden_states.shape[0] * hidden_states.shape[2] * size
            return forward(hidden_states, *arguments, **keywords)

        made.transformer.forward = count
        made(prepared(made, kind, range(5 if kind == "first block" else 3)))
        for backward in (True, False):
            told = sum(work.times * work.queries for work in made.work() if work.backward == backward)
            assert told == seen[backward], (kind, backward)


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
    assert late.tolist() == [False, True, False, True]
    counted = batch["weight"].amax((2, 3)) > 0
    assert counted[~late].all()
    assert counted[late].tolist() == [[True] * 3 + [False] * 6 + [True] * 6] * 2
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


def test_the_loss_has_a_closed_form(stage):
    """Squared error, times 1 / (sigma^2 + 0.05), times the subject's weight."""
    made = stage()
    batch = {**prepared(made, "teacher forcing"), "recached": None}
    batch["latents"] = torch.ones_like(batch["latents"])
    sigma = torch.rand(4, 2, 15)
    made._noisy = lambda latents, streams, scenery: (torch.zeros(4, streams, 16, 15, 4, 4), sigma)
    made._predict = lambda context, noisy, *_: noisy - 1  # an error of 4 everywhere
    expected = (4 / (sigma**2 + 0.05) * batch["weight"].mean((2, 3))[:, None]).mean()
    loss, metrics = made(batch)
    torch.testing.assert_close(loss, expected)
    assert metrics["error_teacher_forcing"] == 4


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


def assert_same_keys(one: PromptKV, other: PromptKV) -> None:
    for ours, theirs in zip((*one.keys, *one.values), (*other.keys, *other.values), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("groups", [1, BLOCKS])
def test_keys_beside_each_other_are_those_of_texts_beside_each_other(groups):
    model, batch = tiny.transformer(**TRANSFORMER).requires_grad_(False), 3
    texts = tiny.normal(0, 3, batch, groups, 40, 16)
    parts = [model.prompt_kv(text) for text in texts]
    joined = _beside([parts[0], parts[1], parts[1], parts[2]], batch)
    assert len(joined.keys) == len(joined.values) == TRANSFORMER["num_layers"]
    assert_same_keys(joined, model.prompt_kv(torch.cat([texts[0], texts[1], texts[1], texts[2]], 1)))


@pytest.mark.parametrize("kind", KINDS)
def test_every_stream_hears_the_prompts_and_the_context_what_it_was_told(kind, stage, monkeypatch):
    made, seen = wake(stage()), []
    blocks = 1 if kind == "first block" else BLOCKS
    text, noisy = tiny.normal(0, 3, blocks, 40, 16), tiny.normal(1, 3, 2, 16, 3 * blocks, 4, 4)
    context = None if kind == "first block" else noisy[:, 0]
    recached = torch.tensor([2, BLOCKS, 4]) if kind == "teacher forcing" else None
    forward = made.transformer.forward
    monkeypatch.setattr(
        made.transformer, "forward", lambda *a, **options: seen.append((a, options)) or forward(*a, **options)
    )
    with torch.no_grad():
        made._predict(context, noisy, torch.ones(3, 2, 3 * blocks), text, recached)
        told = text if recached is None else made._context_text(text, recached)
        heard = torch.cat([text, text] if context is None else [told, text, text], 1)
        (options,) = (options for latents, options in seen if latents)  # beside the calls for prompt keys
        assert_same_keys(options["prompt_kv"], made.transformer.prompt_kv(heard))


def test_noise_levels_are_those_of_the_sampler_and_some_between(stage):
    made = stage()
    torch.manual_seed(0)
    clean, scenery = torch.zeros(200, 16, 15, 4, 4), torch.rand(200, K)
    noisy, sigma = made._noisy(clean, 2, scenery)
    assert noisy.shape == (200, 2, 16, 15, 4, 4) and sigma.shape == (200, 2, 15)
    per_block = sigma.unflatten(2, (BLOCKS, 3))
    assert (per_block == per_block[..., :1]).all()  # one level per block
    levels = torch.tensor(made.scheduler.step_sigmas)
    share = (sigma[..., None] == levels).any(-1).float().mean()
    assert share == pytest.approx(0.75, abs=0.04) and sigma.min() >= 0 and sigma.max() <= 1
    spread = noisy.transpose(2, 3).flatten(3).std(-1)  # of clean latents 0: sigma itself
    torch.testing.assert_close(spread, sigma, atol=0.2, rtol=0)
    assert spread.mean() == pytest.approx(sigma.mean().item(), rel=0.01)
    # where the first block is pure noise, and only there, its noise names the scenery
    quantile = torch.special.ndtri(scenery.clamp(1e-4, 1 - 1e-4))[:, None]
    first = sigma[:, :, 0]
    coupled = (projections(noisy) - first[..., None] * quantile).abs().amax(-1) < 1e-4
    assert torch.equal(coupled, first >= COUPLED_SIGMA) and 0 < coupled.sum() < coupled.numel()
    assert ((first < 1.0) & coupled).any()


def test_first_blocks_see_pure_noise_more_often(stage):
    made = stage()
    torch.manual_seed(0)
    _, sigma = made._noisy(torch.zeros(400, 16, 3, 4, 4), 4, torch.rand(400, K))
    share = (sigma[:, :, 0] == 1.0).float().mean()
    expected = FIRST_STEP_SHARE + (1 - FIRST_STEP_SHARE) * 0.75 / len(made.scheduler.steps)
    assert share == pytest.approx(expected, abs=0.04)


def test_context_noise_is_in_half_of_the_clips_up_to_its_limit(stage):
    torch.manual_seed(0)
    clean = torch.zeros(400, 16, 3, 4, 4)
    level = stage(context_noise=0.4)._noised_context(clean).flatten(1).std(1)
    noised = level > 0
    assert noised.float().mean() == pytest.approx(0.5, abs=0.1)
    assert level[noised].mean() == pytest.approx(0.2, abs=0.02) and level.max() < 0.45
    assert torch.equal(stage(context_noise=0.0)._noised_context(clean), clean)


# --- closed forms ---------------------------------------------------------------------------------------------------


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
        context_pass="separate",
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


# --- scenery in the middle of the network ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_scenery_loss_asks_the_middle_tokens_of_pure_noise(kind, stage):
    made = wake(stage(scenery_weight=0.5))
    batch, asked = prepared(made, kind), []
    head = made.learnt["scenery_head"]
    head.register_forward_hook(lambda _head, given, loss: asked.append((*given, loss)))
    torch.manual_seed(0)
    loss, metrics = made(batch)
    tokens, scenery, only, told = asked[0]
    streams = 4 if kind == "first block" else 2
    assert tokens.shape == (4, streams, 4, 24) and only.shape == (4, streams)
    assert torch.equal(scenery, batch["scenery"]) and metrics["scenery"] == told
    torch.manual_seed(0)
    made.scenery_weight = 0.0
    assert loss.item() == pytest.approx((made(batch)[0] + 0.5 * told).item(), rel=1e-5)


def test_the_middle_tokens_are_those_of_the_noisy_streams(stage, monkeypatch):
    """Of a forward beside clean context: token for token what the streams alone make of the middle layer."""
    made = wake(stage(scenery_weight=0.5))
    noisy, text = tiny.normal(1, 2, 2, 16, 15, 4, 4), tiny.normal(0, 2, BLOCKS, 40, 16)
    sigma, asked = torch.ones(2, 2, 15), []
    monkeypatch.setitem(made.learnt._modules, "scenery_head", lambda *given: asked.append(given))
    for context in (noisy[:, 0], None):
        with torch.no_grad(), made._tokens_half_way() as tokens:
            made._predict(context, noisy, sigma, text, None)
        made._scenery_loss(tokens[-1], sigma, torch.rand(2, K))
    beside, alone = (given[0] for given in asked)
    assert beside.shape == (2, 2, 4, 24) and asked[0][2].all()
    torch.testing.assert_close(beside, alone, atol=1e-5, rtol=1e-5)  # a first block has no context
    assert not torch.allclose(beside[:, 0], beside[:, 1])


def test_without_a_weight_there_is_no_head_and_the_export_never_has_one(stage, tmp_path):
    assert list(stage().trainable()) == ["transformer"]
    made = stage(scenery_weight=0.1)
    assert list(made.trainable()) == ["transformer", "scenery_head"]
    made.export(tmp_path)
    saved = CausalWanTransformer3DModel.from_pretrained(tmp_path / "transformer")
    assert not [name for name in saved.state_dict() if "scenery" in name]


def test_all_steps_reach_all_weights_that_learn(stage):
    """A head without gradient in some step would stop a run of several processes."""
    made = wake(stage(scenery_weight=0.1))
    torch.nn.init.normal_(made.learnt["scenery_head"].classifier.weight)
    for kind in KINDS:
        made.zero_grad()
        made(prepared(made, kind))[0].backward()
        assert all(parameter.grad is not None for parameter in made.trainable().parameters())
