"""Reading published checkpoints: Wan2.1, Self Forcing, LongLive v1 and everything saved in one of their forms.

    transformer = load_transformer("self_forcing_dmd.pt")
    transformer = load_transformer("longlive_base.pt", lora="lora.pt")

Files are safetensors or PyTorch pickles of plain tensors (`weights_only=True`), names are Wan's or diffusers'. A file that
does not fit the model in every tensor is refused with a list of what is missing and what is too much.
`streamvid.convert` writes what was read as one pipeline folder.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase, UMT5Config, UMT5EncoderModel

from streamvid import checkpoint_vae22
from streamvid.checkpoint_files import read_json, read_state_dict, shortened
from streamvid.checkpoint_keys import (
    TEXT_ENCODER,
    TRANSFORMER,
    looks_like,
    renamed,
    to_diffusers,
    vae_rules,
)
from streamvid.checkpoint_vae22 import is_vae22
from streamvid.errors import UserError
from streamvid.transformer import CausalWanTransformer3DModel

State = dict[str, torch.Tensor]


def _part(path: str | Path, name: str) -> Path:
    """The part called `name` of a pipeline folder, or the path itself."""
    path = Path(path)
    return path / name if (path / "model_index.json").is_file() else path


def _config_beside(path: Path, classes: tuple[str, ...]) -> dict[str, Any]:
    """`config.json` in the checkpoint's folder, if it belongs to one of `classes`."""
    file = (path if path.is_dir() else path.parent) / "config.json"
    config = read_json(file) if file.is_file() else {}
    return config if config.get("_class_name") in classes else {}


# --- fitting weights to a model ---------------------------------------------------------------------------------------


