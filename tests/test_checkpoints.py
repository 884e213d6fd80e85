"""Published checkpoints: names, every form in which releases save them, and what is refused."""

import json
import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from published import WAN_1_3B, WAN_5B, WAN_14B, fsdp, in_wan_names, meta, published_shapes
from safetensors.torch import load_file, save_file
from streamvid.pipelines.pipeline_streamvid import StreamVidPipeline
from transformers import UMT5Config, UMT5EncoderModel

from streamvid.checkpoint_keys import TEXT_ENCODER, TRANSFORMER, looks_like, renamed, to_diffusers, vae_rules
from streamvid.checkpoints import (
    build_transformer,
    extract_transformer,
    infer_config,
    infer_text_config,
    infer_vae_config,
    load_text_encoder,
    load_transformer,
    load_vae,
    vae_state,
)
from streamvid.convert import convert
from streamvid.errors import UserError
from streamvid.transformer import CausalWanTransformer3DModel

HEAD = {"attention_head_dim": 12, "text_len": tiny.TEXT_LENGTH}  # what shapes do not tell


def same(model, state) -> bool:
    own = model.state_dict()
    return own.keys() == state.keys() and all(torch.equal(own[name], state[name]) for name in own)


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "count"), [(WAN_1_3B, 825), (WAN_14B, 1095), (WAN_5B, 825)])
def test_full_size_key_sets_fit_in_both_namings(size, count):
    wan = meta(published_shapes(**size))
    assert len(wan) == count
    state = extract_transformer(wan)
    config = infer_config(state)
    assert (config["num_attention_heads"], config["num_layers"], config["ffn_dim"]) == (
        size["heads"],
        size["layers"],
        size["ffn"],
    )
    model = build_transformer(state)  # strict: every name and shape
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert len(expected) == count
    # diffusers' own class has the same names and shapes, and its checkpoint loads as it is
    with torch.device("meta"):
        theirs = WanTransformer3DModel(
            num_attention_heads=size["heads"],
            ffn_dim=size["ffn"],
            num_layers=size["layers"],
            in_channels=size.get("channels", 16),
            out_channels=size.get("channels", 16),
        ).state_dict()
    assert {name: tensor.shape for name, tensor in theirs.items()} == expected
    build_transformer(extract_transformer(theirs))
    # there and back again is the identity
    back = {renamed(name, TRANSFORMER, to_wan=True): tuple(tensor.shape) for name, tensor in state.items()}
    assert back == published_shapes(**size)


def test_vae_and_text_encoder_names_there_and_back():
    with torch.device("meta"):
        vae = AutoencoderKLWan().state_dict()
        text = UMT5EncoderModel(UMT5Config(vocab_size=99, num_layers=24)).state_dict()
    wan = in_wan_names(vae, vae_rules())
    assert len(wan) == len(vae) == 194
    assert {name: tuple(wan[name].shape) for name in wan} == {
        name: tuple(vae[renamed(name, vae_rules())].shape) for name in wan
    }
    # published landmarks
    assert tuple(wan["decoder.upsamples.7.time_conv.weight"].shape) == (768, 384, 3, 1, 1)
    assert tuple(wan["decoder.upsamples.4.shortcut.weight"].shape) == (384, 192, 1, 1, 1)
    assert tuple(wan["decoder.upsamples.11.resample.1.weight"].shape) == (96, 192, 3, 3)
    assert tuple(wan["decoder.head.2.weight"].shape) == (3, 96, 3, 3, 3)
    assert vae_state(wan).keys() == vae.keys()
    assert infer_vae_config(vae_state(wan)) == {
        "base_dim": 96,
        "z_dim": 16,
        "dim_mult": [1, 2, 4, 4],
        "num_res_blocks": 2,
        "temperal_downsample": [False, True, True],
    }
    del text["encoder.embed_tokens.weight"]
    wan = in_wan_names(text, TEXT_ENCODER)
    assert len(wan) == len(text) == 24 * 10 + 2
    assert "blocks.23.pos_embedding.embedding.weight" in wan and "blocks.0.ffn.gate.0.weight" in wan
    assert to_diffusers(wan, TEXT_ENCODER).keys() == text.keys()


