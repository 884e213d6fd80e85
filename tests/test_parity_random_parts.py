"""Random cases of what is recorded beside streams: one forward, schedules, losses, a VAE. Restated, then replayed."""

import random

import pytest
import torch
from diffusers import AutoencoderKLWan
from recording import GRIDS, drawn_model, random_text, write_case
from released import Levels
from released_network import Network, random_weights

from streamvid.checkpoint_keys import renamed, vae_rules
from streamvid.parity import run_case


def replayed(folder) -> int:
    """Number of rows of a case's report, all of them within tolerance."""
    rows = run_case(folder)
    assert [row.name for row in rows if not row.ok] == []
    return len(rows)


# --- one forward ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_a_forward_of_any_size(tmp_path, seed):
    draw, random_ = random.Random(f"forward {seed}"), torch.Generator().manual_seed(seed)
    model = drawn_model(draw, in_dim=draw.choice([16, 4]), out_dim=draw.choice([16, 6]))
    grid, batch, frames = draw.choice(GRIDS), draw.randint(1, 3), draw.randint(1, 5)
    shape = (batch, frames, model["in_dim"], 2 * grid[0], 2 * grid[1])
    x = torch.randn(shape, generator=random_)
    times = [draw.choice([0.0, 4.98, 250.0, 833.3, 937.5, 1000.0]) for _ in range(batch)]
    rows = [draw.randint(0, model["text_len"]) for _ in range(batch)]
    prompt, weights = random_text(model, rows, random_), random_weights(model, seed)
    got = Network(weights, model).traced(x, torch.tensor(times)[:, None], prompt)
    per_video = {name: got.pop(name)[:, 0] for name in ("time_embedding", "time_projection")}
    flow = got.pop("flow").transpose(1, 2)
    outputs = {"flow": flow} | {f"trace/{name}": t for name, t in (got | per_video).items()}
    latent = dict(zip("BFCHW", shape, strict=True)) | {"tokens_per_frame": grid[0] * grid[1]}
    settings = {"model": model, "latent": latent, "timesteps": times, "prompt_valid_rows": rows}
    inputs = {"x": x.transpose(1, 2), "timestep": torch.tensor(times), "prompt": prompt}
    write_case(tmp_path, settings, inputs, outputs, weights)
    assert replayed(tmp_path) == 6 + model["num_layers"]


# --- schedules --------------------------------------------------------------------------------------------------------


def table(rows: int, shift: float, most: float, least: float, extra: bool) -> torch.Tensor:
    u = torch.linspace(most, least, rows + extra)[:rows]
    return shift * u / (1 + (shift - 1) * u)


def schedule(sigmas: torch.Tensor, inputs: dict) -> dict[str, torch.Tensor]:
    """Everything that is recorded of one table."""
    times, rows = 1000 * sigmas, len(sigmas)
    near = (times - inputs["timestep"][:, None]).abs().argmin(1)
    s = sigmas[near][:, None, None, None]
    after = torch.cat([sigmas, torch.zeros(1)])[near + 1][:, None, None, None]
    x0, noise, flow = (inputs[name] for name in ("x0", "noise", "flow"))
    noisy = (1 - s) * x0 + s * noise
    weights = torch.exp(-2 * ((times - rows / 2) / rows) ** 2)
    weights = (weights - weights.min()) * (rows / (weights - weights.min()).sum())
    some = inputs["step_rows"]

    def target(where) -> torch.Tensor | int:
        """One row at the end of the table sends the whole batch to 0."""
        return 0 if bool((near[where] == rows - 1).any()) else after[where]

    return {
        "sigmas": sigmas,
        "timesteps": times,
        "training_weights": weights,
        "training_weight": weights[near],
        "nearest_index": near,
        "add_noise": noisy,
        "x0_from_flow": (noisy.double() - s.double() * flow.double()).float(),
        "flow_from_x0": ((noise.double() - x0.double()) / s.double()).float(),
        "step": noise[some] + flow[some] * (target(some) - s[some]),
        "step_batch_containing_last": noise + flow * (target(slice(None)) - s),
        "step_to_final": (noise - flow * s)[some],
    }


