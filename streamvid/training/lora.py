"""Low-rank adapters as published (LongLive): on every linear layer inside the blocks, through PEFT."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file
from torch import nn

from streamvid.errors import UserError
from streamvid.transformer import CausalWanTransformer3DModel


def lora_targets(model: nn.Module) -> list[str]:
    """Names of the linear layers of all blocks: ten per block."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("blocks.")
    ]


def add_lora(model: CausalWanTransformer3DModel, rank: int, alpha: float) -> None:
    """Freeze the model and add matrices A (random) and B (zero) of `rank`, scaled by alpha / rank, which learn."""
    if rank < 1:
        raise UserError(f"lora_rank = {rank} must be at least 1, or 0 for none")
    try:
        from peft import LoraConfig
    except ImportError:
        raise UserError(
            "lora_rank needs peft: pip install 'streamvid[train]', or set lora_rank to 0"
        ) from None
    model.requires_grad_(False)
    model.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=lora_targets(model)))


def merged(model: CausalWanTransformer3DModel) -> CausalWanTransformer3DModel:
    """A copy of the model with its adapters in the weights."""
    state = {}
    modules = dict(model.named_modules())
    for name, tensor in model.state_dict().items():
        if ".lora_" in name:
            continue
        if name.endswith(".base_layer.weight"):
            layer = modules[name.removesuffix(".base_layer.weight")]
            tensor = tensor + layer.get_delta_weight("default").to(tensor)
        state[name.replace(".base_layer.", ".")] = tensor
    plain = CausalWanTransformer3DModel.from_config(model.config)
    plain.load_state_dict(state)
    return plain.to(model.device, model.dtype)


def save_lora(model: CausalWanTransformer3DModel, path: Path) -> None:
    """The adapter alone, in the form that `streamvid convert --lora` reads, whose alpha is the rank: B takes the scale."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            a, b = (
                getattr(module, kind)["default"].weight.detach().float().cpu()
                for kind in ("lora_A", "lora_B")
            )
            state[f"{name}.lora_A.weight"] = a.contiguous()
            state[f"{name}.lora_B.weight"] = b * module.scaling["default"]
    save_file(state, path)