def test_umt5_xxl_is_recognised():
    config = infer_text_config(
        {
            "shared.weight": torch.empty(256384, 4096, device="meta"),
            "encoder.block.0.layer.0.SelfAttention.q.weight": torch.empty(4096, 4096, device="meta"),
            "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": torch.empty(32, 64),
            "encoder.block.0.layer.1.DenseReluDense.wi_0.weight": torch.empty(10240, 4096, device="meta"),
            "encoder.block.23.layer.0.layer_norm.weight": torch.empty(4096),
        }
    )
    assert (config.num_heads, config.d_kv, config.d_ff, config.num_layers) == (64, 64, 10240, 24)
    assert config.is_gated_act and config.dense_act_fn == "gelu_new"


# --- forms of transformer checkpoints ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights():
    return tiny.transformer(1).state_dict()


@pytest.fixture(scope="module")
def averaged():
    return tiny.transformer(2).state_dict()


def prefixed(state, prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in in_wan_names(state).items()}


def test_self_forcing_prefers_the_averaged_weights(tmp_path, weights, averaged):
    file = tmp_path / "self_forcing_dmd.pt"
    content = {"generator": prefixed(weights, "model."), "generator_ema": fsdp(averaged), "step": 600}
    torch.save(content | {"critic": {"model.x": torch.zeros(1)}}, file)
    assert same(load_transformer(file, HEAD), averaged)
    assert same(load_transformer(file, HEAD, which="ema"), averaged)
    assert same(load_transformer(file, HEAD, which="raw"), weights)


@pytest.mark.parametrize(
    "prefix", ["model.", "", "module.model.", "_orig_mod.", "model._checkpoint_wrapped_module."]
)
def test_flat_and_wrapped_forms(tmp_path, weights, prefix):
    for file in (tmp_path / "flat.safetensors", tmp_path / "nested.pt", tmp_path / "old.pth"):
        state = prefixed(weights, prefix)
        if file.suffix == ".safetensors":
            save_file(state, file)
        elif file.suffix == ".pt":
            torch.save({"model": state}, file)
        else:
            torch.save({"generator": state}, file, _use_new_zipfile_serialization=False)
        assert same(load_transformer(file, HEAD), weights)


def test_wan_folder_with_shards_and_its_own_config(tmp_path, weights):
    names = list(in_wan_names(weights).items())
    shards = {"a.safetensors": dict(names[:20]), "b.safetensors": dict(names[20:])}
    for file, state in shards.items():
        save_file(state, tmp_path / file)
    index = {"weight_map": {name: file for file, state in shards.items() for name in state}}
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    config = {"_class_name": "WanModel", "dim": 24, "num_heads": 2, "text_len": 8, "eps": 1e-5}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = load_transformer(tmp_path)
    assert same(model, weights)
    assert model.config.attention_head_dim == 12 and model.config.eps == 1e-5 and model.config.text_len == 8
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(UserError, match=r"shards that are not there \(b.safetensors\)"):
        load_transformer(tmp_path)


def test_diffusers_folder_and_pipeline_folder(tmp_path):
    tiny.pipeline().save_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "transformer"):
        model = load_transformer(path)
        assert same(model, tiny.pipeline().transformer.state_dict())
        assert model.config.text_len == tiny.TEXT_LENGTH


