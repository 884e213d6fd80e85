"""Few-step initialisation: ODE paths, regression onto them, consistency."""

import pytest
import tiny
import torch

from streamvid.errors import UserError
from streamvid.training.datasets import ClipShards, ShardWriter
from streamvid.training.few_step_stage import FewStepStage
from streamvid.training.ode_pairs import PathMaker, make_ode_pairs


@pytest.fixture(scope="module")
def paths(tmp_path_factory, model_folder, prompt_file, latents_folder):
    """Paths of a bidirectional and of a causal teacher."""
    folders = {}
    for name, source in (
        ("bidirectional", {"prompts": prompt_file}),
        ("causal", {"latents": latents_folder}),
    ):
        folders[name] = str(tmp_path_factory.mktemp(name))
        make_ode_pairs(
            {"folder": model_folder},
            folders[name],
            frames=12,
            steps=4,
            guidance=2.0,
            clips_per_shard=3,
            device="cpu",
            **source,
        )
    return folders


def test_paths_are_euler_steps_of_the_guided_flow(model_folder, paths):
    made = PathMaker({"folder": model_folder}, 2.0, "", 4, (1000, 500))
    noise, prompts = tiny.clip(3, 6), ["a red fox"]
    states = made.states(noise, prompts)
    assert states.shape == (1, 4, 16, 6, 4, 4)
    assert made.timesteps == pytest.approx(made.scheduler.warped((1000, 500)))
    x, text, nothing = noise, made.encode(prompts), made.encode([""])
    grid = [*made.scheduler.warped((1000, 750, 500, 250)), 0.0]
    sigmas = [*(float(made.scheduler.sigma(torch.tensor(t))) for t in grid[:-1]), 0.0]
    seen = []
    for t, sigma, after in zip(grid[:-1], sigmas[:-1], sigmas[1:], strict=True):
        seen.append(x)
        with torch.no_grad():
            c, u = (made.transformer(x, torch.tensor([t]), told).sample for told in (text, nothing))
        x = x + (c + 2 * (c - u)) * (after - sigma)
    torch.testing.assert_close(
        states[0], torch.stack([seen[0][0], seen[2][0], x[0], x[0]]), rtol=1e-3, atol=1e-3
    )


def test_shards_of_paths(paths, latents_folder):
    free, causal = (ClipShards(paths[name], "ode") for name in ("bidirectional", "causal"))
    assert (len(free), len(causal)) == (4, 8) and free.shape == (4, 12, 16, 4, 4)
    assert not free.manifest["causal"] and causal.manifest["causal"]
    assert torch.equal(causal[5][-1], ClipShards(latents_folder)[5])  # the clean history
    assert not torch.equal(causal[5][-1], causal[5][-2]) and torch.equal(free[1][-1], free[1][-2])


def build(model_folder, data, **options) -> FewStepStage:
    torch.manual_seed(0)
    model = {"folder": model_folder, "overrides": {"window": 9}}
    return FewStepStage(model, data, 2, {"frames": 12, **options}).train()


@pytest.mark.parametrize("kind", ["bidirectional", "causal"])
def test_regression_onto_the_end_of_a_path(paths, model_folder, kind):
    made = build(model_folder, paths[kind])
    batch = made.batch(0, 0, 0)
    loss, _ = made(batch)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in made.transformer.parameters())
    states, levels = batch["clips"], batch["levels"]
    assert levels.shape == (2, 4) and len(levels.unique()) == 2

    made.denoiser_x0, seen = None, {}
    from streamvid.training import few_step_stage

    original = few_step_stage.clip_x0

    def watch(denoiser, x_t, timestep, text, plans, clean=None):
        seen.update(x_t=x_t, timestep=timestep, clean=clean)
        return states[:, -2]

    few_step_stage.clip_x0 = watch
    try:
        assert made(batch)[0] == 0  # whoever says the end of the path is right
    finally:
        few_step_stage.clip_x0 = original
    for clip in range(2):
        for block in range(4):
            level, own = int(levels[clip, block]), slice(3 * block, 3 * block + 3)
            assert torch.equal(seen["x_t"][clip][:, own], states[clip, level][:, own])
            assert (seen["timestep"][clip, own] == made.path_timesteps[level]).all()
    assert (seen["clean"] is None) == (kind == "bidirectional")
    if kind == "causal":
        assert torch.equal(seen["clean"], states[:, -1])


