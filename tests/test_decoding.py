"""Streaming VAE: the very frames of a one-shot call, whatever the chunks; state that belongs to the stream."""

from functools import cache

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streamvid.decoding import decode, decoder_state, encode, encode_moments, encoder_state, latent_statistics

FRAMES = 6
RESIDUAL = pytest.mark.parametrize("residual", [False, True], ids=["wan 2.1", "wan 2.2"])
chunkings = st.lists(st.integers(1, FRAMES), min_size=1, max_size=FRAMES)


@cache
def case(residual: bool):
    """A VAE, latents with their one-shot decoding, pixels with their one-shot encoding (as diffusers does them)."""
    vae = tiny.vae(residual=residual).requires_grad_(False)
    # not below 4 x 4: for a handful of positions CPU convolutions pick other kernels, whose last bit differs
    latents = tiny.normal(0, 2, 16, FRAMES, 4, 4)
    mean, std = latent_statistics(vae, latents)
    pixels = tiny.normal(1, 2, 3, 1 + 4 * (FRAMES - 1), 32, 32).clamp(-1, 1)
    decoded = vae.decode(latents / (1.0 / std) + mean).sample
    encoded = (vae.encode(pixels).latent_dist.mode() - mean) * (1.0 / std)
    return vae, latents, decoded, pixels, encoded


def cut(total: int, lengths: list[int]) -> list[int]:
    """The lengths, made to sum to the total."""
    pieces = []
    for length in lengths:
        pieces.append(min(length, total - sum(pieces)))
    return [piece for piece in [*pieces, total - sum(pieces)] if piece]


@RESIDUAL
@settings(max_examples=8, deadline=None)
@given(chunkings)
def test_streamed_decode_is_the_one_shot_decode(residual, lengths):
    vae, latents, decoded, _, _ = case(residual)
    state = decoder_state(vae)
    chunks = [decode(vae, piece, state) for piece in latents.split(cut(FRAMES, lengths), 2)]
    assert chunks[0].shape[2] == 1 + 4 * (cut(FRAMES, lengths)[0] - 1)
    assert torch.equal(torch.cat(chunks, 2), decoded)


@RESIDUAL
@settings(max_examples=5, deadline=None)
@given(chunkings)
def test_streamed_encode_is_the_one_shot_encode(residual, lengths):
    vae, _, _, pixels, encoded = case(residual)
    state = encoder_state(vae)
    pieces = cut(FRAMES, lengths)
    spans = [1 + 4 * (pieces[0] - 1), *(4 * piece for piece in pieces[1:])]
    chunks = [encode(vae, piece, state) for piece in pixels.split(spans, 2)]
    assert [chunk.shape[2] for chunk in chunks] == pieces
    assert torch.equal(torch.cat(chunks, 2), encoded)


@RESIDUAL
def test_all_frames_in_one_call_are_equal_up_to_rounding(residual):
    vae, latents, decoded, pixels, encoded = case(residual)
    fast = decode(vae, latents, decoder_state(vae), frames_per_call=None)
    torch.testing.assert_close(fast, decoded, atol=1e-5, rtol=0)
    fast = encode(vae, pixels, encoder_state(vae), frames_per_call=None)
    torch.testing.assert_close(fast, encoded, atol=1e-5, rtol=0)
    fast = decode(vae, latents, decoder_state(vae), frames_per_call=2)
    torch.testing.assert_close(fast, decoded, atol=1e-5, rtol=0)


def test_two_streams_never_meet():
    vae, latents, _, _, _ = case(False)
    alone = [decode(vae, video, decoder_state(vae)) for video in latents.split(1)]
    states = [decoder_state(vae), decoder_state(vae)]
    chunks: list[list[torch.Tensor]] = [[], []]
    for piece in latents.split(2, 2):
        for video in (0, 1):
            chunks[video].append(decode(vae, piece[video : video + 1], states[video]))
        vae.decode(latents[:, :, :2])  # nor does diffusers' own memory disturb them
    for video in (0, 1):
        assert torch.equal(torch.cat(chunks[video], 2), alone[video])


def test_a_fork_goes_on_by_itself():
    vae, latents, decoded, _, _ = case(False)
    state = decoder_state(vae)
    decode(vae, latents[:, :, :2], state)
    fork = state.fork()
    for _ in range(2):  # what the fork decodes does not reach its origin
        decode(vae, latents[:, :, 4:], fork)
    assert torch.equal(decode(vae, latents[:, :, 2:], state), decoded[:, :, 5:])


def test_a_failed_call_leaves_the_state_as_it_was():
    vae, latents, decoded, _, _ = case(False)
    state, calls = decoder_state(vae), []

    def fail(module, inputs):
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError

    decode(vae, latents[:, :, :2], state)
    hook = vae.decoder.up_blocks[1].register_forward_pre_hook(fail)
    with pytest.raises(MemoryError):
        decode(vae, latents[:, :, 2:], state)
    hook.remove()
    assert torch.equal(decode(vae, latents[:, :, 2:], state), decoded[:, :, 5:])


def test_clamping_can_be_left_out():
    vae, latents, decoded, _, _ = case(False)
    wide = decode(vae, 10 * latents, decoder_state(vae), clamp=False)
    assert wide.abs().max() > 1
    assert torch.equal(wide.clamp(-1, 1), decode(vae, 10 * latents, decoder_state(vae)))
    assert decoded.abs().max() <= 1


def test_moments_are_not_normalised():
    vae, _, _, pixels, _ = case(False)
    posterior = vae.encode(pixels).latent_dist
    moments = encode_moments(vae, pixels, encoder_state(vae))
    assert torch.equal(moments, posterior.parameters)


def test_frames_that_fill_no_latent_frame_are_refused():
    vae, _, _, pixels, _ = case(False)
    state = encoder_state(vae)
    with pytest.raises(
        ValueError, match="frames = 4 does not fill latent frames: give 1 plus a multiple of 4"
    ):
        encode(vae, pixels[:, :, :4], state)
    encode(vae, pixels[:, :, :5], state)
    with pytest.raises(ValueError, match="frames = 5 does not fill latent frames: give a multiple of 4"):
        encode(vae, pixels[:, :, :5], state)