def test_dtype_and_memory(tmp_path, weights):
    """Weights become the parameters themselves; nothing stays on the meta device."""
    save_file(in_wan_names(weights), tmp_path / "w.safetensors")
    model = load_transformer(tmp_path / "w.safetensors", HEAD, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    state = extract_transformer(load_file(tmp_path / "w.safetensors"))
    built = build_transformer(state, HEAD)
    assert built.proj_out.weight.data_ptr() == state["proj_out.weight"].data_ptr()
    assert not built.training or not any(p.is_meta for p in built.parameters())


# --- LoRA -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def longlive(tmp_path, weights):
    """LongLive v1: a base and a LoRA of rank 4 in PEFT's names."""
    base, lora = tmp_path / "longlive_base.pt", tmp_path / "lora.pt"
    torch.save({"generator": prefixed(weights, "model.")}, base)
    pairs = {}
    for index, name in enumerate(name for name, t in in_wan_names(weights).items() if t.ndim == 2):
        if name.startswith("blocks."):
            out, into = in_wan_names(weights)[name].shape
            module = "base_model.model." + name.removesuffix(".weight")
            pairs[f"{module}.lora_A.weight"] = tiny.normal(index, 4, into) / into**0.5
            pairs[f"{module}.lora_B.weight"] = tiny.normal(index + 500, out, 4) * 0.3
    torch.save({"generator_lora": pairs, "critic_lora": {}, "step": 1}, lora)
    return base, lora


def prediction(model: CausalWanTransformer3DModel) -> torch.Tensor:
    with torch.no_grad():
        return model(tiny.clip(1, 3), torch.tensor([700.0]), tiny.text(2, 1)).sample


def test_lora_merged_equals_unmerged(longlive):
    base, lora = longlive
    plain = prediction(load_transformer(base, HEAD))
    kept = load_transformer(base, HEAD, lora=lora)
    merged = load_transformer(base, HEAD, lora=lora, merge=True)
    assert kept.peft_config["default"].r == kept.peft_config["default"].lora_alpha == 4
    assert isinstance(merged.blocks[0].attn1.to_q, torch.nn.Linear)
    torch.testing.assert_close(prediction(merged), prediction(kept), atol=1e-4, rtol=1e-4)
    assert (prediction(kept) - plain).abs().max() > 0.1
    kept.disable_adapters()
    assert torch.equal(prediction(kept), plain)


def test_lora_of_another_model_is_refused(tmp_path, longlive, weights):
    base, lora = longlive
    pairs = torch.load(lora)["generator_lora"]
    cases = {
        "foreign": (
            {k.replace("blocks.1", "blocks.7"): v for k, v in pairs.items()},
            r"does not fit .*blocks\.7",
        ),
        "wide": ({k: v.repeat(1, 2) if "lora_A" in k else v for k, v in pairs.items()}, "instead of 24x24"),
        "half": ({k: v for k, v in pairs.items() if "lora_A" in k}, "no complete LoRA"),
        "full": (in_wan_names(weights), "is not a LoRA of linear layers"),
    }
    for name, (content, message) in cases.items():
        torch.save({"generator_lora": content}, tmp_path / f"{name}.pt")
        with pytest.raises(UserError, match=message):
            load_transformer(base, HEAD, lora=tmp_path / f"{name}.pt")
    with pytest.raises(UserError, match="is a LoRA: give the checkpoint of its base"):
        load_transformer(lora, HEAD)


# --- what is refused --------------------------------------------------------------------------------------------------


class Surprise:
    def __reduce__(self):
        return (print, ("code ran",))


def test_damaged_files_are_one_sentence(tmp_path, weights, capsys):
    whole, pickled = tmp_path / "whole.safetensors", tmp_path / "whole.pt"
    save_file(in_wan_names(weights), whole)
    torch.save(in_wan_names(weights), pickled)
    (tmp_path / "cut.safetensors").write_bytes(whole.read_bytes()[:-100])
    (tmp_path / "cut.pt").write_bytes(pickled.read_bytes()[:-100])
    (tmp_path / "text.safetensors").write_text("<html>404</html>")
    (tmp_path / "text.pt").write_text("<html>404</html>")
    (tmp_path / "empty.safetensors").write_bytes(b"")
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "evil.pt").write_bytes(pickle.dumps({"generator": Surprise()}, protocol=2))
    torch.save({"generator": Surprise()}, tmp_path / "evil_zip.pt")
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    messages = {
        "absent.pt": "does not exist",
        "cut.safetensors": "truncated or not a safetensors file",
        "cut.pt": "truncated or not a checkpoint",
        "text.safetensors": "truncated or not a safetensors file",
        "text.pt": "not a checkpoint",
        "empty.safetensors": "truncated or not a safetensors file",
        "empty.pt": "not a checkpoint",
        "evil.pt": "might run code",
        "evil_zip.pt": "might run code",
        "list.pt": "holds a list",
    }
    for name, message in messages.items():
        with pytest.raises(UserError, match=message) as raised:
            load_transformer(tmp_path / name, HEAD)
        assert str(tmp_path / name) in str(raised.value) and "\n" not in str(raised.value)
    assert "code ran" not in capsys.readouterr().out
    with pytest.raises(UserError, match="should hold one checkpoint but has"):
        load_transformer(tmp_path, HEAD)


