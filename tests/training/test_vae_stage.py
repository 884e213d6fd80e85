"""Training of the autoencoder: losses, options, and what is exported."""

import copy
import math

import numpy as np
import pytest
import tiny
import torch
from diffusers import AutoencoderKLWan

from streamvid.decoding import channels_last, decode, decoder_state, encode, encode_moments, encoder_state
from streamvid.training import vae_stage
from streamvid.training.vae_stage import VaeStage, measure_latents, psnr, reconstruction_quality, to_pixels
from streamvid.world.render import render_clip
from streamvid.world.sampling import sample_clip

VAE = {
    "base_dim": 4,
    "z_dim": 4,
    "dim_mult": [1, 2, 2],
    "num_res_blocks": 1,
    "temperal_downsample": [True, True],
    "patch_size": 2,
    "in_channels": 12,
    "out_channels": 12,
    "is_residual": True,
}


def stage(**options) -> VaeStage:
    torch.manual_seed(0)
    return VaeStage(**{"vae": VAE, "frames": 5, "crop": 32, **options})


def loss(made: VaeStage, batch) -> float:
    torch.manual_seed(1)
    with torch.no_grad():
        return made(batch)[0].item()


def test_it_learns_a_clip():
    made = stage(size_weight=0.0)
    batch = made.batch(0, 0, 0)
    optimizer = torch.optim.AdamW(made.trainable().parameters(), lr=5e-3)
    first = loss(made, batch)
    for _ in range(20):
        made(batch)[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss(made, batch) < 0.7 * first
    assert made(batch)[1]["psnr"] > 10


def test_a_batch_is_a_pure_function_of_seed_step_and_process():
    made = stage(batch_size=2)
    one = made.batch(3, 4, 1)["pixels"]
    assert one.shape == (2, 3, 5, 32, 32) and one.abs().max() <= 1
    assert torch.equal(one, stage(batch_size=2).batch(3, 4, 1)["pixels"])
    for other in ((2, 4, 1), (3, 5, 1), (3, 4, 0)):
        assert not torch.equal(one, made.batch(*other)["pixels"])


def test_a_crop_is_cut_from_a_render(monkeypatch):
    monkeypatch.setattr(vae_stage, "sample_clip", lambda rng, frames: (None, None))
    picture = np.arange(128 * 128 * 3, dtype=np.uint32).reshape(1, 128, 128, 3).repeat(5, 0) % 251
    monkeypatch.setattr(vae_stage, "render_clip", lambda shots, scenery, frames: picture.astype(np.uint8))
    made, seen = stage(crop=96), set()
    for step in range(40):
        pixels = made.batch(0, step, 0)["pixels"][0, :, 0]
        corner = [
            (top, left)
            for top in range(0, 33, 8)
            for left in range(0, 33, 8)
            if torch.equal(pixels, to_pixels(picture.astype(np.uint8))[:, 0, top:, left:][:, :96, :96])
        ]
        seen.update(corner)
        assert len(corner) == 1
    assert {top for top, _ in seen} == {left for _, left in seen} == {0, 8, 16, 24, 32}  # every place


def test_options_have_an_effect():
    assert stage(frames=9, crop=16).batch(0, 0, 0)["pixels"].shape == (1, 3, 9, 16, 16)
    batch, plain = stage().batch(0, 0, 0), loss(stage(), stage().batch(0, 0, 0))
    assert loss(stage(latent_noise=1.0), batch) != plain
    noise_free = [loss(stage(latent_noise=0.0, size_weight=weight), batch) for weight in (0.0, 2.0)]
    size = stage()(batch)[1]["latent_square"].item()
    assert noise_free[1] - noise_free[0] == pytest.approx(2 * size, rel=1e-3)
    assert stage(vae={**VAE, "base_dim": 8}).vae.config.base_dim == 8


def test_a_frozen_encoder_stays_what_it_is(tmp_path):
    made = stage()
    made.vae.register_to_config(latents_mean=[1.0, 2.0, 3.0, 4.0], latents_std=[0.5] * 4)
    made.vae.save_pretrained(tmp_path / "first")
    made = stage(start_from=str(tmp_path / "first"), freeze_encoder=True)
    before = {name: value.clone() for name, value in made.vae.state_dict().items()}
    moving = [parameter for parameter in made.vae.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(moving, lr=0.1)
    made(made.batch(0, 0, 0))[0].backward()
    optimizer.step()
    for name, value in made.vae.state_dict().items():
        frozen = name.startswith(("encoder.", "quant_conv."))
        assert torch.equal(value, before[name]) or not frozen, name
        assert made.vae.get_parameter(name).requires_grad != frozen
    assert any(not torch.equal(v, before[n]) for n, v in made.vae.state_dict().items())
    made.export(tmp_path / "second")  # latents that are cached already stay valid
    exported = AutoencoderKLWan.from_pretrained(tmp_path / "second")
    assert exported.config.latents_mean == [1.0, 2.0, 3.0, 4.0]


def test_recorded_statistics_do_not_change_the_loss():
    """Latents are normalised for `decode`, which undoes it."""
    made = stage(latent_noise=0.0)
    batch = made.batch(0, 0, 0)
    plain = loss(made, batch)
    made.vae.register_to_config(latents_mean=[1.0, 2.0, 3.0, 4.0], latents_std=[0.5, 1.0, 2.0, 3.0])
    assert loss(made, batch) == pytest.approx(plain, rel=1e-4)


FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def laid_out(vae: AutoencoderKLWan) -> bool:
    """Whether all convolutions are channels-last."""
    kernels = [parameter for parameter in vae.parameters() if parameter.ndim in FORMATS]
    return all(kernel.is_contiguous(memory_format=FORMATS[kernel.ndim]) for kernel in kernels)


def contiguous(vae: AutoencoderKLWan) -> AutoencoderKLWan:
    vae = copy.deepcopy(vae)
    for parameter in vae.parameters():
        parameter.data = parameter.data.contiguous()
    return vae


@pytest.mark.parametrize("residual", [False, True], ids=["wan 2.1", "wan 2.2"])
def test_channels_last_is_the_same_function(residual):
    plain = tiny.vae(residual=residual).requires_grad_(False)
    last = channels_last(copy.deepcopy(plain))
    assert laid_out(last) and not laid_out(plain)
    for name, value in plain.state_dict().items():
        assert torch.equal(last.state_dict()[name], value)
    latents, pixels = tiny.clip(0, 3), tiny.normal(1, 1, 3, 9, 32, 32).clamp(-1, 1)
    decoded = [decode(vae, latents, decoder_state(vae), clamp=False) for vae in (plain, last)]
    encoded = [encode(vae, pixels, encoder_state(vae)) for vae in (plain, last)]
    for one, other in (decoded, encoded):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
        assert one.std() > 1e-2


def test_a_stage_trains_channels_last_and_learns_the_same():
    made = stage(latent_noise=0.0)
    assert laid_out(made.vae)
    other = stage(latent_noise=0.0)
    other.vae = contiguous(other.vae)
    assert not laid_out(other.vae)
    batch = made.batch(0, 0, 0)
    losses = [one(batch)[0] for one in (made, other)]
    torch.testing.assert_close(*losses)
    for one in losses:
        one.backward()
    theirs = dict(other.vae.named_parameters())
    for name, parameter in made.vae.named_parameters():
        gradient = theirs[name].grad
        assert (parameter.grad - gradient).norm() <= 1e-3 * gradient.norm(), name
    assert made.vae.decoder.conv_in.weight.grad.norm() > 1e-3


def test_a_stage_goes_on_from_a_saved_vae(tmp_path):
    saved = stage().vae
    saved.save_pretrained(tmp_path)
    torch.manual_seed(9)
    resumed = VaeStage(start_from=str(tmp_path)).vae
    assert laid_out(resumed)
    for name, value in saved.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name])


