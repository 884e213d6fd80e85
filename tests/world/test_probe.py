"""The attribute probe: its interface, its training loop, and the one that is shipped."""

import json
from importlib.resources import files

import numpy as np
import pytest
import torch

from streamvid.world import train_probe as training
from streamvid.world.probe import STRIDE, WINDOW_FRAMES, AttributeProbe
from streamvid.world.scene import ATTRIBUTES

SHIPPED = files("streamvid") / "embedded" / "diorama" / "probe"


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def windows():
    """Frames [128, 32, 128, 128, 3] uint8 and labels [128, attributes] that no training step drew."""
    rng = np.random.default_rng(123_456)
    pairs = [training.sample_window(rng) for _ in range(128)]
    return np.stack([frames for frames, _ in pairs]), np.array([scene.labels() for _, scene in pairs])


def test_the_shipped_probe_is_right(windows):
    frames, labels = windows
    found = AttributeProbe.load(SHIPPED / "probe.safetensors").classify(frames)
    for index, name in enumerate(ATTRIBUTES):
        assert (found[name].numpy() == labels[:, index]).mean() >= 0.98, name


def test_the_shipped_metrics_are_good():
    metrics = json.loads((SHIPPED / "metrics.json").read_text())
    assert metrics["test_windows"] >= 1024
    for part in ("accuracy_all_scenes", "accuracy_held_out_pairs"):
        assert all(metrics[part][name] >= 0.99 for name in ATTRIBUTES)


def test_bytes_and_floats_are_read_alike(windows):
    frames = torch.from_numpy(windows[0][:2])
    prepared = AttributeProbe.prepare(frames)
    assert prepared.shape == (2, WINDOW_FRAMES // STRIDE, 6, 64, 64)
    torch.testing.assert_close(prepared, AttributeProbe.prepare(frames.float() / 255))


def test_a_still_window_has_no_differences():
    prepared = AttributeProbe.prepare(torch.full((1, WINDOW_FRAMES, 128, 128, 3), 0.7))
    assert torch.count_nonzero(prepared[:, :, 3:]) == 0
    torch.testing.assert_close(prepared[:, :, :3], torch.full_like(prepared[:, :, :3], 0.4))


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match="a window is"):
        AttributeProbe.prepare(torch.zeros(1, 31, 128, 128, 3))
    with pytest.raises(ValueError, match="a window is"):
        AttributeProbe.prepare(torch.zeros(32, 128, 128, 3))


def test_classify_leaves_the_mode_alone_and_does_not_depend_on_batches(windows):
    torch.manual_seed(0)
    probe = AttributeProbe().train()
    frames = windows[0][:5]
    found = probe.classify(frames, batch=5)
    assert probe.training
    for name, indices in probe.classify(frames, batch=2).items():
        assert torch.equal(indices, found[name])


def test_save_and_load(tmp_path, windows):
    torch.manual_seed(0)
    probe = AttributeProbe(widths=(8, 8, 8, 8), spots=2, pooled=4, hidden=16).eval()
    probe.save(tmp_path / "probe.safetensors")
    loaded = AttributeProbe.load(tmp_path / "probe.safetensors")
    assert not loaded.training
    frames = windows[0][:2]
    for first, second in zip(probe.logits(frames).values(), loaded.logits(frames).values(), strict=True):
        assert torch.equal(first, second)


def test_training_can_be_interrupted(tmp_path, monkeypatch):
    """Stopped after step 2 and resumed, it ends with the weights of an uninterrupted run."""
    monkeypatch.setattr(training, "BATCH", 2)
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    training.train_probe(3, seed=1, out=whole, test_windows=2)

    monkeypatch.setattr(training, "SAVE_EVERY_SECONDS", 0.0)
    draw = training._batch

    def stop_at_step_2(seed, step, more_rolling):
        if step == 2:
            raise KeyboardInterrupt
        return draw(seed, step, more_rolling)

    monkeypatch.setattr(training, "_batch", stop_at_step_2)
    with pytest.raises(KeyboardInterrupt):
        training.train_probe(3, seed=1, out=halves, test_windows=2)
    assert (halves / "checkpoint.pt").exists() and not (halves / "probe.safetensors").exists()
    monkeypatch.setattr(training, "_batch", draw)
    training.train_probe(3, seed=1, out=halves, test_windows=2)
    assert not (halves / "checkpoint.pt").exists()
    first, second = (AttributeProbe.load(folder / "probe.safetensors") for folder in (whole, halves))
    for name, tensor in first.state_dict().items():
        torch.testing.assert_close(tensor, second.state_dict()[name], msg=name)
