"""Training of the tiny decoder: the VAE stays, the loss falls, what is exported loads."""

import pytest
import tiny
import torch

from streamvid.tiny_decoder import load_tiny_decoder
from streamvid.training.run import build_stage, load_config
from streamvid.training.tiny_decoder_stage import TinyDecoderStage


@pytest.fixture
def stage(tmp_path):
    vae = tiny.vae(residual=True)
    vae.register_to_config(latents_mean=[0.0] * 16, latents_std=[1.0] * 16)
    vae.save_pretrained(tmp_path / "vae")
    return TinyDecoderStage(str(tmp_path / "vae"), (8, 8, 8, 8), (1, 1, 1), frames=9, crop=32, batch_size=1)


def test_only_the_decoder_learns_and_the_loss_falls(stage):
    before = {name: t.clone() for name, t in stage.vae.state_dict().items()}
    batch = stage.batch(0, 0, 0)
    optimizer = torch.optim.AdamW([p for p in stage.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(12):
        torch.manual_seed(0)
        loss, metrics = stage(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert set(metrics) == {"psnr", "latent_square"}
    assert all(torch.equal(t, before[name]) for name, t in stage.vae.state_dict().items())
    assert {id(p) for p in stage.parameters() if p.requires_grad} == {
        id(p) for p in stage.trainable().parameters()
    }


def test_what_is_exported_loads(stage, tmp_path):
    stage.export(tmp_path / "out")
    loaded = load_tiny_decoder(tmp_path / "out")
    assert all(torch.equal(t, stage.tiny.state_dict()[name]) for name, t in loaded.state_dict().items())
    assert loaded.config.patch_size == 2


def test_the_shipped_configuration_builds():
    stage = build_stage(load_config("configs/train/diorama_tiny_decoder.yaml"))
    assert stage.tiny.config.widths == (64, 48, 32, 32)