def test_residual_branches_start_at_zero():
    for name, parameter in stage().vae.named_parameters():
        is_last = name.endswith(("conv2.weight", "conv2.bias", "proj.weight", "proj.bias"))
        assert (parameter == 0).all() == is_last or name.endswith("bias") or (parameter == 1).all(), name


def test_exported_statistics_make_latents_standard(tmp_path, monkeypatch):
    real = measure_latents
    monkeypatch.setattr(vae_stage, "measure_latents", lambda vae: real(vae, clips=3, frames=5))
    made = stage()
    made.export(tmp_path)
    vae = AutoencoderKLWan.from_pretrained(tmp_path)
    rng, latents, moments = np.random.default_rng(1), [], []
    for _ in range(3):  # the clips that were measured
        shots, scenery = sample_clip(rng, 5)
        pixels = to_pixels(render_clip(shots, scenery, 5))[None]
        with torch.no_grad():
            latents.append(encode(vae, pixels, encoder_state(vae), None))
            moments.append(encode_moments(vae, pixels, encoder_state(vae), None)[:, :4])
    flat = torch.cat(moments).transpose(0, 1).flatten(1)
    assert vae.config.latents_mean == pytest.approx(flat.mean(1).tolist(), abs=1e-4)
    assert vae.config.latents_std == pytest.approx(flat.std(1).tolist(), abs=1e-4)
    stack = torch.cat(latents).transpose(0, 1).flatten(1)
    torch.testing.assert_close(stack.mean(1), torch.zeros(4), atol=0.01, rtol=0)
    torch.testing.assert_close(stack.std(1), torch.ones(4), atol=0.01, rtol=0)


def test_pixels_and_psnr_have_a_closed_form():
    frames = np.array([0, 51, 255], np.uint8).reshape(1, 1, 1, 3)
    torch.testing.assert_close(to_pixels(frames).flatten(), torch.tensor([-1.0, -0.6, 1.0]))
    assert to_pixels(np.zeros((2, 4, 6, 3), np.uint8)).shape == (3, 2, 4, 6)
    assert psnr(torch.tensor(4.0)) == 0  # black against white
    assert psnr(torch.tensor((2 / 255) ** 2)).item() == pytest.approx(20 * math.log10(255), rel=1e-5)


def test_quality_is_the_mean_over_clips_and_frames(monkeypatch, tmp_path):
    """A codec that adds 0.2 to the first four frames and 0.02 to all others."""
    seen = []

    def encode_(vae, pixels, state, frames_per_call):
        seen.append(pixels)
        return pixels

    def decode_(vae, pixels, state, frames_per_call):
        error = torch.full_like(pixels, 0.02)
        error[:, :, :4] = 0.2
        return pixels + error

    monkeypatch.setattr(vae_stage, "encode", encode_)
    monkeypatch.setattr(vae_stage, "decode", decode_)
    numbers = reconstruction_quality(stage().vae, clips=2, frames=16, picture=tmp_path / "a.png")
    assert numbers["psnr_first"] == pytest.approx(20.0, abs=0.01)  # 10 log10(4 / 0.04)
    assert numbers["psnr_last"] == pytest.approx(40.0, abs=0.01)
    assert numbers["psnr"] == pytest.approx((4 * 20 + 12 * 40) / 16, abs=0.01)
    assert len(seen) == 2 and (tmp_path / "a.png").is_file()
    again = reconstruction_quality(stage().vae, clips=2, frames=16)
    assert again == numbers and torch.equal(seen[0], seen[2])  # the same clips every time