def test_other_models_are_told_apart(tmp_path, weights):
    def refusal(state, load=lambda file: load_transformer(file, HEAD)) -> str:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "x.safetensors")
        with pytest.raises(UserError) as raised:
            load(tmp_path / "x.safetensors")
        return str(raised.value)

    wan = in_wan_names(weights)
    image = wan | {
        f"blocks.{i}.cross_attn.{part}": torch.zeros(24, 24)
        for i in range(2)
        for part in ("k_img.weight", "v_img.weight")
    }
    assert "looks like an image-to-video Wan transformer" in refusal(image)
    assert "4 tensors unexpected (blocks.0.attn2.add_k_proj.weight" in refusal(image)
    assert "looks like the Wan2.1 VAE" in refusal(tiny.vae().state_dict())
    assert "looks like the Wan2.2 VAE" in refusal(
        {"encoder.downsamples.0.downsamples.0.x": torch.zeros(1)}, load_vae
    )
    assert "looks like something unknown (first names: a)" in refusal({"a": torch.zeros(1)})
    assert "looks like a Wan text-to-video transformer" in refusal(wan, load_vae)
    assert "looks like a Wan text-to-video transformer" in refusal(wan, load_text_encoder)
    text = tiny.text_encoder().state_dict()
    del text["encoder.embed_tokens.weight"]
    assert "looks like a umt5 text encoder" in refusal(text)
    few = {name: tensor for name, tensor in wan.items() if "blocks.1.ffn" not in name}
    assert "4 tensors missing (blocks.1.ffn.net.0.proj.weight, " in refusal(few)
    wide = wan | {"blocks.1.ffn.2.bias": torch.zeros(25)}
    assert "1 tensors of another shape (blocks.1.ffn.net.2.bias is 25 instead of 24)" in refusal(wide)
    assert looks_like([]) == "an empty file"


def test_what_the_shapes_do_not_tell(tmp_path, weights):
    save_file(in_wan_names(weights), tmp_path / "w.safetensors")
    with pytest.raises(UserError, match="width of 24, which heads of 128 do not divide"):
        load_transformer(tmp_path / "w.safetensors")
    with pytest.raises(UserError, match="no averaged weights"):
        load_transformer(tmp_path / "w.safetensors", HEAD, which="ema")
    with pytest.raises(UserError, match="which = 'best' is not known"):
        load_transformer(tmp_path / "w.safetensors", HEAD, which="best")
    torch.save({"critic": in_wan_names(weights)}, tmp_path / "critic.pt")
    with pytest.raises(UserError, match="holds critic and no generator or model"):
        load_transformer(tmp_path / "critic.pt", HEAD)


# --- the other parts, and whole pipelines -----------------------------------------------------------------------------


def wan_vae() -> AutoencoderKLWan:
    torch.manual_seed(3)
    return AutoencoderKLWan(base_dim=4).eval()


def test_vae_and_text_encoder_files(tmp_path):
    for number, original in enumerate((wan_vae(), tiny.vae())):  # two and one residual blocks per level
        rules = vae_rules(original.config.num_res_blocks)
        torch.save(in_wan_names(original.state_dict(), rules), tmp_path / "Wan2.1_VAE.pth")
        original.save_pretrained(tmp_path / f"vae{number}")
        for path in (tmp_path / "Wan2.1_VAE.pth", tmp_path / f"vae{number}"):
            loaded = load_vae(path)
            assert same(loaded, original.state_dict())
            assert loaded.config.latents_mean == original.config.latents_mean
    original = tiny.text_encoder()
    state = original.state_dict()
    del state["encoder.embed_tokens.weight"]
    torch.save(in_wan_names(state, TEXT_ENCODER), tmp_path / "models_t5.pth")
    original.save_pretrained(tmp_path / "text_encoder")
    ids = torch.tensor([[3, 4, 5, 0]])
    for path in (tmp_path / "models_t5.pth", tmp_path / "text_encoder"):
        loaded = load_text_encoder(path)
        assert loaded.shared.weight is loaded.encoder.embed_tokens.weight
        with torch.no_grad():
            assert torch.equal(loaded(ids).last_hidden_state, original(ids).last_hidden_state)


@pytest.fixture
def release(tmp_path, weights) -> dict[str, Path]:
    """A release as it is downloaded: one file per part."""
    text = tiny.text_encoder().state_dict()
    del text["encoder.embed_tokens.weight"]
    torch.save({"generator_ema": fsdp(weights)}, tmp_path / "model.pt")
    torch.save(in_wan_names(wan_vae().state_dict(), vae_rules()), tmp_path / "Wan2.1_VAE.pth")
    torch.save(in_wan_names(text, TEXT_ENCODER), tmp_path / "t5.pth")
    tiny.tokenizer().save_pretrained(tmp_path / "umt5-xxl")
    return {
        "transformer": tmp_path / "model.pt",
        "vae": tmp_path / "Wan2.1_VAE.pth",
        "text_encoder": tmp_path / "t5.pth",
        "tokenizer": tmp_path / "umt5-xxl",
    }


