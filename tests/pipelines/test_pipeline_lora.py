"""LoRA files, whatever their names: loaded, weighted, fused, taken out again."""

import copy
import json
import re

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from streamvid.pipelines.pipeline_streamvid import StreamVidPipeline

from streamvid.checkpoint_keys import TRANSFORMER, renamed
from streamvid.errors import UserError

RANK, ALPHA = 2, 6
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2"]


@pytest.fixture
def pipe() -> StreamVidPipeline:
    return tiny.new_pipeline()


def latents(pipe) -> torch.Tensor:
    return pipe("a red fox walks", 9, output_type="latent").frames


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, atol=1e-4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What PEFT saves after a training."""
    folder = tmp_path_factory.mktemp("peft")
    torch.manual_seed(5)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, init_lora_weights=False)
    get_peft_model(tiny.transformer(), config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def matrices(folder) -> dict[str, torch.Tensor]:
    """By names of modules: `blocks.0.attn1.to_q.lora_A`."""
    state = load_file(folder / "adapter_model.safetensors")
    return {
        name.removeprefix("base_model.model.").removesuffix(".weight"): tensor
        for name, tensor in state.items()
    }


def merged(pipe, matrices, scale: float = ALPHA / RANK) -> StreamVidPipeline:
    """The same pipeline with `scale * B A` added to its weights."""
    other = StreamVidPipeline(
        **{**pipe.components, "transformer": copy.deepcopy(pipe.transformer)}, height=32, width=32
    )
    other.set_progress_bar_config(disable=True)
    modules = dict(other.transformer.named_modules())
    for name in matrices:
        if name.endswith(".lora_A"):
            path = name.removesuffix(".lora_A")
            modules[path].weight.data += scale * matrices[f"{path}.lora_B"] @ matrices[name]
    return other


def wan(path: str) -> str:
    return renamed(f"{path}.weight", TRANSFORMER, to_wan=True).removesuffix(".weight")


def in_names(style: str, matrices) -> dict:
    """The LoRA as it is published, with alpha = rank where the format has no place for it."""
    state: dict = {}
    for name, tensor in matrices.items():
        path, _, half = name.rpartition(".")
        old = {"lora_A": "lora_down", "lora_B": "lora_up"}[half]
        match style:
            case "diffusers":
                state[f"transformer.{name}.weight"] = tensor
            case "longlive":
                state[f"base_model.model.model.{wan(path)}.{half}.default.weight"] = tensor
            case "training run":
                state[f"base_model.model.{wan(path)}.{half}.weight"] = tensor
            case "comfyui":
                state[f"diffusion_model.{wan(path)}.{old}.weight"] = tensor
                state[f"diffusion_model.{wan(path)}.alpha"] = torch.tensor(float(ALPHA))
            case "comfyui, no alpha":
                state[f"diffusion_model.{wan(path)}.{half}.weight"] = tensor
            case "musubi":
                module = "lora_unet_" + wan(path).replace(".", "_")
                state[f"{module}.{old}.weight"] = tensor
                state[f"{module}.alpha"] = torch.tensor(float(ALPHA))
    return {"generator_lora": state, "critic_lora": {}} if style == "longlive" else state


def test_a_folder_of_peft_counts_with_its_alpha(pipe, folder, matrices):
    expected, plain = latents(merged(pipe, matrices)), latents(pipe)
    assert not close(expected, plain)
    pipe.load_lora_weights(folder)
    assert close(latents(pipe), expected)


@pytest.mark.parametrize(
    ("style", "scale"),
    [
        ("diffusers", 1),
        ("longlive", 1),
        ("training run", 1),
        ("comfyui", ALPHA / RANK),
        ("comfyui, no alpha", 1),
        ("musubi", ALPHA / RANK),
    ],
)
def test_published_names(pipe, matrices, tmp_path, style, scale):
    expected = latents(merged(pipe, matrices, scale))
    state = in_names(style, matrices)
    file = tmp_path / ("lora.pt" if style == "longlive" else "lora.safetensors")
    torch.save(state, file) if style == "longlive" else save_file(state, file)
    pipe.load_lora_weights(file)
    assert close(latents(pipe), expected)


def test_files_are_named_as_in_diffusers(pipe, matrices, tmp_path):
    expected = latents(merged(pipe, matrices, 1))
    save_file(in_names("diffusers", matrices), tmp_path / "style.safetensors")
    pipe.load_lora_weights(str(tmp_path), weight_name="style.safetensors")
    assert close(latents(pipe), expected)
    other = tiny.new_pipeline()
    other.load_lora_weights(in_names("diffusers", matrices))  # tensors that are loaded already
    assert close(latents(other), expected)


def test_adapters_are_weighted_and_mixed(pipe, folder, matrices):
    plain = latents(pipe)
    half = latents(merged(pipe, matrices, 0.5 * ALPHA / RANK))
    both = latents(merged(merged(pipe, matrices, 0.5 * ALPHA / RANK), matrices, 2))
    pipe.load_lora_weights(folder, adapter_name="peft")
    pipe.set_adapters("peft", 0.5)
    assert close(latents(pipe), half)
    pipe.load_lora_weights(in_names("diffusers", matrices), adapter_name="plain")
    pipe.set_adapters(["peft", "plain"], [0.5, 2.0])
    assert close(latents(pipe), both)
    assert pipe.get_active_adapters() == ["peft", "plain"]
    pipe.delete_adapters("plain")
    pipe.set_adapters("peft", 0.5)
    assert close(latents(pipe), half)
    pipe.disable_lora()
    assert close(latents(pipe), plain)
    pipe.enable_lora()
    assert close(latents(pipe), half)


def test_fused_and_taken_out_again(pipe, folder, matrices):
    plain, expected = latents(pipe), latents(merged(pipe, matrices, 0.5 * ALPHA / RANK))
    pipe.load_lora_weights(folder, adapter_name="peft")
    pipe.fuse_lora(lora_scale=0.5)
    assert pipe.num_fused_loras == 1
    assert close(latents(pipe), expected)
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    assert not hasattr(pipe.transformer, "peft_config") or not pipe.transformer.peft_config
    assert close(latents(pipe), plain)


def test_saved_by_diffusers_and_read_again(pipe, folder, matrices, tmp_path):
    expected = latents(merged(pipe, matrices))
    pipe.load_lora_weights(folder, adapter_name="peft")
    pipe.transformer.save_lora_adapter(tmp_path, adapter_name="peft")
    other = tiny.new_pipeline()
    other.load_lora_weights(tmp_path)
    assert close(latents(other), expected)
    StreamVidPipeline.save_lora_weights(
        tmp_path / "pipe",
        {f"{name}.weight": tensor for name, tensor in matrices.items()},
        transformer_lora_adapter_metadata=pipe.transformer.peft_config["peft"].to_dict(),
    )
    other = tiny.new_pipeline()
    other.load_lora_weights(tmp_path / "pipe")
    assert close(latents(other), expected)


def test_a_running_stream_and_a_new_one(pipe, folder, matrices):
    """Weights belong to the pipeline: a stream takes them as they are at its next block."""
    stream = pipe.stream("a red fox walks", decode_pixels=False)
    first = next(stream).latents
    pipe.load_lora_weights(folder)
    assert torch.isfinite(next(stream).latents).all()
    assert not close(latents(pipe), first)


def broken(matrices, kind: str) -> dict:
    state = in_names("diffusers", matrices)
    match kind:
        case "another depth":
            return {name.replace("blocks.1", "blocks.7"): tensor for name, tensor in state.items()}
        case "another width":
            return {name: t.repeat(1, 2) if "lora_A" in name else t for name, t in state.items()}
        case "half a block":
            return {k: v for k, v in in_names("musubi", matrices).items() if "self_attn_k" not in k}
        case "weights":
            return dict(tiny.transformer().state_dict())
    return {}


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            "another depth",
            r"the LoRA does not fit the transformer \(blocks.7.\S+, .*\): give the LoRA of",
        ),
        (
            "another width",
            r"the LoRA does not fit .*\(blocks.0.\S+ takes 48 features instead of 24",
        ),
        ("weights", "this is not a LoRA of linear layers .* looks like a Wan text-to-video transformer"),
        ("half a block", "this LoRA lacks 'blocks_0_self_attn_k.lora_down.weight', which its naming wants"),
        ("empty", "this LoRA is empty"),
    ],
)
def test_what_does_not_fit_is_refused(pipe, matrices, kind, message):
    plain = latents(pipe)
    with pytest.raises(UserError, match=message) as error:
        pipe.load_lora_weights(broken(matrices, kind))
    assert "\n" not in str(error.value)
    assert torch.equal(latents(pipe), plain)


def test_peft_without_its_configuration_is_refused(pipe, folder, tmp_path):
    """Its strength would be guessed."""
    (tmp_path / "adapter_model.safetensors").write_bytes((folder / "adapter_model.safetensors").read_bytes())
    with pytest.raises(UserError, match=re.escape("adapter_config.json")):
        pipe.load_lora_weights(tmp_path)
    config = json.loads((folder / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    pipe.load_lora_weights(tmp_path)