@pytest.mark.parametrize(
    ("shifts", "rows", "most", "least", "extra"),
    [
        ((5.0, 8.0), 1000, 1.0, 0.0, True),
        ((1.0, 3.5), 1000, 1.0, 0.003, False),
        ((5.0,), 300, 0.9, 0.01, True),
    ],
)
def test_a_schedule_of_any_table(tmp_path, shifts, rows, most, least, extra):
    random_ = torch.Generator().manual_seed(rows)
    shape = (9, 3, 2, 4)
    inputs = {name: torch.randn(shape, generator=random_) for name in ("x0", "noise", "flow")}
    inputs["timestep"] = torch.tensor([1000.0, 999.0, 750.0, 500.5, 333.3, 120.0, 40.0, 9.0, 0.0])
    inputs["step_rows"] = torch.arange(7)
    lists = {"four": [1000, 750, 500, 250], "fine": [999, 640, 333, 2, 0]} if rows == 1000 else {}
    outputs = {"default80/sigmas": table(80, 3.0, 1.0, 0.003 / 1.002, False)}
    outputs["default80/timesteps"] = 1000 * outputs["default80/sigmas"]
    for shift in shifts:
        sigmas = table(rows, shift, most, least, extra)
        outputs |= {f"shift{shift:g}/{name}": t for name, t in schedule(sigmas, inputs).items()}
        padded = torch.cat([1000 * sigmas, torch.zeros(1)])
        outputs |= {f"shift{shift:g}/warped/{n}": padded[[1000 - v for v in vs]] for n, vs in lists.items()}
        few = table(20, shift, most, least, extra)
        outputs |= {f"shift{shift:g}_20steps/sigmas": few, f"shift{shift:g}_20steps/timesteps": 1000 * few}
    config = {
        "shifts": list(shifts),
        "num_train_timesteps": 1000,
        "num_inference_steps": rows,
        "sigma_max": most,
        "sigma_min": least,
        "extra_one_step": extra,
        "training": True,
    }
    write_case(tmp_path, {"config": config, "denoising_lists": lists}, inputs, outputs)
    assert replayed(tmp_path) == len(outputs)


# --- losses -----------------------------------------------------------------------------------------------------------

COMMON = {"score_models_timestep_shift": 8.0, "generator_timestep_shift": 5.0, "num_frame_per_block": 2}
SCORES = {"ts_schedule": False, "min_score_timestep": 0, "min_step": 20, "max_step": 980}
VARIANTS = {
    "dmd": {**SCORES, "timestep_shift": 5.0, "real_guidance_scale": 3.0, "fake_guidance_scale": 0.0},
    "guided": {
        **SCORES,
        "ts_schedule": True,  # the draws are recorded, wherever they are from
        "min_score_timestep": 200,
        "min_step": 300,
        "max_step": 700,
        "timestep_shift": 8.0,
        "generator_timestep_shift": 3.0,
        "real_guidance_scale": 1.5,
        "fake_guidance_scale": 0.7,
    },
    "rewarded": {
        **SCORES,
        "timestep_shift": 1.0,
        "real_guidance_scale": 3.0,
        "fake_guidance_scale": 0.0,
        "beta": 0.5,
        "score_models_timestep_shift": 5.0,
    },
    "critic": {"denoising_loss_type": "flow", "timestep_shift": 5.0},
}


