"""Wan's decoder walked by hand: the frames of diffusers' modules, for both kinds of the VAE and any chunks."""

import numpy as np
import pytest
import tiny
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import DupUp3D

from streamvid.decoding import begin_decoding, decode, decode_to_bytes, decoder_state
from streamvid.wan_decoder import _repeated, doubling_conv, first_stage, last_stage

RESIDUAL = pytest.mark.parametrize("residual", [False, True], ids=["wan 2.1", "wan 2.2"])


def walked(vae, latents, lengths):
    """What the two stages make of latents as the decoder takes them, cut into pieces."""
    features, pieces = [None] * 64, []
    for piece in latents.split(lengths, 2):
        x, used = first_stage(vae.decoder, piece, features)
        pieces.append(last_stage(vae.decoder, x, features, used))
    return torch.cat(pieces, 2)


@RESIDUAL
@pytest.mark.parametrize("lengths", [[1, 5], [1, 1, 1, 1, 1, 1], [1, 2, 3]], ids=str)
def test_it_is_the_decoder_of_diffusers(residual, lengths):
    vae, latents = tiny.vae(residual=residual), tiny.normal(0, 2, 16, 6, 4, 4)
    features, expected = [None] * 64, []
    for index, frame in enumerate(latents.split(1, 2)):
        expected.append(vae.decoder(frame, feat_cache=features, feat_idx=[0], first_chunk=index == 0))
    with torch.no_grad():
        torch.testing.assert_close(
            walked(vae, latents, lengths), torch.cat(expected, 2), atol=2e-5, rtol=1e-4
        )


@RESIDUAL
def test_half_precision_is_as_exact_as_by_the_modules(residual):
    vae, latents = tiny.vae(residual=residual), tiny.normal(0, 1, 16, 6, 4, 4)
    with torch.no_grad():
        exact = decode(vae, latents, decoder_state(vae))
        vae = vae.bfloat16()
        modules = decode(vae, latents.bfloat16(), decoder_state(vae), None).float()
    bytes_ = decode_to_bytes(vae, latents, decoder_state(vae))
    by_hand = torch.from_numpy(bytes_).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    error, bound = ((x - exact).square().mean().sqrt() for x in (by_hand, modules))
    assert error < 1.25 * bound + 0.003  # and half a level of 8-bit rounding
    assert 0 < bound < 0.1


def test_halves_of_neighbouring_chunks_may_overlap():
    vae, latents = tiny.vae(residual=True).bfloat16(), tiny.normal(0, 1, 16, 6, 4, 4)
    state = decoder_state(vae)
    expected = [decode_to_bytes(vae, piece, state) for piece in latents.split(2, 2)]
    state, rests = decoder_state(vae), []
    for piece in latents.split(2, 2):
        rests.append(begin_decoding(vae, piece, state))
    for rest, videos in zip(rests, expected, strict=True):
        assert np.array_equal(rest(), videos)


@pytest.mark.parametrize("channels", [(8, 8), (16, 8), (32, 8), (4, 8)], ids=str)
@pytest.mark.parametrize("time", [1, 2])
def test_doubling_convolution_with_a_repeated_shortcut(channels, time):
    conv, shortcut = (
        torch.nn.Conv2d(5, channels[1], 3, padding=1),
        DupUp3D(*channels, factor_t=time, factor_s=2),
    )
    before = tiny.normal(0, 2, channels[0], 3, 4, 6)
    for first, frames in ((False, 3), (True, 1)):
        copies = 1 if first else time
        x = tiny.normal(1, 2 * frames * copies, 5, 4, 6)
        doubled = torch.nn.functional.interpolate(x, scale_factor=2, mode="nearest-exact")
        expected = conv(doubled).unflatten(0, (2, -1)).transpose(1, 2)
        expected = expected + shortcut(before[:, :, :frames], first_chunk=first)
        added = _repeated(before[:, :, :frames], shortcut, first)
        with torch.no_grad():
            output = doubling_conv(conv, x, added).unflatten(0, (2, -1)).transpose(1, 2)
            torch.testing.assert_close(output, expected)
            torch.testing.assert_close(doubling_conv(conv, x), conv(doubled))