def fit(model: nn.Module, state: State, what: str, source: str) -> None:
    """Give a model made on the meta device its weights, without a copy.

    Raises:
        UserError: names or shapes differ.
    """
    expected = model.state_dict()
    missing = [name for name in expected if name not in state]
    unexpected = [name for name in state if name not in expected]
    shapes = [
        f"{name} is {_size(state[name])} instead of {_size(tensor)}"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    problems = [
        f"{len(names)} tensors {word} ({shortened(names)})"
        for names, word in ((missing, "missing"), (unexpected, "unexpected"), (shapes, "of another shape"))
        if names
    ]
    if problems:
        raise UserError(
            f"{source} looks like {looks_like(state)} and does not fit {what}: {', '.join(problems)}; "
            "give the checkpoint of this model, or the right config"
        )
    model.load_state_dict(state, assign=True)
    model.requires_grad_(True)


def _size(tensor: torch.Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a scalar"


def _placed(model: nn.Module, dtype: torch.dtype | None, device: torch.device | str):
    # not diffusers' own `to`: it warns of a cast even where there is none
    return nn.Module.to(model, device=device, dtype=dtype).eval()


def _layers(state: State, pattern: str) -> int:
    """One more than the highest index that `pattern` finds in the names."""
    return 1 + max((int(m[1]) for m in (re.match(pattern, name) for name in state) if m), default=-1)


# --- transformer ------------------------------------------------------------------------------------------------------

_ANYWHERE = re.compile(r"(?:^|(?<=\.))(?:_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")
_LEADING = re.compile(r"^(?:module\.|model\.)+")


def extract_transformer(
    state: Mapping[str, Any], which: str | None = None, source: str = "the checkpoint"
) -> State:
    """The transformer's tensors in diffusers' naming, out of whatever a release or a training run saved.

    Args:
        state: flat, or with `generator_ema`, `generator` or `model`.
        which: `ema` or `raw` weights; None takes the averaged ones where there are any.
        source: name for error messages.

    Raises:
        UserError: there are no such weights.
    """
    if which not in (None, "ema", "raw"):
        raise UserError(f"which = {which!r} is not known: choose ema or raw")
    keys = {
        "ema": ["generator_ema"],
        "raw": ["generator", "model"],
        None: ["generator_ema", "generator", "model"],
    }
    inner = next((state[key] for key in keys[which] if isinstance(state.get(key), Mapping)), None)
    nested = [key for key, value in state.items() if isinstance(value, Mapping)]
    if inner is None and which == "ema":
        raise UserError(f"{source} has no averaged weights (generator_ema): leave out which = ema")
    if inner is None and any(key.endswith("_lora") for key in nested):
        raise UserError(f"{source} is a LoRA: give the checkpoint of its base, and this file as lora")
    if inner is None and nested:
        raise UserError(
            f"{source} holds {shortened(nested)} and no generator or model: give a generator's checkpoint"
        )
    found = state if inner is None else inner
    others = [name for name, value in found.items() if not isinstance(value, torch.Tensor)]
    if others:
        warnings.warn(
            f"{source} also holds {len(others)} entries that are no tensors ({shortened(others)}), such as the empty extra "
            "states of a training run: left out",
            stacklevel=2,
        )
    tensors = {unwrapped(name): tensor for name, tensor in found.items() if isinstance(tensor, torch.Tensor)}
    return to_diffusers(tensors, TRANSFORMER)


def unwrapped(name: str) -> str:
    """A tensor's name without what FSDP, checkpointing, compilation and wrapper modules put before and into it."""
    return _LEADING.sub("", _ANYWHERE.sub("", name))


def infer_config(state: State, head_dim: int = 128, source: str = "the checkpoint") -> dict[str, Any]:
    """Config of the transformer whose weights (in diffusers' naming) these are. Shapes do not tell the head size.

    Raises:
        UserError: this is no Wan text-to-video transformer.
    """
    needed = (
        "patch_embedding.weight",
        "proj_out.weight",
        "condition_embedder.text_embedder.linear_1.weight",
        "condition_embedder.time_embedder.linear_1.weight",
        "blocks.0.ffn.net.0.proj.weight",
    )
    absent = [name for name in needed if name not in state]
    if absent or state[needed[0]].ndim != 5:
        raise UserError(
            f"{source} looks like {looks_like(state)} and not like a Wan text-to-video transformer "
            f"(no {absent[0] if absent else '3D patch embedding'}): give the transformer's checkpoint"
        )
    patch, out, text, time, ffn = (state[name] for name in needed)
    dim, channels, *patch_size = patch.shape
    if dim % head_dim:
        raise UserError(
            f"{source} has a width of {dim}, which heads of {head_dim} do not divide: give attention_head_dim in config"
        )
    return {
        "patch_size": tuple(patch_size),
        "num_attention_heads": dim // head_dim,
        "attention_head_dim": head_dim,
        "in_channels": channels,
        "out_channels": out.shape[0] // (patch_size[0] * patch_size[1] * patch_size[2]),
        "text_dim": text.shape[1],
        "freq_dim": time.shape[1],
        "ffn_dim": ffn.shape[0],
        "num_layers": _layers(state, r"blocks\.(\d+)\."),
        "cross_attn_norm": "blocks.0.norm2.weight" in state,
    }


def build_transformer(
    state: State, config: Mapping[str, Any] | None = None, source: str = "the checkpoint"
) -> CausalWanTransformer3DModel:
    """A transformer from weights in diffusers' naming; `config` overrides what the shapes tell."""
    given = dict(config or {})
    inferred = infer_config(state, given.get("attention_head_dim", 128), source)
    with torch.device("meta"):
        model = CausalWanTransformer3DModel(**{**inferred, **given})
    fit(model, state, "a Wan text-to-video transformer", source)
    return model


def load_transformer(
    path: str | Path,
    config: Mapping[str, Any] | None = None,
    *,
    which: str | None = None,
    lora: str | Path | None = None,
    merge: bool = False,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> CausalWanTransformer3DModel:
    """A transformer from a published file or folder (Wan, Self Forcing, LongLive; original or diffusers naming).

    Args:
        path: a file, a folder, or a pipeline folder with a `transformer` in it.
        config: what is known better than the shapes and a `config.json` tell, e.g. `{"attention_head_dim": 64}`.
        which: `ema` or `raw` weights of a training checkpoint; None prefers the averaged ones.
        lora: LongLive's `lora.pt` on top. It stays a PEFT adapter, as in the release, unless `merge`.
        dtype: None keeps the file's.

    Raises:
        UserError: the file is missing, damaged, or another model's.
    """
    folder = _part(path, "transformer")
    state = extract_transformer(read_state_dict(folder), which, str(path))
    beside = _config_beside(
        folder, ("WanModel", "CausalWanModel", "WanTransformer3DModel", "CausalWanTransformer3DModel")
    )
    if "dim" in beside and "num_heads" in beside:  # Wan's own names
        beside["attention_head_dim"] = beside["dim"] // beside["num_heads"]
    hints: dict[str, Any] = {
        name: beside[name] for name in ("attention_head_dim", "eps", "text_len") if name in beside
    }
    model = build_transformer(state, {**hints, **(config or {})}, str(path))
    if lora is not None:
        apply_lora(model, read_lora(lora), merge, str(lora))
    return _placed(model, dtype, device)


# --- LoRA -------------------------------------------------------------------------------------------------------------


def read_lora(path: str | Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Matrices A and B per module of our transformer, from `generator_lora` of a checkpoint or a flat file.

    Raises:
        UserError: the file has no complete LoRA.
    """
    content = read_state_dict(path)
    content = content.get("generator_lora", content)
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in content.items():
        match = re.fullmatch(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.\w+)?\.weight", name)
        if match is None or not isinstance(tensor, torch.Tensor) or tensor.ndim != 2:
            raise UserError(
                f"{path} is not a LoRA of linear layers (it holds {name} and looks like {looks_like(content)}): "
                "give a file with generator_lora"
            )
        module = unwrapped(match[1] + ".")
        module = (renamed(module + "weight", TRANSFORMER) or module + "weight").removesuffix(".weight")
        pairs.setdefault(module, {})[match[2]] = tensor
    halves = [module for module, pair in pairs.items() if len(pair) != 2]
    if halves or not pairs:
        raise UserError(
            f"{path} has no complete LoRA ({shortened(halves) or 'it is empty'}): download it again"
        )
    return {module: (pair["A"], pair["B"]) for module, pair in pairs.items()}


def apply_lora(
    model: CausalWanTransformer3DModel,
    lora: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    merge: bool = False,
    source: str = "the LoRA",
) -> None:
    """Add `B A` to the weights: as a PEFT adapter called `default`, or merged. Alpha is the rank (LongLive).

    Raises:
        UserError: it belongs to another model, or PEFT is needed and not installed.
    """
    modules = dict(model.named_modules())
    linear = {name: module for name in lora if isinstance(module := modules.get(name), nn.Linear)}
    foreign = [name for name in lora if name not in linear]
    foreign += [
        f"{name} is {b.shape[0]}x{a.shape[1]} instead of {_size(linear[name].weight)}"
        for name, (a, b) in lora.items()
        if name in linear and (b.shape[0], a.shape[1]) != tuple(linear[name].weight.shape)
    ]
    if foreign:
        raise UserError(
            f"{source} does not fit the transformer ({shortened(foreign)}): give the LoRA of this model"
        )
    if merge:
        with torch.no_grad():
            for name, (a, b) in lora.items():
                weight = linear[name].weight
                # out of place: the weights may be mapped from the file
                linear[name].weight = nn.Parameter((weight.float() + b.float() @ a.float()).to(weight.dtype))
        return
    try:
        from peft import LoraConfig, set_peft_model_state_dict
    except ImportError:
        raise UserError(
            f"lora = {source} unmerged needs peft: pip install 'streamvid[train]' or merge it"
        ) from None
    ranks = {name: a.shape[0] for name, (a, _) in lora.items()}
    first = next(iter(ranks.values()))
    model.add_adapter(
        LoraConfig(
            r=first,
            lora_alpha=first,
            target_modules=list(ranks),
            rank_pattern=ranks,
            alpha_pattern=ranks,
            init_lora_weights=False,
        )
    )
    flat = {
        f"{name}.lora_{x}.weight": t for name, pair in lora.items() for x, t in zip("AB", pair, strict=True)
    }
    report = set_peft_model_state_dict(model, flat)
    assert not report.unexpected_keys, report.unexpected_keys
    dtype = model.patch_embedding.weight.dtype
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.to(dtype)


# --- VAE and text encoder ---------------------------------------------------------------------------------------------


def load_vae(
    path: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> AutoencoderKLWan:
    """A VAE from `Wan2.1_VAE.pth` or `Wan2.2_VAE.pth`, a file in diffusers' naming, or a folder.

    Raises:
        UserError: the file is missing, damaged, or another model's.
    """
    folder = _part(path, "vae")
    state = vae_state(read_state_dict(folder))
    config = _config_beside(folder, ("AutoencoderKLWan",)) or infer_vae_config(state, str(path))
    with torch.device("meta"):
        vae = AutoencoderKLWan.from_config(config)
    fit(vae, state, "the Wan2.2 VAE" if is_vae22(state) else "the Wan2.1 VAE", str(path))
    return _placed(vae, dtype, device)


def vae_state(state: Mapping[str, Any]) -> State:
    """The VAE's tensors in diffusers' naming. The decoder's place of the first upsampler tells the blocks per level."""
    tensors = {unwrapped(name): t for name, t in state.items() if isinstance(t, torch.Tensor)}
    if is_vae22(tensors):
        return to_diffusers(tensors, checkpoint_vae22.rules())
    found = [re.match(r"decoder\.upsamples\.(\d+)\.resample\.", name) for name in tensors]
    flat = sorted({int(match[1]) for match in found if match})
    return to_diffusers(tensors, vae_rules(flat[0] - 1, len(flat) + 1) if flat else vae_rules())


def infer_vae_config(state: State, source: str = "the checkpoint") -> dict[str, Any]:
    """Config of the VAE whose weights (in diffusers' naming) these are; mean and deviation are the published ones.

    Raises:
        UserError: this is no VAE of Wan.
    """
    if is_vae22(state) and "post_quant_conv.weight" in state:
        return checkpoint_vae22.infer_config(state)
    looks = looks_like(state)
    needed = (
        "encoder.conv_in.weight",
        "post_quant_conv.weight",
        "decoder.up_blocks.0.resnets.0.conv1.weight",
    )
    if looks != "the Wan2.1 VAE" or any(name not in state for name in needed):
        raise UserError(
            f"{source} looks like {looks} and not like the Wan2.1 VAE: give Wan2.1_VAE.pth or its folder"
        )
    base = state[needed[0]].shape[0]
    entries = _layers(state, r"encoder\.down_blocks\.(\d+)\.")
    resamples = [n for n in range(entries) if f"encoder.down_blocks.{n}.resample.1.weight" in state]
    widths = [state[f"encoder.down_blocks.{n}.resample.1.weight"].shape[0] for n in resamples]
    last = state[f"encoder.down_blocks.{entries - 1}.conv2.weight"].shape[0]
    return {
        "base_dim": base,
        "z_dim": state[needed[1]].shape[0],
        "dim_mult": [width // base for width in [*widths, last]],
        "num_res_blocks": resamples[0],
        "temperal_downsample": [f"encoder.down_blocks.{n}.time_conv.weight" in state for n in resamples],
    }


def load_text_encoder(
    path: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> UMT5EncoderModel:
    """The umt5 encoder from `models_t5_umt5-xxl-enc-bf16.pth`, a file in transformers' naming, or a folder.

    Raises:
        UserError: the file is missing, damaged, or another model's.
    """
    folder = _part(path, "text_encoder")
    if folder.is_dir() and (folder / "config.json").is_file():
        return _placed(_from_folder(UMT5EncoderModel, folder, "a UMT5 text encoder"), dtype, device)
    content = read_state_dict(folder)
    state = to_diffusers({n: t for n, t in content.items() if isinstance(t, torch.Tensor)}, TEXT_ENCODER)
    config = infer_text_config(state, str(path))
    state.setdefault("encoder.embed_tokens.weight", state["shared.weight"])
    with torch.device("meta"):
        model = UMT5EncoderModel(config)
    fit(model, state, "a UMT5 text encoder", str(path))
    model.tie_weights()
    return _placed(model, dtype, device)


def infer_text_config(state: State, source: str = "the checkpoint") -> UMT5Config:
    """Config of the umt5 encoder whose weights (in transformers' naming) these are.

    Raises:
        UserError: this is no umt5 encoder.
    """
    first = "encoder.block.0.layer."
    needed = (
        "shared.weight",
        first + "0.SelfAttention.q.weight",
        first + "0.SelfAttention.relative_attention_bias.weight",
        first + "1.DenseReluDense.wi_0.weight",
    )
    if any(name not in state for name in needed):
        raise UserError(
            f"{source} looks like {looks_like(state)} and not like a UMT5 text encoder: "
            "give models_t5_umt5-xxl-enc-bf16.pth or a text_encoder folder"
        )
    embedding, query, bias, ffn = (state[name] for name in needed)
    return UMT5Config(
        vocab_size=embedding.shape[0],
        d_model=embedding.shape[1],
        num_heads=bias.shape[1],
        d_kv=query.shape[0] // bias.shape[1],
        d_ff=ffn.shape[0],
        num_layers=_layers(state, r"encoder\.block\.(\d+)\."),
        relative_attention_num_buckets=bias.shape[0],
        relative_attention_max_distance=128,
        feed_forward_proj="gated-gelu",
        layer_norm_epsilon=1e-6,
    )


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder (or in the `tokenizer` of a pipeline folder).

    Raises:
        UserError: there is none.
    """
    return _from_folder(AutoTokenizer, _part(path, "tokenizer"), "a tokenizer")


def _from_folder(loader: Any, folder: Path, what: str) -> Any:
    """`from_pretrained` of something local, its many kinds of errors as one sentence."""
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: give the folder with {what}")
    try:
        return loader.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
        raise UserError(f"{folder} does not load as {what} ({reason}): download it again") from None
