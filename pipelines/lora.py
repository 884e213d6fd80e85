"""LoRA files of every naming that is published for Wan's transformer, through diffusers' loader.

    pipe.load_lora_weights("style.safetensors", adapter_name="style")
    pipe.set_adapters("style", 0.8)

| file | names |
|---|---|
| diffusers | `transformer.blocks.0.attn1.to_q.lora_A.weight` |
| PEFT, a folder with `adapter_config.json` | `base_model.model.blocks.0.attn1.to_q.lora_A.weight` |
| training runs, LongLive's `lora.pt` | `base_model.model.blocks.0.self_attn.q.lora_A.weight`, also within `generator_lora` |
| ComfyUI and most hubs | `diffusion_model.blocks.0.self_attn.q.lora_down.weight` |
| musubi-tuner | `lora_unet_blocks_0_self_attn_q.lora_down.weight` |
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders import WanLoraLoaderMixin
from torch import nn

from streamvid.checkpoint_files import read_json, shortened
from streamvid.checkpoint_keys import TRANSFORMER, looks_like, renamed
from streamvid.checkpoints import unwrapped
from streamvid.errors import UserError

PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_MATRIX = re.compile(r"(?:transformer\.)?(?:base_model\.model\.)?(.+)\.(lora_[AB])(?:\.\w+)?\.(weight|bias)")


class StreamVidLoraMixin(WanLoraLoaderMixin):
    """`load_lora_weights` and what belongs to it: `set_adapters`, `fuse_lora`, `unfuse_lora`, `unload_lora_weights`, ...

    A stream that is running keeps its cached keys and values: load before you start one.
    """

    _lora_loadable_modules = ["transformer"]

    @classmethod
    def lora_state_dict(cls, pretrained_model_name_or_path_or_dict, **kwargs: Any):
        """Matrices as diffusers names them, from whatever naming they come in.

        Raises:
            UserError: the file has no LoRA of linear layers.
        """
        source = pretrained_model_name_or_path_or_dict
        with_metadata = kwargs.pop("return_lora_metadata", False)
        peft_config: dict[str, Any] | None = None
        if isinstance(source, str | Path):
            folder = Path(source)
            if (folder / PEFT_WEIGHTS).is_file():
                kwargs.setdefault("weight_name", PEFT_WEIGHTS)
            if kwargs.get("weight_name") == PEFT_WEIGHTS:
                peft_config = read_json(folder / PEFT_CONFIG)
            elif folder.is_file():
                source, kwargs["weight_name"] = str(folder.parent), folder.name
        try:
            state, metadata = super().lora_state_dict(source, return_lora_metadata=True, **kwargs)
        except KeyError as name:  # diffusers converts whole files only
            raise UserError(
                f"this LoRA lacks {name}, which its naming wants in every block: convert it to the names of diffusers"
            ) from None
        state = _diffusers_names(state.get("generator_lora", state))
        if peft_config is not None:
            metadata = _metadata_of_peft(peft_config, state)
        elif metadata is not None:  # `transformer.save_lora_adapter` leaves out the part's name
            metadata = {f"transformer.{name.removeprefix('transformer.')}": v for name, v in metadata.items()}
        return (state, metadata) if with_metadata else state

    @classmethod
    def _maybe_expand_t2v_lora_for_i2v(cls, transformer: nn.Module, state_dict: dict[str, torch.Tensor]):
        """Here, where the loader knows both, a LoRA of another model is refused.

        Raises:
            UserError: a matrix has no linear layer of its size.
        """
        modules = dict(transformer.named_modules())
        foreign = []
        for name, tensor in state_dict.items():
            path, _, half = name.removeprefix("transformer.").rpartition(".lora_")
            layer = modules.get(path)
            layer = getattr(layer, "base_layer", layer)  # of an adapter loaded before
            if not isinstance(layer, nn.Linear):
                foreign.append(path)
            elif half == "A.weight" and tensor.shape[1] != layer.in_features:
                foreign.append(f"{path} takes {tensor.shape[1]} features instead of {layer.in_features}")
            elif half == "B.weight" and tensor.shape[0] != layer.out_features:
                foreign.append(f"{path} gives {tensor.shape[0]} features instead of {layer.out_features}")
        if foreign:
            raise UserError(
                f"the LoRA does not fit the transformer ({shortened(foreign)}): give the LoRA of this model"
            )
        return state_dict


def _diffusers_names(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    named = {}
    for name, tensor in state.items():
        match = _MATRIX.fullmatch(name)
        if match is None or not isinstance(tensor, torch.Tensor):
            raise UserError(
                f"this is not a LoRA of linear layers (it holds {name} and looks like {looks_like(state)}): "
                "give a file of lora_A and lora_B matrices"
            )
        path, half, kind = match.groups()
        path = unwrapped(path + ".").removesuffix(".")
        path = (renamed(f"{path}.weight", TRANSFORMER) or f"{path}.weight").removesuffix(".weight")
        named[f"transformer.{path}.{half}.{kind}"] = tensor
    if not named:
        raise UserError("this LoRA is empty: download it again")
    return named


def _metadata_of_peft(config: dict[str, Any], state: dict[str, torch.Tensor]) -> dict[str, Any]:
    """What the loader needs of a PEFT configuration: the adapter's kind and strength, for the modules that the file has."""
    ranks = {
        name.removeprefix("transformer.").removesuffix(".lora_A.weight"): tensor.shape[0]
        for name, tensor in state.items()
        if name.endswith(".lora_A.weight")
    }
    metadata: dict[str, Any] = {
        key: config[key] for key in ("r", "lora_alpha", "use_rslora", "lora_bias") if key in config
    }
    metadata |= {
        "target_modules": sorted(ranks),
        "rank_pattern": ranks,
        "alpha_pattern": config.get("alpha_pattern") or {},
    }
    return {f"transformer.{key}": value for key, value in metadata.items()}
