"""Recorded losses of distribution matching: the scores' networks, and every quantity of each variant."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from streamvid.errors import UserError
from streamvid.parity_case import FORWARD, Case, Row, Tensors, Tolerance, compare
from streamvid.parity_stream import LATENT_KEYS, case_transformer
from streamvid.schedule import FewStepFlowScheduler
from streamvid.training.distribution_matching import (
    critic_loss,
    generator_gradient,
    guided,
    matching_loss,
    reward_weight,
    score_timestep,
)

LOSS = Tolerance(1e-6, 1e-5, 1e-5)
COMMON_KEYS = (
    "timestep_shift",
    "score_models_timestep_shift",
    "generator_timestep_shift",
    "num_frame_per_block",
    "min_step",
    "max_step",
    "ts_schedule",
    "min_score_timestep",
)
GENERATOR_KEYS = ("real_guidance_scale", "fake_guidance_scale", "beta")
CRITIC_KEYS = ("denoising_loss_type",)
CRITIC_RANGE = (20, 980)  # min_step and max_step of the release, which the critic's variants do not record


def run_losses(case: Case) -> Iterator[Row]:
    """Every variant's loss from the recorded predictions; the predictions from the networks, where they are recorded."""
    latent = case.section("latent", LATENT_KEYS, list("BFCHW"))
    shape = tuple(latent[key] for key in "BFCHW")
    if tuple(case.input("generator_x0").shape) != shape:
        raise UserError(f"{case.folder}/case.json: latent does not match generator_x0: record the case again")
    networks = (case.folder / "weights.safetensors").is_file()
    critic = {name: "denoising_loss_type" in settings for name, settings in case.settings["variants"].items()}
    got: Tensors = {}
    for name, settings in case.settings["variants"].items():
        known = [*COMMON_KEYS, *(CRITIC_KEYS if critic[name] else GENERATOR_KEYS)]
        for key in settings:
            if key not in known:
                raise UserError(
                    f"{case.folder}/case.json: variants.{name}.{key} is not known: "
                    f"this version of streamvid knows {', '.join(known)}"
                )
        variant = _Variant(case, name, settings)
        quantities = variant.critic() if critic[name] else variant.generator()
        got |= {f"{name}/{quantity}": value for quantity, value in quantities.items()}
        if networks:
            for quantity, predicted in variant.predictions().items():
                yield compare(f"{name}/{quantity}", predicted, case.input(f"{name}/{quantity}"), FORWARD)
    for name in case.recorded(f"({'|'.join(critic)})/.+"):
        value, recorded = got.get(name), case.outputs[name]
        yield compare(name, None if value is None else value.reshape(recorded.shape), recorded, LOSS)


class _Variant:
    """One setting of the losses, on the case's generated clip."""

    def __init__(self, case: Case, name: str, settings: Mapping[str, Any]):
        self.case, self.name, self.settings = case, name, settings
        # `ts_schedule` and `min_score_timestep` bound the draw of the timestep, and what was drawn is recorded
        if settings.get("denoising_loss_type", "flow") != "flow":
            raise case.missing(f"variants.{name}.denoising_loss_type", "another loss than flow")
        self.clip = case.input("generator_x0").clone().requires_grad_()
        self.schedule = FewStepFlowScheduler(shift=settings["generator_timestep_shift"])
        frames = self.clip.shape[1]
        low, high = settings.get("min_step", CRITIC_RANGE[0]), settings.get("max_step", CRITIC_RANGE[1])
        drawn = case.input(f"{name}/timestep_int").expand(-1, frames)
        self.timestep = score_timestep(drawn, settings["timestep_shift"], low, high)
        sigma = self.schedule.sigma(self.timestep)[..., None, None, None]
        self.sigma, self.noise = sigma, case.input(f"{name}/noise")
        self.noisy = self.schedule.add_noise(self.clip.detach(), self.noise, sigma)

    def generator(self) -> Tensors:
        """What the generator learns from."""
        case, name = self.case, self.name
        real, fake = case.input(f"{name}/real_x0_cond"), case.input(f"{name}/fake_x0_cond")
        real = guided(real, case.input(f"{name}/real_x0_uncond"), self.settings["real_guidance_scale"])
        if self.settings["fake_guidance_scale"]:
            scale = self.settings["fake_guidance_scale"]
            fake = guided(fake, case.input(f"{name}/fake_x0_uncond"), scale)
        gradient, normaliser = generator_gradient(self.clip, fake, real)
        weight = None
        if "beta" in self.settings:
            weight = reward_weight(case.input(f"{name}/reward_MQ")[:1], self.settings["beta"])
        loss = matching_loss(self.clip, gradient, case.inputs.get(f"{name}/gradient_mask"), weight)
        (by_clip,) = torch.autograd.grad(loss, self.clip)
        return {
            "timestep": self.timestep,
            "noisy_latent": self.noisy,
            "real_x0_guided": real,
            "kl_grad_unnormalized": fake - real,
            "kl_grad": gradient,
            "normalizer": normaliser,
            "gradient_norm_logged": gradient.abs().mean(),
            "loss": loss.detach(),
            "loss_grad_wrt_generator_x0": by_clip,
        }

    def critic(self) -> Tensors:
        """What the critic learns from."""
        x0 = self.case.input(f"{self.name}/fake_x0_cond").clone().requires_grad_()
        flow = self.schedule.flow_from_x0(x0, self.noisy, self.sigma)
        loss = critic_loss(flow, self.clip.detach(), self.noise)
        (by_x0,) = torch.autograd.grad(loss, x0)
        scores = FewStepFlowScheduler(shift=self.settings["score_models_timestep_shift"])
        raw = scores.flow_from_x0(x0.detach(), self.noisy, scores.sigma(self.timestep)[..., None, None, None])
        return {
            "timestep": self.timestep,
            "noisy_latent": self.noisy,
            "fake_raw_flow": raw,
            "flow_from_x0": flow.detach(),
            "loss": loss.detach(),
            "loss_grad_wrt_fake_x0": by_x0,
        }

    def predictions(self) -> Tensors:
        """The networks' answers that the variant records, `<real or fake>_x0_<cond or uncond>`."""
        scores = FewStepFlowScheduler(shift=self.settings["score_models_timestep_shift"])
        sigma = scores.sigma(self.timestep)[:, None, :, None, None]
        x = self.noisy.transpose(1, 2)
        names = [key.split("/")[1] for key in self.case.inputs if key.startswith(f"{self.name}/")]
        got = {}
        for quantity in sorted(key for key in names if "_x0_" in key):
            score, _, prompt = quantity.split("_")
            network = case_transformer(self.case, f"{score}_score.")
            with torch.no_grad():
                text = self.case.input(f"prompt_{prompt}")
                flow = network(x, self.timestep[:, 0].float(), text, return_dict=False)[0]
            got[quantity] = scores.x0_from_output(flow, x, sigma).transpose(1, 2)
        return got
