"""Every published student: a tiny checkpoint in its form is converted, and its settings travel with it."""

import json
import re
from pathlib import Path

import pytest
import tiny
import torch
from diffusers import AutoencoderKLWan
from published import fsdp, in_wan_names
from safetensors.torch import save_file
from streamvid.pipelines.pipeline_streamvid import StreamVidPipeline

from streamvid import checkpoint_vae22
from streamvid.checkpoints import infer_vae_config, load_transformer, load_vae, vae_state
from streamvid.cli import main
from streamvid.convert import convert
from streamvid.errors import UserError
from streamvid.methods import load_method, method_names
from streamvid.releases import RELEASES

DOCUMENT = Path(__file__).parents[1] / "docs" / "checkpoints.md"
HEAD = {"attention_head_dim": 12}


def vae22() -> AutoencoderKLWan:
    """The residual VAE of Wan2.2 with all of its levels, narrow."""
    torch.manual_seed(4)
    config = {"base_dim": 4, "decoder_base_dim": 8, "z_dim": 48, "is_residual": True, "patch_size": 2}
    config |= {"in_channels": 12, "out_channels": 12, "scale_factor_spatial": 16}
    numbers = {
        name: [float(v) for v in text.split()]
        for name, text in (
            ("latents_mean", checkpoint_vae22.MEAN),
            ("latents_std", checkpoint_vae22.DEVIATION),
        )
    }
    return AutoencoderKLWan(**config, **numbers).eval()


def checkpoint(name: str, folder: Path) -> Path:
    """Random weights in the form that the release has."""
    channels = {"in_channels": 48, "out_channels": 48} if name == "longlive2" else {}
    raw, averaged = (tiny.transformer(seed, **channels).state_dict() for seed in (1, 2))
    if name == "krea":
        save_file(
            {f"model.{key}": t for key, t in in_wan_names(averaged).items()}, folder / "krea.safetensors"
        )
        return folder / "krea.safetensors"
    forms = {
        "self_forcing": {"generator": fsdp(raw), "generator_ema": fsdp(averaged)},
        "rolling_forcing": {"generator": fsdp(raw), "generator_ema": fsdp(averaged)},
        "reward_forcing": {f"model.{key}": t for key, t in in_wan_names(averaged).items()},
    }
    content = forms.get(name, {"generator": {f"model.{k}": t for k, t in in_wan_names(averaged).items()}})
    torch.save(content, folder / "model.pt")
    return folder / "model.pt"


@pytest.fixture
def parts(tmp_path):
    tiny.text_encoder().save_pretrained(tmp_path / "text_encoder")
    tiny.tokenizer().save_pretrained(tmp_path / "tokenizer")
    torch.manual_seed(3)
    AutoencoderKLWan(base_dim=4).save_pretrained(tmp_path / "vae")
    return {name: tmp_path / name for name in ("text_encoder", "tokenizer", "vae")}


@pytest.mark.parametrize("name", RELEASES)
def test_settings_travel_with_the_weights(name, tmp_path, parts):
    release = RELEASES[name]
    if name == "longlive2":
        rules = checkpoint_vae22.rules()
        torch.save(in_wan_names(vae22().state_dict(), rules), tmp_path / "Wan2.2_VAE.pth")
        parts["vae"] = tmp_path / "Wan2.2_VAE.pth"
    path = checkpoint(name, tmp_path)
    folder = convert(tmp_path / "out", transformer=path, release=name, head_dim=12, **parts)
    index = json.loads((folder / "model_index.json").read_text())
    assert (index["method"], index["fps"]) == (release.method, release.fps)
    assert (index["height"], index["width"]) == (release.height, release.width)
    pipe = StreamVidPipeline.from_pretrained(folder)
    assert (pipe.scheduler.config.shift, pipe.scheduler.config.warp) == (release.shift, release.warp)
    assert tuple(pipe.scheduler.config.denoising_steps) == release.steps
    stored = pipe.transformer.state_dict()
    expected = load_transformer(path, HEAD).state_dict()
    assert all(torch.equal(stored[key], expected[key]) for key in expected)
    stream = pipe.stream("a red fox", blocks=2, height=64, width=64)
    assert stream.method == load_method(release.method)
    made = [chunk.videos for chunk in stream]
    pixels = 4 * 2 * release_block(name) - 3
    assert sum(video.shape[1] for video in made) == pixels and made[0].shape[2:4] == (64, 64)
    assert made[0].std() > 0


def release_block(name: str) -> int:
    return load_method(RELEASES[name].method).frames_per_block


