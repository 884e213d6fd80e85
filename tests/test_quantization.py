"""Eight-bit weights by torchao: which layers change, how large they are, and that the numbers stay near."""

import pytest
import tiny
import torch

from streamvid.errors import UserError
from streamvid.models import load_pipeline
from streamvid.quantization import bytes_saved, quantise, quantised_layers

TINY = {"num_attention_heads": 2, "attention_head_dim": 16}


def prediction(model) -> torch.Tensor:
    with torch.no_grad():
        latents = tiny.clip(0, 3)
        return model(latents, torch.full((1, 3), 500.0), encoder_hidden_states=tiny.text(0, 1)).sample


@pytest.mark.parametrize("weights", ["int8", "int8_dynamic"])
def test_numbers_stay_near(weights):
    model = tiny.transformer(**TINY)
    exact = prediction(model)
    quantise(model, weights)
    error = (prediction(model) - exact).norm() / exact.norm()
    assert 1e-6 < error < 0.05


def test_only_linear_layers_of_the_blocks_change():
    model, plain = tiny.transformer(**TINY), tiny.transformer(**TINY)
    quantise(model, "int8")
    kinds = {
        name: type(module.weight)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    changed = {name for name, kind in kinds.items() if kind is not torch.nn.Parameter}
    assert changed == {name for name in kinds if name.startswith("blocks.")}
    assert len(changed) == 2 * 10 == sum(len(list(quantised_layers(block))) for block in plain.blocks)


def test_layers_whose_sides_are_no_multiple_of_16_stay():
    block = tiny.transformer().blocks[0]  # width 24
    assert not list(quantised_layers(block)) and bytes_saved(block, "int8") == 0


def test_a_byte_per_number_and_a_scale_per_output():
    block = tiny.transformer(**TINY).blocks[0].to(torch.bfloat16)
    numbers = sum(layer.weight.numel() for layer in quantised_layers(block))
    outputs = sum(layer.out_features for layer in quantised_layers(block))
    assert bytes_saved(block, "native") == 0
    assert bytes_saved(block, "fp8") == numbers - 4 * outputs


def test_a_model_is_loaded_with_them():
    plain, small = (load_pipeline("diorama", "cpu", "float32", weights=name) for name in ("native", "int8"))
    one, other = (next(pipe.stream("a red star", decode_pixels=False)).latents for pipe in (plain, small))
    assert not torch.equal(one, other)
    assert (one - other).norm() / one.norm() < 0.2


def test_unknown_formats_are_refused():
    with pytest.raises(UserError, match="weights = 'int3' is not known: choose one of native, int8"):
        quantise(tiny.transformer(), "int3")
    with pytest.raises(UserError, match="weights = 'int3'"):
        load_pipeline("diorama", weights="int3")
