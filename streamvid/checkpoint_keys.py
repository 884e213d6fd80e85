"""Names of tensors: Wan's original naming <-> the naming of diffusers and transformers.

One list of pairs of templates per network, read in either direction. A template describes a whole name: `{i}` is an index,
`{q}` one of q, k, v, `{n}` one of q, k, `{net}` encoder or decoder, and `{rest}` whatever follows (`weight`, `bias`, but
also `lora_A.weight`). The first template that fits a name decides; a name that none fits has no counterpart.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import cache, lru_cache

FIELDS = {"i": r"\d+", "q": "[qkv]", "n": "[qk]", "net": "encoder|decoder", "rest": ".+"}

Rules = Sequence[tuple[str, str]]  # pairs (Wan, diffusers)

_ATTENTION = [
    pair
    for wan, diffusers in (("self_attn", "attn1"), ("cross_attn", "attn2"))
    for pair in (
        (f"blocks.{{i}}.{wan}.{{q}}.{{rest}}", f"blocks.{{i}}.{diffusers}.to_{{q}}.{{rest}}"),
        (f"blocks.{{i}}.{wan}.o.{{rest}}", f"blocks.{{i}}.{diffusers}.to_out.0.{{rest}}"),
        (f"blocks.{{i}}.{wan}.norm_{{n}}.{{rest}}", f"blocks.{{i}}.{diffusers}.norm_{{n}}.{{rest}}"),
    )
]

TRANSFORMER: Rules = (
    ("blocks.{i}.modulation", "blocks.{i}.scale_shift_table"),
    *_ATTENTION,
    ("blocks.{i}.norm3.{rest}", "blocks.{i}.norm2.{rest}"),  # the affine norm before cross-attention
    ("blocks.{i}.ffn.0.{rest}", "blocks.{i}.ffn.net.0.proj.{rest}"),
    ("blocks.{i}.ffn.2.{rest}", "blocks.{i}.ffn.net.2.{rest}"),
    ("patch_embedding.{rest}", "patch_embedding.{rest}"),
    ("text_embedding.0.{rest}", "condition_embedder.text_embedder.linear_1.{rest}"),
    ("text_embedding.2.{rest}", "condition_embedder.text_embedder.linear_2.{rest}"),
    ("time_embedding.0.{rest}", "condition_embedder.time_embedder.linear_1.{rest}"),
    ("time_embedding.2.{rest}", "condition_embedder.time_embedder.linear_2.{rest}"),
    ("time_projection.1.{rest}", "condition_embedder.time_proj.{rest}"),
    ("head.modulation", "scale_shift_table"),
    ("head.head.{rest}", "proj_out.{rest}"),
    # image-to-video only; known so that such a file is told apart
    ("blocks.{i}.cross_attn.k_img.{rest}", "blocks.{i}.attn2.add_k_proj.{rest}"),
    ("blocks.{i}.cross_attn.v_img.{rest}", "blocks.{i}.attn2.add_v_proj.{rest}"),
    ("blocks.{i}.cross_attn.norm_k_img.{rest}", "blocks.{i}.attn2.norm_added_k.{rest}"),
    ("img_emb.proj.0.{rest}", "condition_embedder.image_embedder.norm1.{rest}"),
    ("img_emb.proj.1.{rest}", "condition_embedder.image_embedder.ff.net.0.proj.{rest}"),
    ("img_emb.proj.3.{rest}", "condition_embedder.image_embedder.ff.net.2.{rest}"),
    ("img_emb.proj.4.{rest}", "condition_embedder.image_embedder.norm2.{rest}"),
    ("img_emb.emb_pos", "condition_embedder.image_embedder.pos_embed"),
)

TEXT_ENCODER: Rules = (
    ("token_embedding.weight", "shared.weight"),
    ("blocks.{i}.norm1.weight", "encoder.block.{i}.layer.0.layer_norm.weight"),
    ("blocks.{i}.attn.{q}.weight", "encoder.block.{i}.layer.0.SelfAttention.{q}.weight"),
    ("blocks.{i}.attn.o.weight", "encoder.block.{i}.layer.0.SelfAttention.o.weight"),
    (
        "blocks.{i}.pos_embedding.embedding.weight",
        "encoder.block.{i}.layer.0.SelfAttention.relative_attention_bias.weight",
    ),
    ("blocks.{i}.norm2.weight", "encoder.block.{i}.layer.1.layer_norm.weight"),
    ("blocks.{i}.ffn.gate.0.weight", "encoder.block.{i}.layer.1.DenseReluDense.wi_0.weight"),
    ("blocks.{i}.ffn.fc1.weight", "encoder.block.{i}.layer.1.DenseReluDense.wi_1.weight"),
    ("blocks.{i}.ffn.fc2.weight", "encoder.block.{i}.layer.1.DenseReluDense.wo.weight"),
    ("norm.weight", "encoder.final_layer_norm.weight"),
)

RESIDUAL = (
    ("residual.0.gamma", "norm1.gamma"),
    ("residual.2.{rest}", "conv1.{rest}"),
    ("residual.3.gamma", "norm2.gamma"),
    ("residual.6.{rest}", "conv2.{rest}"),
    ("shortcut.{rest}", "conv_shortcut.{rest}"),
)
RESAMPLE = (("resample.1.{rest}", "resample.1.{rest}"), ("time_conv.{rest}", "time_conv.{rest}"))


@lru_cache
def vae_rules(residual_blocks: int = 2, levels: int = 4) -> Rules:
    """Rules of the Wan2.1 VAE. The decoder of diffusers is nested by level, Wan's is a flat list."""
    places = [
        ("{net}.middle.0", "{net}.mid_block.resnets.0", RESIDUAL),
        ("{net}.middle.2", "{net}.mid_block.resnets.1", RESIDUAL),
        ("encoder.downsamples.{i}", "encoder.down_blocks.{i}", RESIDUAL + RESAMPLE),
    ]
    flat = 0
    for level in range(levels):
        nested = f"decoder.up_blocks.{level}"
        for block in range(residual_blocks + 1):
            places.append((f"decoder.upsamples.{flat}", f"{nested}.resnets.{block}", RESIDUAL))
            flat += 1
        places.append((f"decoder.upsamples.{flat}", f"{nested}.upsamplers.0", RESAMPLE))
        flat += 1
    return (*vae_ends(), *((f"{w}.{a}", f"{d}.{b}") for w, d, parts in places for a, b in parts))