class Restated:
    """One variant's quantities."""

    def __init__(self, settings: dict, networks: dict, inputs: dict, prompts: dict, masked: bool):
        self.settings, self.networks, self.prompts = settings, networks, prompts
        self.inputs, self.masked = inputs, masked
        self.clip = inputs["generator_x0"].clone().requires_grad_()
        shift, t = settings["timestep_shift"], inputs["timestep_int"].float()
        if shift > 1:
            t = shift * (t / 1000) / (1 + (shift - 1) * (t / 1000)) * 1000
        self.times = t.clamp(settings.get("min_step", 20), settings.get("max_step", 980))
        self.s = self.sigma(settings["generator_timestep_shift"])
        self.noisy = (1 - self.s) * self.clip.detach() + self.s * inputs["noise"]

    def sigma(self, shift: float) -> torch.Tensor:
        levels = Levels([1000], shift)
        return torch.tensor([levels.sigma(float(t)) for t in self.times])[:, None, None, None, None]

    @torch.no_grad()
    def x0(self, score: str, prompt: str) -> torch.Tensor:
        """A network's answer, recorded as an input."""
        flow = self.networks[score](self.noisy, self.times, self.prompts[prompt])
        s = self.sigma(self.settings["score_models_timestep_shift"])
        answer = (self.noisy.double() - s.double() * flow.double()).float()
        self.inputs[f"{score}_x0_{prompt}"] = answer
        return answer

    def guided(self, score: str, scale: float) -> torch.Tensor:
        conditional = self.x0(score, "cond")
        if score == "fake" and not scale:
            return conditional
        return conditional + (conditional - self.x0(score, "uncond")) * scale

    def generator(self) -> dict[str, torch.Tensor]:
        real = self.guided("real", self.settings["real_guidance_scale"])
        fake = self.guided("fake", self.settings["fake_guidance_scale"])
        clip = self.clip.detach()
        normaliser = (clip - real).abs().mean((1, 2, 3, 4), keepdim=True)
        gradient = (fake - real) / normaliser
        chosen = self.inputs["gradient_mask"] if self.masked else torch.ones_like(clip, dtype=torch.bool)
        difference = self.clip.double() - (clip.double() - gradient.double())
        loss = 0.5 * difference[chosen].pow(2).mean()
        if "beta" in self.settings:
            loss = torch.exp(self.settings["beta"] * self.inputs["reward_MQ"][:1]) * loss.float()
        (by_clip,) = torch.autograd.grad(loss.sum(), self.clip)
        return {
            "timestep": self.times.expand(-1, clip.shape[1]),
            "noisy_latent": self.noisy,
            "real_x0_guided": real,
            "kl_grad_unnormalized": fake - real,
            "kl_grad": gradient,
            "normalizer": normaliser,
            "gradient_norm_logged": gradient.abs().mean(),
            "loss": loss.detach(),
            "loss_grad_wrt_generator_x0": by_clip,
        }

    def critic(self) -> dict[str, torch.Tensor]:
        x0 = self.x0("fake", "cond").clone().requires_grad_()
        flow = ((self.noisy.double() - x0.double()) / self.s.double()).float()
        loss = (flow - (self.inputs["noise"] - self.clip.detach())).pow(2).mean()
        (by_x0,) = torch.autograd.grad(loss, x0)
        s = self.sigma(self.settings["score_models_timestep_shift"]).double()
        return {
            "timestep": self.times.expand(-1, x0.shape[1]),
            "noisy_latent": self.noisy,
            "fake_raw_flow": ((self.noisy.double() - x0.detach().double()) / s).float(),
            "flow_from_x0": flow.detach(),
            "loss": loss.detach(),
            "loss_grad_wrt_fake_x0": by_x0,
        }


