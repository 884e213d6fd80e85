"""The tiny decoder: frames of one pass whatever the chunks, TAEHV's weights by name, and its place in a stream."""

import pytest
import tiny
import torch
from safetensors.torch import save_file

from streamvid.decoding import decode, decode_to_bytes, decoder_state
from streamvid.errors import UserError
from streamvid.models import load_pipeline
from streamvid.tiny_decoder import TinyDecoder, load_tiny_decoder


def decoder(**changes) -> TinyDecoder:
    torch.manual_seed(0)
    return TinyDecoder(widths=(8, 6, 4, 4), blocks=(2, 1, 1), **changes).eval().requires_grad_(False)


@pytest.mark.parametrize("lengths", [[1, 5], [3, 3], [1, 2, 1, 2], [1] * 6], ids=str)
def test_streamed_decode_is_the_one_shot_decode(lengths):
    net, latents = decoder(), tiny.normal(0, 2, 16, 6, 4, 4)
    whole = decode(net, latents, decoder_state(net))
    assert whole.shape == (2, 3, 1 + 4 * 5, 32, 32)
    state = decoder_state(net)
    pieces = [decode(net, piece, state) for piece in latents.split(lengths, 2)]
    torch.testing.assert_close(torch.cat(pieces, 2), whole, atol=1e-6, rtol=0)


def test_a_frame_depends_on_the_past_alone():
    net, latents = decoder(), tiny.normal(0, 1, 16, 4, 4, 4)
    other = latents.clone()
    other[:, :, 2] += 1
    one, two = (decode(net, x, decoder_state(net), clamp=False) for x in (latents, other))
    assert torch.equal(one[:, :, :5], two[:, :, :5])
    assert not torch.equal(one[:, :, 9:], two[:, :, 9:])  # blocks remember the frame before


def test_patches_and_growth_are_options():
    net = decoder(patch_size=2, space=(True, True, False))
    assert decode(net, tiny.normal(0, 1, 16, 2, 4, 4), decoder_state(net)).shape == (1, 3, 5, 32, 32)


def test_weights_of_taehv_load_by_name(tmp_path):
    weights = {name: torch.full_like(t, 0.01) for name, t in TinyDecoder().state_dict().items()}
    # first convolution, a memory block with its three, growth in time, the last convolution
    shapes = {
        "decoder.1.weight": (256, 16, 3, 3),
        "decoder.3.conv.0.weight": (256, 512, 3, 3),
        "decoder.7.conv.weight": (256, 256, 1, 1),
        "decoder.8.weight": (128, 256, 3, 3),
        "decoder.13.conv.weight": (256, 128, 1, 1),
        "decoder.22.weight": (3, 64, 3, 3),
    }
    assert {name: tuple(weights[name].shape) for name in shapes} == shapes
    save_file({**weights, "encoder.0.weight": torch.zeros(1)}, tmp_path / "taew2_1.safetensors")
    torch.save(weights, tmp_path / "taew2_1.pth")
    for name in ("taew2_1.safetensors", "taew2_1.pth"):
        loaded = load_tiny_decoder(tmp_path / name)
        assert all(torch.equal(t, weights[key]) for key, t in loaded.state_dict().items())


def test_what_is_no_tiny_decoder_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"decoder = '.*none' is neither a folder of a tiny decoder nor"):
        load_tiny_decoder(tmp_path / "none")
    save_file({"decoder.1.weight": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="does not hold the decoder of taew2_1"):
        load_tiny_decoder(tmp_path / "x.safetensors")


def test_a_stream_decodes_with_it(tmp_path):
    net = decoder()
    pipe = tiny.new_pipeline()
    pipe.tiny_decoder = net
    chunks = list(pipe.stream("a red fox", blocks=2, seed=1))
    state = decoder_state(net)
    for chunk in chunks:
        assert (chunk.videos == decode_to_bytes(net, chunk.latents, state)).all()
    assert [chunk.videos.shape[1] for chunk in chunks] == [9, 12]


def test_the_embedded_model_takes_one(tmp_path):
    net = decoder(patch_size=2, space=(True, True, False))
    net.save_pretrained(tmp_path / "own")
    pipe = load_pipeline(dtype="float32", decoder=str(tmp_path / "own"))
    assert pipe.decoder is pipe.tiny_decoder
    chunk = next(pipe.stream("a red ball rolls"))
    assert (chunk.videos == decode_to_bytes(net, chunk.latents, decoder_state(net))).all()
    assert load_pipeline(dtype="float32").decoder.__class__.__name__ == "AutoencoderKLWan"