SETTINGS = {"method": "self_forcing", "head_dim": 12, "steps": (1000, 600), "shift": 4.0, "fps": 8}
SETTINGS |= {"height": 32, "width": 48}


def frames(pipe) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # text_len is the real model's: longer than the tiny prompts need
        return np.concatenate([chunk.videos for chunk in pipe.stream("a red fox", seed=5, blocks=2)], axis=1)


def test_converted_release_plays_like_the_files_themselves(tmp_path, release):
    folder = convert(tmp_path / "pipeline", **release, **SETTINGS)
    pipe = StreamVidPipeline.from_pretrained(folder)
    assert (pipe.config.method, pipe.config.fps, pipe.config.height, pipe.config.width) == (
        "self_forcing",
        8,
        32,
        48,
    )
    assert pipe.scheduler.config.shift == 4.0 and pipe.scheduler.steps == pipe.scheduler.warped([1000, 600])
    direct = StreamVidPipeline(
        tiny.tokenizer(),
        load_text_encoder(release["text_encoder"]),
        load_transformer(release["transformer"], {"attention_head_dim": 12}),
        load_vae(release["vae"]),
        pipe.scheduler,
        "self_forcing",
        8,
        32,
        48,
    )
    assert np.array_equal(frames(pipe), frames(direct))
    assert pipe.stream("a red fox").method.name == "self_forcing"
    # a folder serves as base of another, and is not overwritten
    with pytest.raises(UserError, match="exists already"):
        convert(folder, **release, **SETTINGS)
    again = convert(tmp_path / "again", transformer=folder, base=folder, **SETTINGS)
    assert np.array_equal(frames(StreamVidPipeline.from_pretrained(again)), frames(direct))


def test_converted_lora_is_merged(tmp_path, release, longlive):
    base, lora = longlive
    parts = release | {"transformer": base}
    pipe = StreamVidPipeline.from_pretrained(convert(tmp_path / "lora", **parts, **SETTINGS, lora=lora))
    merged = load_transformer(base, HEAD, lora=lora, merge=True)
    assert same(pipe.transformer, merged.state_dict())
    half = convert(tmp_path / "half", **parts, **SETTINGS, lora=lora, dtype="bfloat16")
    stored = load_file(half / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}


def test_conversion_refuses_before_it_writes(tmp_path, release):
    wide = UMT5EncoderModel(UMT5Config(vocab_size=19, d_model=32, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    wide.save_pretrained(tmp_path / "wide")
    tiny_vae = AutoencoderKLWan(base_dim=4, z_dim=8)
    tiny_vae.save_pretrained(tmp_path / "vae8")
    (tmp_path / "file").write_text("")
    cases = [
        ({"vae": None}, "vae of the pipeline not given: pass vae, or base"),
        ({"vae": None, "tokenizer": None}, "vae, tokenizer of the pipeline not given"),
        ({"base": tmp_path}, "is no pipeline folder"),
        ({"method": "selfforcing"}, "did you mean self_forcing"),
        ({"dtype": "int8"}, "dtype = 'int8' is not known"),
        ({"steps": (250, 1000)}, "must be descending"),
        ({"height": 30}, "height = 30 must be a positive multiple of 16"),
        ({"fps": 0}, "fps = 0 must be positive"),
        ({"shift": -1}, "shift = -1 must be positive"),
        ({"text_encoder": tmp_path / "wide"}, "text_encoder has a width of 32, the transformer expects 16"),
        ({"vae": tmp_path / "vae8"}, "vae has 8 latent channels, the transformer 16"),
        ({"tokenizer": tmp_path / "wide"}, "does not load as a tokenizer"),
        ({"tokenizer": tmp_path / "nowhere"}, "is no folder"),
        ({"vae": release["transformer"]}, "looks like"),
        ({"output": tmp_path / "file"}, "exists already"),
        ({"output": tmp_path / "file" / "below"}, "cannot be written"),
    ]
    for changes, message in cases:
        arguments = {"output": tmp_path / "out", **release, **SETTINGS, **changes}
        with pytest.raises(UserError, match=message):
            convert(arguments.pop("output"), **arguments)
    assert not (tmp_path / "out").exists()
