"""Wan2.1 checkpoints as they are published: original names and shapes."""

import torch

from streamvid.checkpoint_keys import TRANSFORMER, renamed

WAN_1_3B = {"dim": 1536, "ffn": 8960, "heads": 12, "layers": 30}
WAN_14B = {"dim": 5120, "ffn": 13824, "heads": 40, "layers": 40}
WAN_5B = {"dim": 3072, "ffn": 14336, "heads": 24, "layers": 30, "channels": 48}  # Wan2.2 TI2V, LongLive 2


def published_shapes(dim: int, ffn: int, layers: int, channels: int = 16, **_) -> dict[str, tuple[int, ...]]:
    """Names and shapes of an original Wan2.1 text-to-video checkpoint, written down from the published table."""
    shapes: dict[str, tuple[int, ...]] = {
        "patch_embedding.weight": (dim, channels, 1, 2, 2),
        "patch_embedding.bias": (dim,),
        "text_embedding.0.weight": (dim, 4096),
        "text_embedding.2.weight": (dim, dim),
        "time_embedding.0.weight": (dim, 256),
        "time_embedding.2.weight": (dim, dim),
        "time_projection.1.weight": (6 * dim, dim),
        "time_projection.1.bias": (6 * dim,),
        "head.head.weight": (4 * channels, dim),
        "head.head.bias": (4 * channels,),
        "head.modulation": (1, 2, dim),
    }
    for name in ("text_embedding.0", "text_embedding.2", "time_embedding.0", "time_embedding.2"):
        shapes[f"{name}.bias"] = (dim,)
    for layer in range(layers):
        block = f"blocks.{layer}"
        shapes[f"{block}.modulation"] = (1, 6, dim)
        for attention in ("self_attn", "cross_attn"):
            for part in "qkvo":
                shapes[f"{block}.{attention}.{part}.weight"] = (dim, dim)
                shapes[f"{block}.{attention}.{part}.bias"] = (dim,)
            for part in "qk":
                shapes[f"{block}.{attention}.norm_{part}.weight"] = (dim,)
        shapes |= {f"{block}.norm3.weight": (dim,), f"{block}.norm3.bias": (dim,)}
        shapes |= {f"{block}.ffn.0.weight": (ffn, dim), f"{block}.ffn.0.bias": (ffn,)}
        shapes |= {f"{block}.ffn.2.weight": (dim, ffn), f"{block}.ffn.2.bias": (dim,)}
    return shapes


def meta(shapes) -> dict[str, torch.Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def in_wan_names(state, rules=TRANSFORMER) -> dict[str, torch.Tensor]:
    return {renamed(name, rules, to_wan=True): tensor.contiguous() for name, tensor in state.items()}


def fsdp(state) -> dict[str, torch.Tensor]:
    """Names as FSDP leaves them: around the whole network and around every block."""
    wrapped = {}
    for name, tensor in in_wan_names(state).items():
        parts = name.split(".")
        if parts[0] == "blocks":
            parts.insert(2, "_fsdp_wrapped_module")
        wrapped["model._fsdp_wrapped_module." + ".".join(parts)] = tensor
    return wrapped
