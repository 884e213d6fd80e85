"""How to train, apart from what."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class TrainerOptions:
    """How to train, apart from what.

    Args:
        output: folder of the run; steps: how many.
        muon_lr, adamw_lr: peaks of the learning rates (a `muon_lr` of 0 leaves everything to AdamW).
        critic_lr: AdamW's for all parts but the first; 0: that of the first.
        beta1, beta2, weight_decay: of AdamW; the decay also of Muon.
        warmup, decay_fraction: of the learning rate (`learning_rate_factor`).
        ema: decay per step of the averaged weights, 0: none; ema_from: they start as the weights before this step.
        clip: largest norm of a part's gradient.
        accumulate: micro-batches per step and process.
        mixed_precision: no, bf16 or fp16; device: auto or cpu; sharding: ddp or fsdp2; threads: of a CPU process.
        on_nan: stop at a loss or gradient that is not finite, or skip the update.
        report: none, tensorboard or wandb, beside the JSON lines.
        sample_every, sample_prompt, sample_blocks: sample videos with a contact sheet, where the stage makes any.
    """

    output: str
    steps: int
    seed: int = 0
    muon_lr: float = 2e-3
    adamw_lr: float = 1e-3
    critic_lr: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.99
    weight_decay: float = 0.0
    warmup: int = 20
    decay_fraction: float = 0.45
    ema: float = 0.99
    ema_from: int = 0
    clip: float = 1.0
    accumulate: int = 1
    mixed_precision: str = "bf16"
    device: str = "auto"
    sharding: str = "ddp"
    threads: int = 1
    on_nan: str = "stop"
    report: str = "none"
    log_every: int = 20
    checkpoint_every: int = 100
    validate_every: int = 0
    sample_every: int = 0
    sample_prompt: str = ""
    sample_blocks: int = 7
