"""LoRA: what learns, and that the merged model, the adapter file and the model in training are one."""

import pytest
import tiny
import torch

from streamvid.checkpoints import load_transformer
from streamvid.errors import UserError
from streamvid.training.lora import add_lora, lora_targets, merged, save_lora


def trained(rank: int = 3, alpha: float = 3.0):
    model = tiny.transformer()
    add_lora(model, rank, alpha)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def output(model) -> torch.Tensor:
    with torch.no_grad():
        return model(tiny.clip(0, 3), torch.tensor([500.0]), tiny.text(1, 1)).sample


def test_ten_linear_layers_per_block_learn_and_start_at_nothing():
    model = tiny.transformer()
    before = output(model)
    assert len(lora_targets(model)) == 2 * 10
    add_lora(model, 4, 4)
    learnt = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(learnt) == 40 and all(".lora_" in name and name.startswith("blocks.") for name in learnt)
    assert torch.equal(output(model), before)


@pytest.mark.parametrize("alpha", [3.0, 6.0])
def test_merged_and_saved_are_the_model_in_training(alpha, tmp_path):
    model = trained(alpha=alpha)
    expected = output(model)
    assert not torch.allclose(expected, output(tiny.transformer()), atol=1e-2)
    torch.testing.assert_close(output(merged(model)), expected, rtol=1e-4, atol=1e-4)
    tiny.transformer().save_pretrained(tmp_path / "base")
    save_lora(model, tmp_path / "lora.safetensors")
    loaded = load_transformer(tmp_path / "base", lora=tmp_path / "lora.safetensors")
    torch.testing.assert_close(output(loaded), expected, rtol=1e-4, atol=1e-4)


def test_impossible_ranks_and_missing_peft_are_told(monkeypatch):
    with pytest.raises(UserError, match="lora_rank = -1 must be at least 1"):
        add_lora(tiny.transformer(), -1, 1)
    import sys

    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match="lora_rank needs peft"):
        add_lora(tiny.transformer(), 1, 1)