def vae_ends() -> Rules:
    """Rules of what lies around the levels of either VAE."""
    return (
        ("conv1.{rest}", "quant_conv.{rest}"),
        ("conv2.{rest}", "post_quant_conv.{rest}"),
        ("{net}.conv1.{rest}", "{net}.conv_in.{rest}"),
        ("{net}.middle.1.{rest}", "{net}.mid_block.attentions.0.{rest}"),
        ("{net}.head.0.gamma", "{net}.norm_out.gamma"),
        ("{net}.head.2.{rest}", "{net}.conv_out.{rest}"),
    )


# What a set of names belongs to, the most telling marks first.
_LOOKS = (
    (r"\blora_[AB]\.", "a LoRA"),
    (
        r"quantized_weight_values|_extra_state$",
        "a quantised LongLive 2 transformer (model_bf16.pt is the one to give)",
    ),
    (r"\bvace_", "a Wan VACE transformer"),
    (r"\b(k_img|add_k_proj|img_emb|image_embedder)\b", "an image-to-video Wan transformer"),
    (r"^encoder\.downsamples\.\d+\.downsamples\.|^encoder\.down_blocks\.\d+\.resnets\.", "the Wan2.2 VAE"),
    (r"^decoder\.(upsamples|up_blocks)\.", "the Wan2.1 VAE"),
    (r"^decoder\.\d+\.", "a tiny VAE (TAEHV)"),
    (r"^token_embedding\.|SelfAttention", "a umt5 text encoder"),
    (r"\b(self_attn\.q|attn1\.to_q)\.", "a Wan text-to-video transformer"),
)


def looks_like(names: Iterable[str]) -> str:
    """In words, which kind of model a checkpoint's names belong to."""
    names = list(names)
    for mark, model in _LOOKS:
        if any(re.search(mark, name) for name in names):
            return model
    return f"something unknown (first names: {', '.join(names[:3])})" if names else "an empty file"


def renamed(name: str, rules: Rules, to_wan: bool = False) -> str | None:
    """The counterpart of a Wan name in diffusers' naming (or the other way round); None where there is none."""
    for pair in rules:
        source, target = reversed(pair) if to_wan else pair
        match = _pattern(source).fullmatch(name)
        if match:
            return target.format(**match.groupdict())
    return None


def in_wan_naming(names: Iterable[str], rules: Rules) -> bool:
    """Whether more of the names are Wan's than diffusers'."""
    names = list(names)
    wan = sum(renamed(name, rules) is not None for name in names)
    return wan > sum(renamed(name, rules, to_wan=True) is not None for name in names)


def to_diffusers(state: dict, rules: Rules) -> dict:
    """The state dict in diffusers' naming, whichever it came in. Names without a counterpart stay."""
    if not in_wan_naming(state, rules):
        return dict(state)
    return {renamed(name, rules) or name: tensor for name, tensor in state.items()}


@cache
def _pattern(template: str) -> re.Pattern:
    parts = re.split(r"\{(\w+)\}", template)
    text = "".join(f"(?P<{p}>{FIELDS[p]})" if odd % 2 else re.escape(p) for odd, p in enumerate(parts))
    return re.compile(text)