def test_consistency_targets_are_the_average_one_teacher_step_on(model_folder, latents_folder):
    made = build(model_folder, latents_folder, target="consistency", grid=4, guidance=0.0, target_ema=0.5)
    batch = made.batch(0, 0, 0)
    loss, _ = made(batch)
    loss.backward()
    assert made.transformer.proj_out.weight.grad.abs().sum() > 0
    assert not any(p.requires_grad for p in [*made.teacher.parameters(), *made.target.parameters()])
    # at the last level of the grid the target is where the teacher's step ends
    batch["levels"][:] = 3
    loss, _ = made(batch)
    grid = made.scheduler.warped([1000, 750, 500, 250])
    times = torch.full((2, 12), grid[3])
    from streamvid.training.causal_forward import clip_x0

    with torch.no_grad():
        x_t = made.denoiser.noisy(batch["clips"], batch["noise"], times)
        text = made.encode(batch["prompts"])
        end = clip_x0(made.teacher, x_t, times, text, made.plans, batch["clips"])  # a step to sigma 0 is x0
        own = clip_x0(made.denoiser, x_t, times, text, made.plans, batch["clips"])
    torch.testing.assert_close(loss.detach(), (own - end).square().mean(), rtol=1e-3, atol=1e-5)
    assert build(model_folder, latents_folder, target="consistency", grid=4, guidance=3.0)(batch)[0] != loss


def test_weights_beside_clips_count(model_folder, latents_folder, paths, tmp_path):
    """Weights of 2 everywhere double the loss of consistency."""
    writer = ShardWriter(tmp_path, {"kind": "latents", "shape": [12, *tiny.LATENT], "weights": True})
    clips = ClipShards(latents_folder)
    writer.write("a", clips.batch(range(8))[0].half(), clips.prompts, weights=torch.full((8, 12, 4, 4), 2.0))
    options = {"target": "consistency", "grid": 4}
    plain = build(model_folder, str(tmp_path), **options)
    made = build(model_folder, str(tmp_path), **options, weighted=True)
    batch = made.batch(0, 0, 0)
    torch.testing.assert_close(made(batch)[0], 2 * plain(plain.batch(0, 0, 0))[0])
    for data, target in ((latents_folder, "consistency"), (paths["causal"], "ode")):
        with pytest.raises(UserError, match="weighted"):
            build(model_folder, data, target=target, weighted=True)


def test_the_average_follows_the_student(model_folder, latents_folder):
    made = build(model_folder, latents_folder, target="consistency", target_ema=0.75)
    before = made.target.model.proj_out.weight.clone()
    with torch.no_grad():
        made.transformer.proj_out.weight.add_(1.0)
    made.after_step("model")
    torch.testing.assert_close(made.target.model.proj_out.weight, before + 0.25)


def test_mistakes_are_one_sentence(model_folder, latents_folder, prompt_file, paths, tmp_path):
    for options, message in (
        ({"target": "fox"}, "target = 'fox' is not known"),
        ({"frames": 4}, "multiple of"),
    ):
        with pytest.raises(UserError, match=message):
            build(model_folder, paths["causal"], **options)
    with pytest.raises(UserError, match="holds clips of kind 'latents': give a folder of 'ode'"):
        build(model_folder, latents_folder)
    model = {"folder": model_folder}
    with pytest.raises(UserError, match="give one of them"):
        make_ode_pairs(model, str(tmp_path), prompt_file, latents_folder)
    with pytest.raises(UserError, match=r"stage.steps = 3 has no step at the level 500"):
        make_ode_pairs(model, str(tmp_path), prompt_file, steps=3, device="cpu")
    with pytest.raises(UserError, match="runs in one process"):
        make_ode_pairs(model, str(tmp_path), prompt_file, processes=2)
