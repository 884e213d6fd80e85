"""`streamvid info`: all that a bug report needs, and what the embedded model knows."""

from pathlib import Path

import diffusers
import pytest
import tiny
import torch
from streamvid.kernels.attention import BACKENDS

import streamvid
from streamvid import info
from streamvid.cli import main
from streamvid.errors import UserError
from streamvid.methods import method_names
from streamvid.world.prompts import VOCABULARY
from streamvid.world.scene import ATTRIBUTES


@pytest.fixture
def shipped(tmp_path, monkeypatch) -> Path:
    """A tiny model in the place of the embedded one."""
    tiny.pipeline().save_pretrained(tmp_path)
    for module in ("models", "info"):
        monkeypatch.setattr(f"streamvid.{module}.embedded_models", lambda: {"diorama": tmp_path})
    return tmp_path


def test_overview(shipped, capsys):
    assert main(["info"]) == 0
    told = capsys.readouterr().out
    for version in (streamvid.__version__, torch.__version__, diffusers.__version__):
        assert version in told
    assert "Python 3." in told and "gradio" in told
    assert "device: cpu" in told or "device: cuda" in told or "device: mps" in told
    assert f"threads: {torch.get_num_threads()}" in told
    for name in (*BACKENDS, *method_names()):
        assert name in told
    assert "model diorama: 32x32 at 16 fps, 0." in told and "method longlive" in told


def test_overview_without_a_model_and_without_a_library(monkeypatch):
    monkeypatch.setattr(info, "embedded_models", dict)
    monkeypatch.setattr(info, "LIBRARIES", ("torch", "no-such-library"))
    told = info.overview()
    assert "no-such-library not installed" in told and "model" not in told.replace("models", "")


def test_what_the_embedded_model_knows(shipped, capsys):
    assert main(["info", "diorama"]) == 0
    told = capsys.readouterr().out
    assert "diorama: 32x32 at 16 fps" in told and "window 12, sink 3, 3 frames per block" in told
    for attribute, values in ATTRIBUTES.items():
        assert f"{attribute}: {', '.join(values)}" in told
    (line,) = [line for line in told.splitlines() if line.startswith("words it knows")]
    assert str(len(VOCABULARY)) in line and set(line.split()) >= set(VOCABULARY)


def test_an_unknown_model_is_named(shipped, monkeypatch):
    with pytest.raises(UserError, match="model = 'fox' is not an embedded model: choose one of diorama"):
        info.model_details("fox")
    monkeypatch.setattr(info, "embedded_models", dict)
    with pytest.raises(UserError, match="model = 'fox' is not an embedded model: this installation has none"):
        info.model_details("fox")