def test_what_is_given_counts_more_than_the_release(tmp_path, parts):
    path = checkpoint("krea", tmp_path)
    given = {"method": "longlive", "shift": 3.0, "steps": (1000, 500), "fps": 8, "height": 64, "width": 32}
    pipe = StreamVidPipeline.from_pretrained(
        convert(tmp_path / "out", transformer=path, release="krea", head_dim=12, **given, **parts)
    )
    assert (pipe.config.method, pipe.config.fps, pipe.config.height, pipe.config.width) == (
        "longlive",
        8,
        64,
        32,
    )
    assert pipe.scheduler.config.shift == 3.0 and tuple(pipe.scheduler.config.denoising_steps) == (1000, 500)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"release": "kria"},
            "release = 'kria' is not known: choose one of self_forcing, longlive, rolling_forcing",
        ),
        ({}, "method of the transformer not given: pass method, or release"),
    ],
)
def test_a_release_or_a_method_is_needed(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        convert(tmp_path / "out", transformer=tmp_path / "absent.pt", **changes)


def test_the_command_takes_a_release(tmp_path, parts, capsys):
    path = checkpoint("causvid", tmp_path)
    files = [f"--{name.replace('_', '-')}={value}" for name, value in parts.items()]
    command = ["convert", str(tmp_path / "out"), "--transformer", str(path), "--release", "causvid", *files]
    assert main([*command, "--head-dim", "12"]) == 0
    assert "wrote" in capsys.readouterr().out
    scheduler = json.loads((tmp_path / "out" / "scheduler" / "scheduler_config.json").read_text())
    assert (scheduler["shift"], scheduler["warp"], scheduler["denoising_steps"]) == (
        8.0,
        False,
        [1000, 757, 522],
    )


@pytest.mark.parametrize("mark", ["quantized_weight_values", "_extra_state"])
def test_quantised_files_of_longlive_2_are_named(tmp_path, mark):
    state = {"blocks.0.self_attn.q.weight": torch.zeros(2, 2), f"blocks.0.self_attn.q.{mark}": torch.zeros(2)}
    torch.save({"generator": state}, tmp_path / "model_te.pt")
    with pytest.raises(UserError, match="looks like a quantised LongLive 2 transformer"):
        load_transformer(tmp_path / "model_te.pt")


def test_what_is_no_tensor_is_left_out_with_a_note(tmp_path):
    """LongLive 2's plain files keep an extra state of None for every layer that could have been quantised."""
    path = checkpoint("longlive2", tmp_path)
    content = torch.load(path)
    loaded = load_transformer(path, HEAD).state_dict()
    expected = {
        name: tensor.clone() for name, tensor in loaded.items()
    }  # the file is mapped, and rewritten below
    state = content.get("generator", content)
    state |= {"model.blocks.0.self_attn.q._extra_state": None, "model.blocks.0.ffn.0._extra_state": None}
    torch.save(content, path)
    with pytest.warns(
        UserWarning, match=r"2 entries that are no tensors \(model\.blocks\.0\.self_attn\.q\._ex"
    ):
        stored = load_transformer(path, HEAD).state_dict()
    assert stored.keys() == expected.keys()
    assert all(torch.equal(stored[name], expected[name]) for name in expected)


def test_a_converted_model_played_with_another_method_is_warned_of(tmp_path, parts, recwarn):
    folder = convert(
        tmp_path / "out",
        transformer=checkpoint("longlive", tmp_path),
        release="longlive",
        head_dim=12,
        **parts,
    )
    pipe = StreamVidPipeline.from_pretrained(folder)

    def play(**options):
        recwarn.clear()
        pipe.stream("a red fox", blocks=1, height=64, width=64, **options)
        return [str(w.message) for w in recwarn if "distilled for" in str(w.message)]

    assert play() == play(method="longlive") == play(overrides={"window": 9}) == []
    (warning,) = play(method="self_forcing")
    assert warning.startswith("method = self_forcing is not longlive, which this model was distilled for")


def test_every_release_has_a_preset_and_is_in_the_document():
    text = DOCUMENT.read_text()
    for name, release in RELEASES.items():
        assert release.method in method_names()
        assert re.search(rf"`{name}`", text), name


# --- the Wan2.2 VAE ---------------------------------------------------------------------------------------------------


def test_names_of_the_vae_there_and_back_at_full_size():
    config = {"base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "is_residual": True, "patch_size": 2}
    with torch.device("meta"):
        ours = AutoencoderKLWan(**config, in_channels=12, out_channels=12).state_dict()
    wan = in_wan_names(ours, checkpoint_vae22.rules())
    assert len(wan) == len(ours) == 196
    assert {name: t.shape for name, t in vae_state(wan).items()} == {
        name: t.shape for name, t in ours.items()
    }
    # published landmarks
    assert wan["encoder.downsamples.1.downsamples.2.time_conv.weight"].shape[0] == 320
    assert tuple(wan["decoder.upsamples.0.upsamples.3.resample.1.weight"].shape) == (1024, 1024, 3, 3)
    assert tuple(wan["decoder.head.2.weight"].shape) == (12, 256, 3, 3, 3)
    found = infer_vae_config(ours)
    assert {key: found[key] for key in config} == config
    assert found["dim_mult"] == [1, 2, 4, 4] and found["temperal_downsample"] == [False, True, True]
    assert len(found["latents_mean"]) == len(found["latents_std"]) == 48
    assert (found["latents_mean"][0], found["latents_std"][-1]) == (-0.2289, 0.7744)


def test_the_vae_loads_from_its_file_and_from_a_folder(tmp_path):
    original = vae22()
    torch.save(in_wan_names(original.state_dict(), checkpoint_vae22.rules()), tmp_path / "Wan2.2_VAE.pth")
    original.save_pretrained(tmp_path / "vae")
    for path in (tmp_path / "Wan2.2_VAE.pth", tmp_path / "vae"):
        loaded = load_vae(path)
        state = loaded.state_dict()
        assert all(torch.equal(tensor, state[key]) for key, tensor in original.state_dict().items())
        for key in (
            "latents_mean",
            "latents_std",
            "temperal_downsample",
            "scale_factor_spatial",
            "is_residual",
        ):
            assert loaded.config[key] == original.config[key], key
