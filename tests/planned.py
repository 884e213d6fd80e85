"""A model of the shapes of Wan 1.3B, everything smaller, for the memory that a process takes."""

from dataclasses import replace

from streamvid.specs import WAN_SPECS, ModelSpec, model_spec


def reduced() -> ModelSpec:
    spec = WAN_SPECS["1.3B"]
    transformer = {
        "num_attention_heads": 6,
        "ffn_dim": 3072,
        "num_layers": 24,
        "text_dim": 128,
        "text_len": 40,
    }
    return replace(
        spec,
        transformer={**spec.transformer, **transformer},
        vae={**spec.vae, "base_dim": 24},
        text_encoder=model_spec("diorama").text_encoder,
        scheduler={**spec.scheduler, "denoising_steps": (1000,)},
        height=96,
        width=160,
    )
