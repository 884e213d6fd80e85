"""Trained parts put together load and play."""

import pytest
import tiny
import torch

from streamvid.cli import main
from streamvid.errors import UserError
from streamvid.models import load_pipeline
from streamvid.training.assemble import assemble


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> dict[str, str]:
    """Folders as the stages export them."""
    root = tmp_path_factory.mktemp("parts")
    tiny.vae(residual=True).save_pretrained(root / "vae")
    tiny.text_encoder().save_pretrained(root / "text" / "text_encoder")
    tiny.tokenizer().save_pretrained(root / "text" / "tokenizer")
    tiny.transformer().save_pretrained(root / "student" / "transformer")
    tiny.scheduler(shift=3.0, denoising_steps=(1000, 600)).save_pretrained(root / "student" / "scheduler")
    return {name: str(root / name) for name in ("vae", "text", "student")}


SETTINGS = {"method": "longlive_infinite", "fps": 8.0, "height": 32, "width": 48}


def test_an_assembled_model_loads_and_plays(parts, tmp_path):
    assemble(**parts, output=str(tmp_path / "model"), **SETTINGS)
    pipe = load_pipeline(str(tmp_path / "model"), "cpu", "float32")
    trained = {"transformer": tiny.transformer(), "vae": tiny.vae(residual=True)}
    trained["text_encoder"] = tiny.text_encoder()
    for name, module in trained.items():
        loaded = getattr(pipe, name).state_dict()
        for key, tensor in module.state_dict().items():
            torch.testing.assert_close(loaded[key], tensor, rtol=1e-3, atol=1e-4)
            assert torch.equal(loaded[key], tensor.half().float()) or name == "text_encoder"
    assert {name: pipe.config[name] for name in SETTINGS} == SETTINGS
    assert pipe.scheduler.config.shift == 3.0 and list(pipe.scheduler.config.denoising_steps) == [1000, 600]
    assert pipe.tokenizer("a red fox")["input_ids"] == tiny.tokenizer()("a red fox")["input_ids"]
    stream = pipe.stream("a red fox walks")
    assert stream.method.name == "longlive_infinite" and stream.fps == 8
    assert next(stream).frames.shape == (9, 32, 48, 3)


def test_weights_are_kept_in_half_precision(parts, tmp_path):
    assemble(**parts, output=str(tmp_path), **SETTINGS)
    for name in ("transformer", "vae"):
        (half,), (whole,) = (
            list(folder.glob("*.safetensors"))
            for folder in (tmp_path / name, tmp_path / "whole" / name)
            if folder.exists() or getattr(tiny, name)().save_pretrained(folder) is None
        )
        assert half.stat().st_size < 0.65 * whole.stat().st_size


def test_the_command_assembles(parts, tmp_path):
    lines = [
        f"  {name}: {value}" for name, value in {**parts, "output": tmp_path / "model", **SETTINGS}.items()
    ]
    config = tmp_path / "assemble.yaml"
    config.write_text("\n".join(["kind: assemble", "stage:", *lines]))
    assert main(["train", str(config)]) == 0
    assert load_pipeline(str(tmp_path / "model")).config.width == 48
    assert "## student" in (tmp_path / "model" / "README.md").read_text()


def test_what_is_missing_is_told(parts, tmp_path, capsys):
    with pytest.raises(UserError, match="method = 'longlove' is not known"):
        assemble(**parts, output=str(tmp_path / "model"), **{**SETTINGS, "method": "longlove"})
    assert not (tmp_path / "model").exists()
    lines = [
        f"  {name}: {value}" for name, value in {**parts, "output": tmp_path / "model", **SETTINGS}.items()
    ]
    config = tmp_path / "assemble.yaml"
    config.write_text("\n".join(["kind: assemble", "stage:", *lines]))
    assert main(["train", str(config), f"stage.text={tmp_path}/nowhere"]) == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert "stage of kind assemble" in sentence and "nowhere" in sentence and "check its folders" in sentence