@pytest.mark.parametrize("seed", range(3))
def test_losses_of_any_size(tmp_path, seed):
    draw, random_ = random.Random(f"losses {seed}"), torch.Generator().manual_seed(seed)
    model, grid = drawn_model(draw, cross_attn_norm=True), draw.choice(GRIDS)
    shape = (draw.randint(1, 3), draw.randint(1, 5), 16, 2 * grid[0], 2 * grid[1])
    weights = {score: random_weights(model, 10 * seed + n) for n, score in enumerate(("real", "fake"))}
    networks = {score: Network(w, model) for score, w in weights.items()}
    prompts = {name: random_text(model, [2] * shape[0], random_) for name in ("cond", "uncond")}
    inputs = {"generator_x0": torch.randn(shape, generator=random_)}
    outputs = {}
    variants = {name: {**COMMON, **settings} for name, settings in VARIANTS.items()}
    for name, settings in variants.items():
        masked = draw.random() < 0.5
        own = {
            "generator_x0": inputs["generator_x0"],
            "noise": torch.randn(shape, generator=random_),
            "timestep_int": torch.randint(0, 1000, (shape[0], 1), generator=random_),
        }
        if masked and name != "critic":
            own["gradient_mask"] = torch.rand(shape, generator=random_) < 0.4
        if "beta" in settings:
            own["reward_MQ"] = torch.randn(draw.randint(1, 3), generator=random_)
        restated = Restated(settings, networks, own, prompts, "gradient_mask" in own)
        got = restated.critic() if name == "critic" else restated.generator()
        outputs |= {f"{name}/{quantity}": t for quantity, t in got.items()}
        inputs |= {f"{name}/{quantity}": t for quantity, t in own.items() if quantity != "generator_x0"}
    inputs |= {f"prompt_{name}": text for name, text in prompts.items()}
    saved = {f"{score}_score.model.{name}": t for score, w in weights.items() for name, t in w.items()}
    settings = {"model": model, "latent": dict(zip("BFCHW", shape, strict=True)), "variants": variants}
    write_case(tmp_path, settings, inputs, outputs, saved)
    predictions = sum("_x0_" in name for name in inputs if "/" in name)
    assert replayed(tmp_path) == len(outputs) + predictions and predictions == 11


# --- VAE --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "shape", "every"),
    [
        ({}, (1, 5, 16, 2, 4), 2),
        (
            {"dim_mult": [1, 2], "num_res_blocks": 1, "temperal_downsample": [True], "z_dim": 4},
            (2, 1, 4, 4, 2),
            1,
        ),
        (
            {"dim_mult": [1, 1, 2], "num_res_blocks": 3, "temperal_downsample": [True, True]},
            (1, 4, 16, 2, 2),
            3,
        ),
    ],
)
@torch.no_grad()
def test_a_vae_of_any_size(tmp_path, config, shape, every):
    torch.manual_seed(0)
    levels = {"base_dim": 4, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_scales": []}
    config = {**levels, "temperal_downsample": [False, True, True], "dropout": 0.0, **config}
    for name, least in (("latents_mean", -0.5), ("latents_std", 0.7)):
        config[name] = (torch.rand(config["z_dim"]) + least).tolist()
    vae = AutoencoderKLWan(**config).eval()
    vae.decoder.conv_out.weight *= 0.1  # so that `decode` has nothing to clamp
    mean, std = (torch.tensor(config[name]).view(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    latents = torch.randn(shape)

    def decoded(x: torch.Tensor) -> torch.Tensor:
        return vae.decode(x.transpose(1, 2) * std + mean).sample

    pixels = decoded(latents)
    assert pixels.abs().max() < 1
    outputs = {
        "pixels": pixels,
        f"pixels_cache_cleared_every_{every}": torch.cat([decoded(x) for x in latents.split(every, 1)], 2),
        "encode/latents": ((vae.encode(pixels).latent_dist.mode() - mean) / std).transpose(1, 2),
    }
    rules = vae_rules(config["num_res_blocks"], len(config["dim_mult"]))
    weights = {renamed(name, rules, to_wan=True) or name: t for name, t in vae.state_dict().items()}
    assert "decoder.upsamples.0.residual.0.gamma" in weights
    section = {name.replace("temperal", "temporal"): value for name, value in config.items()}
    write_case(tmp_path, {"config": section}, {"latents": latents}, outputs, weights)
    assert replayed(tmp_path) == 3 + 3
