"""Self-forcing distillation: what each phase learns from, and long streams."""

import copy

import pytest
import tiny
import torch

from streamvid.errors import UserError
from streamvid.training.datasets import ShardWriter
from streamvid.training.distribution_matching import generator_gradient, guided, matching_loss, score_timestep
from streamvid.training.self_forcing import SelfForcingStage

SMALL = {"method": "longlive", "overrides": {"window": 9}}


@pytest.fixture
def stage(model_folder, prompt_file):
    def build(model=None, rollout=None, **options) -> SelfForcingStage:
        torch.manual_seed(0)
        return SelfForcingStage(
            {"folder": model_folder, **SMALL, **(model or {})},
            prompt_file,
            **{"batch_size": 2, **options},
            rollout={"frames": 12, "supervised": 12, **(rollout or {})},
        ).train()

    return build


def run(made: SelfForcingStage, phase: str, step: int = 0, number: int = 0):
    """A phase as the trainer runs it."""
    for name, part in made.parts().items():
        part.requires_grad_(name == phase)
    torch.manual_seed(step)
    batch = made.phase_batch(phase, 0, step, number)
    torch.manual_seed(step)
    return made(batch)


def gradients(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.grad for n, p in module.named_parameters() if p.grad is not None}


def test_batches_are_pure_and_what_must_be_shared_is(stage):
    made = stage()
    one, same, other = (made.phase_batch("critic", 0, 5, number) for number in (0, 0, 1))
    assert one["prompts"] == same["prompts"] and one["seeds"] == same["seeds"] != other["seeds"]
    assert one["shared"].integers(10**6) == other["shared"].integers(10**6)
    assert made.phase_batch("generator", 0, 5, 0)["seeds"] != one["seeds"]


def test_the_critic_learns_in_every_step_and_the_generator_in_some(stage):
    made = stage(critic={"generator_every": 3})
    assert [made.phases(step) for step in range(4)] == [
        ("generator", "critic"),
        ("critic",),
        ("critic",),
        ("generator", "critic"),
    ]


def test_a_phase_moves_its_part_only(stage):
    made = stage()
    for phase, other in (("generator", "critic"), ("critic", "generator")):
        made.zero_grad()
        loss, numbers = run(made, phase)
        loss.backward()
        assert torch.isfinite(loss) and not any(value.requires_grad for value in numbers.values())
        learnt, rest = made.parts()[phase], made.parts()[other]
        assert all(gradient.abs().sum() > 0 for gradient in gradients(learnt).values())
        assert len(gradients(learnt)) == len(list(learnt.parameters())) and not gradients(rest)
        assert not gradients(made.teacher)


