"""Self-forcing distillation: the student's own rollouts are pulled towards a teacher's distribution (DMD, SiD, GAN).

A step has up to two phases. The *generator* (every `generator_every` steps) rolls out clips with gradient in each block's
exit step and learns from the scores of teacher and critic. The *critic* learns the flow of new rollouts, and with a GAN to
tell them from real clips. How a clip is rolled out is the business of streamvid.training.clips: short ones anew in every
phase, long streams chunk by chunk, windows of joint blocks for a rolling method.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from streamvid.errors import UserError
from streamvid.training.adversary import Discriminator, GanOptions, discriminator_loss, generator_loss
from streamvid.training.causal_forward import CONTEXTS, clip_x0, method_plans
from streamvid.training.clips import Clip, ClipSource, RolloutOptions
from streamvid.training.datasets import ClipShards, check_frames, load_prompts
from streamvid.training.distribution_matching import (
    critic_loss,
    generator_gradient,
    guided,
    matching_loss,
    reward_weight,
    score_timestep,
    sid_loss,
)
from streamvid.training.dry_run import Work, mean_window
from streamvid.training.model_stage import (
    Denoiser,
    ModelStage,
    choose,
    frozen,
    load_denoiser,
    options,
    prepare_for_training,
)
from streamvid.training.rewards import RewardOptions, load_reward

MATCHINGS = ("dmd", "sid", "none")
NORMALISERS = ("clip", "block")


@dataclass
class TeacherOptions:
    """The real score: a bidirectional model, or with `matching.context` a causal one.

    Args:
        folder, weights: as of the model; None takes the model's folder.
        guidance: `c + guidance (c - u)`: 3 is what other code calls 4.
        negative_prompt: of the unconditional score.
    """

    folder: str | None = None
    weights: str | None = None
    guidance: float = 3.0
    negative_prompt: str = ""


@dataclass
class CriticOptions:
    """The fake score.

    Args:
        folder, weights: what it starts from; None: the teacher.
        guidance: of the fake score.
        generator_every: the generator learns in every so-manieth step, the critic in each.
    """

    folder: str | None = None
    weights: str | None = None
    guidance: float = 0.0
    generator_every: int = 5


@dataclass
class MatchingOptions:
    """How the distributions are matched.

    Args:
        loss: dmd, sid (score identity distillation), or none (with a GAN alone).
        alpha: of sid.
        shift, low, high: of the timesteps at which scores are compared (`score_timestep`).
        context: what teacher and critic see of a noisy clip: bidirectional, or causal by the method's windows, beside the
            generated clip itself as the clean history (teacher_forcing, as in LongLive 2) or without it (diffusion_forcing).
        normaliser: of the gradient, one per clip or one per block.
    """

    loss: str = "dmd"
    alpha: float = 1.0
    shift: float = 5.0
    low: float = 20.0
    high: float = 980.0
    context: str = "bidirectional"
    normaliser: str = "clip"


class Critic(nn.Module):
    """The fake score, with a discriminator on its hidden states where a GAN is wanted."""

    def __init__(self, score: Denoiser, gan: GanOptions | None):
        super().__init__()
        self.score = score
        self.discriminator = Discriminator(score.model, gan) if gan else None


class SelfForcingStage(ModelStage):
    """See the module's docstring.

    Args:
        model: `ModelOptions`; its LoRA and gradient checkpointing hold for the critic too.
        prompts: a text or JSONL file of prompts.
        batch_size: clips per micro-batch.
        teacher, critic, matching: options of the three.
        rollout: `RolloutOptions`.
        gan: `GanOptions`; latents: a shard folder of real clips, for it.
        reward: `RewardOptions`: clips are weighted by `exp(beta reward)` (Re-DMD).
    """

    def __init__(
        self,
        model: dict[str, Any],
        prompts: str,
        batch_size: int = 1,
        teacher: Mapping[str, Any] | None = None,
        critic: Mapping[str, Any] | None = None,
        matching: Mapping[str, Any] | None = None,
        rollout: Mapping[str, Any] | None = None,
        gan: Mapping[str, Any] | None = None,
        latents: str | None = None,
        reward: Mapping[str, Any] | None = None,
    ):
        super().__init__(model)
        own = self.options
        self.prompts, self.batch_size = load_prompts(prompts), batch_size
        self.teaching = options(TeacherOptions, teacher, "stage.teacher")
        self.judging = options(CriticOptions, critic, "stage.critic")
        self.matching = options(MatchingOptions, matching, "stage.matching")
        choose(self.matching.loss, MATCHINGS, "stage.matching.loss")
        choose(self.matching.context, CONTEXTS, "stage.matching.context")
        choose(self.matching.normaliser, NORMALISERS, "stage.matching.normaliser")
        if gan is None and self.matching.loss == "none":
            raise UserError("stage.matching.loss = none needs stage.gan: give both, or choose dmd or sid")
        if gan is not None and self.matching.context != "bidirectional":
            raise UserError(
                "stage.gan reads the hidden states of a bidirectional critic: set stage.matching.context=bidirectional"
            )
        if self.matching.loss == "sid" and self.matching.normaliser == "block":
            raise UserError("stage.matching.normaliser = block is for loss = dmd: set it to clip")
        if self.judging.generator_every < 1 or batch_size < 1:
            raise UserError("stage.critic.generator_every and stage.batch_size must be at least 1")
        teacher_folder = self.teaching.folder or own.folder
        real_score = load_denoiser(teacher_folder, self.teaching.weights, own.attention)
        self.teacher = frozen(real_score, self.frozen_dtype)
        score = load_denoiser(
            self.judging.folder or teacher_folder,
            self.judging.weights if self.judging.folder else self.judging.weights or self.teaching.weights,
            own.attention,
        )
        prepare_for_training(score.model, own)
        self.gan = None if gan is None else options(GanOptions, gan, "stage.gan")
        self.critic = Critic(score, self.gan)
        rolling = options(RolloutOptions, rollout, "stage.rollout")
        self.clips = ClipSource(self, rolling)
        causal = self.matching.context != "bidirectional"
        blocks = rolling.supervised // self.method.frames_per_block
        self.score_plans = method_plans(self.method, blocks) if causal else None
        self.real = self._real_clips(latents)
        self.rewarding = None if reward is None else options(RewardOptions, reward, "stage.reward")
        self.reward = None if self.rewarding is None else load_reward(self.rewarding)

    def _real_clips(self, latents: str | None) -> ClipShards | None:
        if (latents is None) != (self.gan is None):
            raise UserError("stage.latents and stage.gan need each other: give both or none")
        if latents is None:
            return None
        shards = ClipShards(latents)
        check_frames(shards, self.clips.options.supervised, self.latent_shape, self.method.frames_per_block)
        return shards

    def parts(self) -> dict[str, nn.Module]:
        return {"generator": self.transformer, "critic": self.critic}

    def phases(self, step: int) -> tuple[str, ...]:
        return ("generator", "critic") if step % self.judging.generator_every == 0 else ("critic",)

    def train(self, mode: bool = True):
        super().train(mode)
        self.teacher.eval()
        return self

    def at_rest(self) -> bool:
        return self.clips.at_rest()

    def phase_batch(self, phase: str, seed: int, step: int, process: int) -> dict[str, Any]:
        entropy = [seed, step, ("generator", "critic").index(phase)]
        rng = np.random.default_rng([*entropy, 1 + process])
        batch: dict[str, Any] = {
            "phase": phase,
            "number": process,
            "prompts": [self.prompts[i] for i in rng.integers(len(self.prompts), size=self.batch_size)],
            "seeds": rng.integers(2**31, size=self.batch_size).tolist(),
            "shared": np.random.default_rng(entropy),  # what all processes draw alike
        }
        if self.real is not None:
            index = rng.integers(len(self.real), size=self.batch_size).tolist()
            clips, prompts = self.real.batch(index)
            frames = self.clips.options.supervised
            batch |= {"real": clips.transpose(1, 2)[:, :, :frames], "real_prompts": prompts}
        return batch

    def forward(self, batch: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        generator = batch["phase"] == "generator"
        with torch.set_grad_enabled(generator):
            clip = self.clips.roll(batch)
        text = self.encode(clip.prompts)
        timestep, noise = self._draw(clip.latents)
        loss, numbers = (self._generator if generator else self._critic)(batch, clip, text, timestep, noise)
        return loss, {name: value.detach() for name, value in numbers.items()}

    def _draw(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A timestep per clip at which scores are compared, and noise; drawn on the CPU, so that devices agree."""
        drawn = torch.randint(0, 1000, (x.shape[0],)).float()
        timestep = score_timestep(drawn, self.matching.shift, self.matching.low, self.matching.high)
        return timestep.to(x.device), torch.randn(x.shape).to(x.device)

    def work(self) -> list[Work]:
        """Block by block, also for a rolling method, at a random exit step."""
        o, method, frame = self.clips.options, self.method, self.tokens_per_frame
        new = o.supervised - o.overlap if o.streaming else o.frames
        blocks, block = new // method.frames_per_block, self.batch_size * method.frames_per_block * frame
        keys = round(mean_window(method_plans(method, o.frames // method.frames_per_block)) * frame)
        levels = len(method.denoising_steps or self.scheduler.config.denoising_steps)
        clip, every = self.batch_size * o.supervised * frame, 1 / self.judging.generator_every
        clip *= 2 if self.matching.context == "teacher_forcing" else 1
        rollout = blocks * ((levels + 1) / 2 + 1)  # a mean exit step, and the context pass
        seen = o.supervised if self.score_plans is None else mean_window(self.score_plans)
        student, score, whole = self.transformer, self.critic.score.model, round(seen * frame)
        teacher, fake = 1 + (self.teaching.guidance != 0), 1 + (self.judging.guidance != 0)
        return [
            Work("rollouts without gradient", student, rollout + every * (rollout - blocks), block, keys),
            Work("exit steps", student, every * blocks, block, keys, True),
            Work("teacher's scores", self.teacher.model, every * teacher, clip, whole),
            Work("critic's scores", score, every * fake, clip, whole),
            Work("critic's own loss", score, 1, clip, whole, True),
        ]

    # --- generator ----------------------------------------------------------------------------------------------------

    def _generator(self, batch, clip: Clip, text, timestep, noise):
        x = clip.latents.float()
        numbers: dict[str, torch.Tensor] = {"exit_step": torch.tensor(float(clip.exit_step))}
        loss = torch.zeros((), device=x.device)
        if self.matching.loss != "none":
            matched, found = self._match(clip, x, text, timestep, noise)
            loss, numbers = loss + matched, {**numbers, **found}
        if self.gan is not None:
            fake_logit, real_logit = self._logits(batch, x, text, timestep, noise)
            adversarial = self.gan.generator_weight * generator_loss(
                fake_logit, real_logit.detach(), self.gan
            )
            loss, numbers = loss + adversarial, {**numbers, "gan": adversarial}
        return loss, numbers

    def _match(self, clip: Clip, x, text, timestep, noise):
        sid = self.matching.loss == "sid"
        clean, per_block = x.detach(), self.matching.normaliser == "block"
        with torch.set_grad_enabled(sid):
            noisy = self.denoiser.noisy(x if sid else clean, noise, timestep)
            fake = self._score(self.critic.score, self.judging.guidance, noisy, timestep, text, clean)
            real = self._score(self.teacher, self.teaching.guidance, noisy, timestep, text, clean)
        size = self.method.frames_per_block if per_block else None
        gradient, normaliser = generator_gradient(clean, fake.detach(), real.detach(), size)
        numbers = {"normaliser": normaliser.mean(), "dmd_gradient": gradient.abs().mean()}
        weight = None
        if self.reward is not None and self.rewarding is not None:
            reward = self.reward(self.clips.pixels(clip), clip.prompts).to(x.device)
            weight = reward_weight(reward, self.rewarding.beta)
            numbers |= {"reward": reward.mean(), "reward_weight": weight.mean()}
        mask = clip.mask[None, None, :, None, None].expand_as(x).to(x.device)
        if sid:
            keep = mask[:, :, :, :1, :1].to(x)
            x, fake, real = (t * keep for t in (x, fake, real))
            return sid_loss(x, fake, real, self.matching.alpha), numbers
        return matching_loss(x, gradient, mask, weight).float(), numbers

    def _score(self, denoiser: Denoiser, guidance: float, noisy, timestep, text, clean) -> torch.Tensor:
        conditional = self._seen_x0(denoiser, noisy, timestep, text, clean)
        if guidance == 0:
            return conditional
        nothing = self.encode([self.teaching.negative_prompt] * len(text))
        return guided(conditional, self._seen_x0(denoiser, noisy, timestep, nothing, clean), guidance)

    def _seen_x0(self, denoiser: Denoiser, noisy, timestep, text, clean) -> torch.Tensor:
        """x0 of a noisy clip as teacher and critic see it."""
        if self.score_plans is None:
            return denoiser.x0(noisy, timestep, text)
        times = timestep[:, None].expand(-1, noisy.shape[2])
        history = clean if self.matching.context == "teacher_forcing" else None
        return clip_x0(denoiser, noisy, times, text, self.score_plans, history)

    # --- critic -------------------------------------------------------------------------------------------------------

    def _critic(self, batch, clip: Clip, text, timestep, noise):
        x = clip.latents.float().detach()
        score = self.critic.score
        noisy = score.noisy(x, noise, timestep)
        predicted = self._seen_x0(score, noisy, timestep, text, x)
        flow = score.scheduler.flow_from_x0(predicted, noisy, score.sigma(timestep))
        loss = critic_loss(flow, x, noise)
        numbers = {"flow": loss}
        if self.gan is not None:
            fake_logit, real_logit = self._logits(batch, x, text, timestep, noise)
            found = discriminator_loss(fake_logit, real_logit, self.gan)
            found = found + self._smoothness(batch, x, text, timestep, noise, fake_logit, real_logit)
            loss = loss + self.gan.critic_weight * found
            numbers |= {"gan": found, "real_logit": real_logit.mean(), "fake_logit": fake_logit.mean()}
        return loss, numbers

    def _logits(self, batch, x, text, timestep, noise, jitter: tuple[float, float] = (0.0, 0.0)):
        """Of generated and of real clips at the same noise; `jitter` moves the two kinds of clips a little."""
        assert self.critic.discriminator is not None
        real = batch["real"].to(x)
        real_text = self.encode(batch["real_prompts"])
        logits = []
        for clean, words, sigma in ((x, text, jitter[0]), (real, real_text, jitter[1])):
            moved = clean + sigma * torch.randn(clean.shape).to(clean) if sigma else clean
            noisy = self.critic.score.noisy(moved, noise, timestep)
            logits.append(self.critic.discriminator(noisy, timestep, words))
        return logits[0], logits[1]

    def _smoothness(self, batch, x, text, timestep, noise, fake_logit, real_logit) -> torch.Tensor:
        """R1 and R2 by finite differences: how much the logits of real and of generated clips change under small noise."""
        gan = self.gan
        assert gan is not None
        penalty = torch.zeros((), device=x.device)
        if gan.r1_weight or gan.r2_weight:
            fake_moved, real_moved = self._logits(batch, x, text, timestep, noise, (gan.r_sigma, gan.r_sigma))
            penalty = gan.r1_weight * (real_moved - real_logit).square().mean()
            penalty = penalty + gan.r2_weight * (fake_moved - fake_logit).square().mean()
        return penalty
