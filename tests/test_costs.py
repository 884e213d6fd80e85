"""What a stream costs: closed forms of published models, one block in place of all, and an effect of every option."""

from dataclasses import replace

import pytest
import tiny
import torch

from streamvid.costs import PROMPTS, Configuration, count
from streamvid.errors import UserError
from streamvid.meter import Meter, size_of
from streamvid.methods import load_method, method_names
from streamvid.models import load_pipeline
from streamvid.specs import WAN_SPECS, ModelSpec, model_spec


@pytest.fixture(scope="module")
def spec(tmp_path_factory) -> ModelSpec:
    """Of a tiny model with five layers."""
    folder = tmp_path_factory.mktemp("model")
    tiny.pipeline(num_layers=5).save_pretrained(folder)
    return model_spec(str(folder))


def configuration(spec: ModelSpec, method: str = "longlive", **changes) -> Configuration:
    given = {"height": spec.height, "width": spec.width, "dtype": torch.float32, **changes}
    return Configuration(spec, load_method(method, given.pop("options", {})), **given)


def test_wan_1_3b_with_longlive():
    """Numbers of the references: weights, caches, and 141 TFLOP per block in five forwards. (Of the last, the context pass,
    the last layer only leaves keys behind.)"""
    wan = WAN_SPECS["1.3B"]
    counts = count(configuration(wan, dtype=torch.bfloat16))
    assert counts.transformer == pytest.approx(2.84e9, rel=0.005)
    assert counts.text_encoder == pytest.approx(11.36e9, rel=0.005)
    assert counts.decoder == pytest.approx(2 * 126.89e6, rel=0.001)
    assert counts.memory == pytest.approx(1.89e9, rel=0.005)
    window = 12 * 2 * 30 * 1560 * 1536 * 2
    assert window < counts.stream < 1.002 * window  # beside it only clean latents
    assert counts.prompt == 2 * 30 * 512 * 1536 * 2
    assert counts.switch >= window
    tokens, keys, width, ffn = 4680, 18720, 1536, 8960
    layer = 2 * tokens * (6 * width**2 + 2 * width * ffn) + 4 * tokens * (keys + 512) * width
    after_keys = layer - 2 * tokens * 3 * width**2 - 4 * tokens * keys * width
    assert counts.denoise.flop == pytest.approx(5 * 30 * layer - after_keys, rel=0.002)
    assert counts.denoise.flop == pytest.approx(141e12, rel=0.005)
    assert counts.frames == 12


def test_one_block_stands_for_all(spec):
    counts = count(configuration(spec))
    pipe = spec.pipeline("meta", torch.float32, prompts=PROMPTS)
    stream = pipe.stream([PROMPTS[0]], method="longlive", decode_pixels=False)
    with torch.no_grad():
        for _ in range(5):
            next(stream)
        with Meter(host=False) as every:
            next(stream)
    assert counts.denoise.flop == every.flop
    assert counts.denoise.bytes == every.bytes
    assert counts.denoise.peak == every.peak
    assert len(pipe.transformer.blocks) == 5
    assert counts.transformer == sum(p.numel() * 4 for p in pipe.transformer.parameters())


def test_weights_and_caches_are_those_of_the_pipeline():
    pipe = load_pipeline("diorama", "cpu", "bfloat16")
    counts = count(configuration(model_spec("diorama"), dtype=torch.bfloat16))
    for part in ("transformer", "text_encoder"):
        assert getattr(counts, part) == sum(p.numel() * 2 for p in getattr(pipe, part).parameters())
    assert counts.decoder == sum(p.numel() * 2 for p in pipe.vae.parameters())
    stream = pipe.stream("a red star", method="longlive", decode_pixels=False)
    beside = (stream.cache.latents, stream.cache.sink_latents, stream.room.keys, stream.room.values)
    assert counts.stream == stream.cache.bytes + size_of(beside)


@pytest.mark.parametrize("method", method_names())
def test_every_method_can_be_counted(spec, method):
    counts = count(configuration(spec, method))
    assert counts.denoise.flop > 0 and counts.decode.flop > 0 and counts.activations > 0


OPTIONS = {
    "batch": ({"batch": 2}, ("stream", "prompt", "memory", "activations")),
    "height": ({"height": 64}, ("stream", "memory", "activations")),
    "width": ({"width": 64}, ("stream", "memory", "activations")),
    "window": ({"options": {"window": 21}}, ("stream", "switch")),
    "beside": ({"beside": True}, ("activations",)),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_that_takes_more(spec, option):
    changes, larger = OPTIONS[option]
    plain, changed = count(configuration(spec)), count(configuration(spec, **changes))
    for name in larger:
        assert getattr(changed, name) > getattr(plain, name), name
    assert changed.peak > plain.peak


def test_options_that_take_less():
    diorama = model_spec("diorama")
    plain = count(configuration(diorama, dtype=torch.float32))
    assert 2 * count(configuration(diorama, dtype=torch.bfloat16)).transformer == plain.transformer
    eight = count(configuration(diorama, weights="int8"))
    assert plain.transformer / 3 < eight.transformer < plain.transformer / 2
    assert eight.denoise.flop == plain.denoise.flop
    tiny_decoder = count(configuration(diorama, decoder="tiny"))
    assert tiny_decoder.memory < plain.memory and tiny_decoder.decode.flop < plain.decode.flop
    assert tiny_decoder.decoder > plain.decoder  # the VAE stays, for pictures to go on from
    elsewhere = count(configuration(diorama, text_encoder="cpu"))
    assert elsewhere.text_encoder == 0 and elsewhere.peak < plain.peak
    freed = count(configuration(diorama, text_encoder="free"))
    assert freed.text_encoder == 0 < freed.encoding_alone < freed.peak == sum(freed.bytes.values())


def test_beside_denoising_a_gpu_decodes_one_half_at_a_time_and_a_cpu_two():
    diorama = model_spec("diorama")
    one, gpu, cpu = (
        count(configuration(diorama, dtype=torch.bfloat16, beside=beside, on_cpu=on_cpu))
        for beside, on_cpu in ((False, False), (True, False), (True, True))
    )
    assert one.denoise.peak < one.activations
    assert gpu.denoise.peak < gpu.activations < cpu.activations


def test_a_large_text_encoder_is_the_peak_even_where_it_is_freed():
    wan = WAN_SPECS["1.3B"]
    counts = count(configuration(wan, dtype=torch.bfloat16, text_encoder="free", height=96, width=160))
    assert counts.peak == counts.encoding_alone > sum(counts.bytes.values())


def test_smaller_keys_and_values():
    wan = replace(WAN_SPECS["1.3B"], height=96, width=160)
    plain, eight = (
        count(configuration(wan, "self_forcing", options={"kv_dtype": name})).stream
        for name in ("native", "int8")
    )
    assert eight < 0.7 * plain


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"weights": "int4"}, "weights = 'int4'.*native, int8"),
        ({"decoder": "large"}, "decoder = 'large'.*exact, tiny"),
        ({"text_encoder": "gone"}, "text_encoder = 'gone'.*device, cpu, free"),
        ({"batch": 0}, "batch = 0"),
        ({"text_encoder": "cpu", "on_cpu": True}, "saves nothing on a CPU: give free"),
    ],
)
def test_what_cannot_be_is_refused(spec, changes, told):
    with pytest.raises(UserError, match=told):
        configuration(spec, **changes)


def test_a_model_without_a_tiny_decoder(spec):
    with pytest.raises(UserError, match=r"decoder = tiny does not exist for .*: give exact"):
        count(configuration(spec, decoder="tiny"))