def test_the_generator_gets_the_published_gradient(stage):
    """The loss of a phase, written out again from the rollout it made."""
    made = stage(teacher={"guidance": 2.0, "negative_prompt": "night"}, critic={"guidance": 0.5})
    with torch.no_grad():  # a critic that is not the teacher
        for p in made.critic.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    clips, kept = made.clips.roll, {}
    made.clips.roll = lambda batch: kept.setdefault("clip", clips(batch))
    loss, numbers = run(made, "generator")
    x = kept["clip"].latents.detach()
    torch.manual_seed(0)
    tau = score_timestep(torch.randint(0, 1000, (2,)).float())
    noise = torch.randn(x.shape)
    sigma = made.scheduler.sigma(tau).view(-1, 1, 1, 1, 1)
    noisy = (1 - sigma) * x + sigma * noise
    text, nothing = made.encode(kept["clip"].prompts), made.encode(["night", "night"])

    def score(denoiser, guidance):
        c, u = (noisy - sigma * denoiser.model(noisy, tau, t).sample for t in (text, nothing))
        return guided(c, u, guidance)

    with torch.no_grad():
        gradient, normaliser = generator_gradient(x, score(made.critic.score, 0.5), score(made.teacher, 2.0))
    torch.testing.assert_close(loss, matching_loss(x, gradient).float(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(numbers["normaliser"], normaliser.mean(), rtol=1e-4, atol=1e-6)
    assert made.encode(["night"]).abs().sum() > 0


@pytest.mark.parametrize("context", ["teacher_forcing", "diffusion_forcing"])
def test_causal_scores_see_no_later_block(stage, context):
    """LongLive 2: the gradient on a block is that of a clip which ends with it; bidirectional scores look ahead."""
    made = stage(matching={"context": context, "normaliser": "block"}, teacher={"guidance": 1.0})
    x, noise = tiny.clip(5, 12, batch=2), tiny.clip(6, 12, batch=2)
    text, tau = made.encode(["a red fox", "the cat runs"]), torch.tensor([500.0, 800.0])
    with torch.no_grad():
        score = made._score(made.teacher, 1.0, noise, tau, text, x)
        other = torch.cat([noise[:, :, :9], tiny.clip(7, 3, batch=2)], 2)
        again = made._score(made.teacher, 1.0, other, tau, text, x)
        torch.testing.assert_close(score[:, :, :9], again[:, :, :9], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(score[:, :, 9:], again[:, :, 9:])
        past = torch.cat([x[:, :, :3] + 1, x[:, :, 3:]], 2)
        moved = (made._score(made.teacher, 1.0, noise, tau, text, past) - score).abs().amax((0, 1, 3, 4))
        clean_counts = context == "teacher_forcing"
        assert (moved[:3] < 1e-5).all() and (moved[3:6] > 1e-5).all() == clean_counts
    for phase in ("generator", "critic"):
        loss, _ = run(made, phase)
        loss.backward()
        assert torch.isfinite(loss)
        assert all(gradient.abs().sum() > 0 for gradient in gradients(made.parts()[phase]).values())


def test_the_normaliser_of_a_block_counts(stage):
    losses = [run(stage(matching={"normaliser": n}), "generator")[0].item() for n in ("clip", "block")]
    assert losses[0] != losses[1]


def test_the_critic_learns_the_flow_of_rollouts(stage):
    made = stage()
    clips, kept = made.clips.roll, {}
    made.clips.roll = lambda batch: kept.setdefault("clip", clips(batch))
    loss, _ = run(made, "critic", step=1)
    x = kept["clip"].latents
    assert not x.requires_grad
    torch.manual_seed(1)
    tau = score_timestep(torch.randint(0, 1000, (2,)).float())
    noise = torch.randn(x.shape)
    sigma = made.scheduler.sigma(tau).view(-1, 1, 1, 1, 1)
    flow = made.critic.score.model(
        (1 - sigma) * x + sigma * noise, tau, made.encode(kept["clip"].prompts)
    ).sample
    torch.testing.assert_close(loss, (flow - (noise - x)).square().mean(), rtol=1e-4, atol=1e-5)


def test_exit_steps_are_random_or_last_and_the_same_for_all_processes(stage):
    made = stage()
    drawn = [
        made.clips._exits(made.phase_batch("critic", 0, s, n)["shared"], 4, 3)
        for s in range(40)
        for n in (0, 1)
    ]
    assert drawn[::2] == drawn[1::2] and {e[0] for e in drawn} == {0, 1, 2, 3}
    assert all(len(set(exits)) == 1 for exits in drawn)
    single = stage(rollout={"exit_per_block": True}).clips
    assert any(
        len(set(single._exits(made.phase_batch("critic", 0, s, 0)["shared"], 4, 3))) > 1 for s in range(9)
    )
    assert stage(rollout={"exit": "last"}).clips._exits(None, 4, 2) == [3, 3]


def test_score_identity_distillation_also_flows_through_the_scores(stage):
    made = stage(matching={"loss": "sid"})
    loss, _ = run(made, "generator")
    loss.backward()
    assert all(gradient.abs().sum() > 0 for gradient in gradients(made.transformer).values())
    assert not gradients(made.critic) and not gradients(made.teacher)
    again, _ = run(stage(matching={"loss": "sid", "alpha": 0.5}), "generator")
    assert again != loss


def test_lora_learns_on_the_blocks_only(stage):
    made = stage({"lora_rank": 2})
    learnt = [name for name, p in made.transformer.named_parameters() if p.requires_grad]
    assert len(learnt) == 2 * 10 * 2 and all("lora_" in name for name in learnt)
    assert sum(p.requires_grad for p in made.critic.parameters()) == 40


# --- GAN --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def real_clips(tmp_path) -> str:
    writer = ShardWriter(tmp_path / "real", {"kind": "latents", "shape": [12, *tiny.LATENT]})
    clips = tiny.clip(7, 12, batch=4).transpose(1, 2).half()
    writer.write("clips_0000", clips, [["a red fox"], ["a cat"], ["a bird"], ["rain falls"]])
    return str(tmp_path / "real")


@pytest.mark.parametrize("relativistic", [True, False])
def test_a_gan_alone_trains_both_sides(stage, real_clips, relativistic):
    gan = {"relativistic": relativistic, "r1_weight": 1.0, "r2_weight": 1.0}
    made = stage(matching={"loss": "none"}, gan=gan, latents=real_clips)
    for phase in ("generator", "critic"):
        made.zero_grad()
        loss, numbers = run(made, phase)
        loss.backward()
        assert "gan" in numbers
        learnt = gradients(made.parts()[phase])
        assert len(learnt) == len(list(made.parts()[phase].parameters()))
    assert any(name.startswith("discriminator") and g.abs().sum() > 0 for name, g in learnt.items())


def test_penalties_of_the_discriminator_count(stage, real_clips):
    def loss(**weights):
        made = stage(gan=weights, latents=real_clips)
        return run(made, "critic")[0]

    plain = loss()
    assert loss(r1_weight=1e6) > plain and loss(r2_weight=1e6) > plain
    assert loss(critic_weight=0.5) != plain


# --- long clips and streams ---------------------------------------------------------------------------------------------


def test_a_longer_rollout_is_judged_by_its_end(stage):
    made = stage(rollout={"frames": 18, "supervised": 12})
    clip = made.clips.roll(made.phase_batch("generator", 0, 0, 0))
    assert clip.latents.shape[2] == 12 and clip.mask.tolist() == [False] * 3 + [True] * 9
    assert clip.latents.requires_grad
    (first, later) = clip.latents[:, :, 0], clip.latents[:, :, 4]
    assert not torch.equal(first, later)


def chunks_of(made: SelfForcingStage, phases) -> list:
    return [made.clips.roll(made.phase_batch(phase, 0, step, 0)) for step, phase in enumerate(phases)]


LONG = {"frames": 30, "supervised": 12, "overlap": 3, "streaming": True}


def test_a_long_stream_goes_on_over_steps_and_then_a_new_one_begins(stage):
    """12 new frames, then 9 per phase, against the cache as inference has it."""
    made = stage(rollout={**LONG, "exit": "last", "switch_share": 0.0})
    clips = chunks_of(made, ["critic"] * 3)
    assert made.clips.chunks == 3 and made.at_rest()
    assert [clip.latents.shape[2] for clip in clips] == [12] * 3
    assert [int(clip.mask.sum()) for clip in clips] == [12, 9, 9]
    batch = made.phase_batch("critic", 0, 0, 0)
    prompts = [row[0] for row in batch["prompts"]]
    inference = made.pipeline().stream(
        prompts,
        seed=batch["seeds"],
        method=made.method,
        blocks=10,
        decode_pixels=False,
        context_pass="separate",
    )
    whole = torch.cat([chunk.latents for chunk in inference], 2)
    assert torch.equal(clips[0].latents, whole[:, :, :12])
    for clip, start in ((clips[1], 9), (clips[2], 18)):
        assert torch.equal(clip.latents[:, :, 1:], whole[:, :, start + 1 : start + 12])
        assert not torch.equal(clip.latents[:, :, 0], whole[:, :, start])  # a still in its place
    again = made.clips.roll(made.phase_batch("critic", 0, 3, 0))
    assert not made.at_rest() and again.prompts == [
        r[0] for r in made.phase_batch("critic", 0, 3, 0)["prompts"]
    ]


def test_the_first_frame_of_a_chunk_is_its_picture_as_a_still(stage):
    from streamvid.decoding import decode, decoder_state, encode, encoder_state

    made = stage(rollout={**LONG, "exit": "last", "switch_share": 0.0})
    clips = chunks_of(made, ["critic"] * 3)
    finished = torch.cat([clips[0].latents, clips[1].latents[:, :, 3:]], 2)[:, :, :19]
    pixels = decode(made.vae, finished, decoder_state(made.vae), None)
    still = encode(made.vae, pixels[:, :, -1:], encoder_state(made.vae), None)
    torch.testing.assert_close(clips[2].latents[:, :, :1], still, rtol=1e-4, atol=1e-4)


def test_a_still_may_come_from_a_decoder_that_follows_a_few_frames(stage):
    """As many as there are: the same still. Two of them: another one, of the same picture's latent."""
    stills = [
        chunks_of(stage(rollout={**LONG, "switch_share": 0.0, "still_frames": n}), ["critic"] * 2)[1].latents
        for n in (0, 10, 2)
    ]
    assert torch.equal(stills[0], stills[1])
    assert torch.equal(stills[0][:, :, 1:], stills[2][:, :, 1:])
    assert not torch.equal(stills[0][:, :, 0], stills[2][:, :, 0])


def test_prompts_switch_at_a_chunk_by_the_policy_of_inference(stage, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompts": ["a red fox walks", "the cat runs", "night falls"]}\n')
    made = stage(
        {"overrides": {"window": 9, "transition": "recache(bidirectional)"}}, {**LONG, "exit": "last"}
    )
    from streamvid.training.datasets import load_prompts

    made.prompts = load_prompts(path)
    clips = chunks_of(made, ["critic"] * 3)
    assert [clip.prompts[0] for clip in clips] == ["a red fox walks", "the cat runs", "night falls"]
    batch = made.phase_batch("critic", 0, 0, 0)
    stream = made.pipeline().stream(
        ["a red fox walks"] * 2,
        seed=batch["seeds"],
        method=made.method,
        blocks=10,
        decode_pixels=False,
        context_pass="separate",
    )
    latents = []
    for block in range(10):
        if block in (4, 7):
            stream.prompt("the cat runs" if block == 4 else "night falls")
        latents.append(next(stream).latents)
    whole = torch.cat(latents, 2)
    assert torch.equal(clips[2].latents[:, :, 3:], whole[:, :, 21:30])
    made.method = made.method.with_overrides({"transition": "cross_only"})
    other = chunks_of(made, ["critic"] * 3)
    assert torch.equal(other[0].latents, clips[0].latents)
    assert not torch.equal(other[2].latents[:, :, 3:], clips[2].latents[:, :, 3:])


def test_only_the_newest_chunk_has_gradient(stage):
    made = stage(rollout={**LONG, "switch_share": 0.0})
    clips = chunks_of(made, ["generator", "generator"])
    (by_first,) = torch.autograd.grad(clips[1].latents.sum(), clips[0].latents, allow_unused=True)
    assert by_first is None
    (by_weight,) = torch.autograd.grad(clips[1].latents[:, :, 3:].sum(), made.transformer.proj_out.weight)
    assert by_weight.abs().sum() > 0
    assert not clips[1].latents[:, :, :3].requires_grad or clips[1].mask[:3].sum() == 0


ROLLING = {"method": "rolling_forcing", "overrides": {}}


def test_rolling_forcing_mixes_windows_and_blocks(stage):
    made = stage(ROLLING, {"frames": 18, "supervised": 12, "rolling_share": 0.5})
    kinds = {made.clips.roll(made.phase_batch("generator", 0, step, 0)).exit_step < 0 for step in range(8)}
    assert kinds == {True, False}
    for share, windows in ((1.0, True), (0.0, False)):
        made.clips.options.rolling_share = share
        assert (made.clips.roll(made.phase_batch("critic", 0, 0, 0)).exit_step < 0) == windows
    loss, _ = run(stage(ROLLING, {"frames": 18, "supervised": 12, "rolling_share": 1.0}), "generator")
    loss.backward()


# --- rewards ------------------------------------------------------------------------------------------------------------


def test_rewards_weigh_clips(stage):
    """Re-DMD: the loss of a clip times exp(beta reward)."""
    plain, _ = run(stage(batch_size=1), "generator")
    made = stage(batch_size=1, reward={"name": "motion", "beta": 2.0})
    made.reward = lambda pixels, prompts: torch.tensor([0.3])
    weighted, numbers = run(made, "generator")
    torch.testing.assert_close(weighted, plain * torch.tensor(0.6).exp(), rtol=1e-5, atol=0)
    assert numbers["reward"] == pytest.approx(0.3)
    seen = {}
    made.reward = lambda pixels, prompts: seen.setdefault("pixels", pixels).flatten(1).mean(1)
    run(made, "generator")
    assert seen["pixels"].shape == (1, 3, 45, 32, 32) and seen["pixels"].abs().max() <= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"matching": {"loss": "fox"}}, "matching.loss = 'fox' is not known: choose one of dmd, sid, none"),
        ({"matching": {"loss": "none"}}, "matching.loss = none needs stage.gan"),
        (
            {"matching": {"context": "fox"}},
            "matching.context = 'fox' is not known: choose one of bidirectional",
        ),
        ({"matching": {"normaliser": "fox"}}, "matching.normaliser = 'fox' is not known"),
        ({"matching": {"loss": "sid", "normaliser": "block"}}, "normaliser = block is for loss = dmd"),
        ({"matching": {"context": "teacher_forcing"}, "gan": {}}, "of a bidirectional critic"),
        ({"matching": {"fox": 1}}, "stage.matching.fox is not an option: choose from loss, alpha"),
        ({"gan": {}}, "stage.latents and stage.gan need each other"),
        ({"reward": {"name": "fox"}}, "reward.name = 'fox' is not known: choose one of motion, video_reward"),
        ({"reward": {"name": "video_reward", "options": {"checkpoint": "x"}}}, "needs VideoAlign"),
        (
            {"rollout": {"frames": 10}},
            "rollout.frames = 10 must be a positive multiple of frames_per_block = 3",
        ),
        ({"rollout": {"exit": "fox"}}, "rollout.exit = 'fox' is not known"),
        ({"rollout": {"frames": 9}}, "rollout.overlap < supervised <= frames must hold"),
        ({"critic": {"generator_every": 0}}, "must be at least 1"),
        ({"model": {"folder": "nowhere/at/all"}}, "model = 'nowhere/at/all' is not known"),
        ({"teacher": {"folder": "fox"}}, "model = 'fox' is not known"),
        ({"model": ROLLING, "rollout": {"streaming": True}}, "excludes a method with sampler = rolling"),
    ],
)
def test_mistakes_are_one_sentence(stage, options, message):
    with pytest.raises(UserError, match=message):
        stage(**copy.deepcopy(options))
