"""Published files, `streamvid convert`, then a folder, a copy or a hub id: always the frames of the files themselves."""

import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from published import fsdp, in_wan_names
from streamvid.pipelines.pipeline_streamvid import StreamVidPipeline

from streamvid import load_pipeline
from streamvid.checkpoint_keys import TEXT_ENCODER, vae_rules
from streamvid.checkpoints import load_text_encoder, load_tokenizer, load_transformer, load_vae
from streamvid.cli import main
from streamvid.schedule import FewStepFlowScheduler

SETTINGS = {"method": "self_forcing", "fps": 8.0, "height": 32, "width": 48}
SCRIPT = "a red fox [2s] | the blue cat [2s]"
HUB_ID, COMMIT = "someone/tiny-forcing", "0123456789abcdef0123456789abcdef01234567"


def frames(pipe: StreamVidPipeline) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # text_len is the real model's
        return np.concatenate([c.videos for c in pipe.stream(SCRIPT, seed=5)], axis=1)


@pytest.fixture(scope="module")
def release(tmp_path_factory) -> dict[str, Path]:
    """Self Forcing's way to publish: a pickle of averaged weights under FSDP's names, and Wan's own files beside it."""
    folder = tmp_path_factory.mktemp("release")
    text = tiny.text_encoder().state_dict()
    del text["encoder.embed_tokens.weight"]
    torch.save({"generator_ema": fsdp(tiny.transformer().state_dict())}, folder / "self_forcing_dmd.pt")
    torch.save(in_wan_names(tiny.vae().state_dict(), vae_rules(1)), folder / "Wan2.1_VAE.pth")
    torch.save(in_wan_names(text, TEXT_ENCODER), folder / "models_t5.pth")
    tiny.tokenizer().save_pretrained(folder / "umt5-xxl")
    names = ("self_forcing_dmd.pt", "Wan2.1_VAE.pth", "models_t5.pth", "umt5-xxl")
    return dict(
        zip(("transformer", "vae", "text_encoder", "tokenizer"), (folder / n for n in names), strict=True)
    )


@pytest.fixture(scope="module")
def expected(release) -> np.ndarray:
    """Frames of the files as they are."""
    pipe = StreamVidPipeline(
        load_tokenizer(release["tokenizer"]),
        load_text_encoder(release["text_encoder"]),
        load_transformer(release["transformer"], {"attention_head_dim": 12}),
        load_vae(release["vae"]),
        FewStepFlowScheduler(denoising_steps=(1000, 500)),
        **SETTINGS,
    )
    return frames(pipe)


@pytest.fixture(scope="module")
def folder(release, tmp_path_factory) -> Path:
    """What the command writes."""
    output = tmp_path_factory.mktemp("converted") / "model"
    parts = {f"--{name.replace('_', '-')}": path for name, path in release.items()}
    settings = {f"--{name}": value for name, value in SETTINGS.items()}
    flags = {**parts, **settings, "--head-dim": 12, "--steps": "1000,500"}
    assert main(["convert", str(output), *(str(word) for flag in flags.items() for word in flag)]) == 0
    return output


def test_a_converted_folder_gives_the_frames_of_its_files(folder, expected):
    pipe = StreamVidPipeline.from_pretrained(folder)
    assert {name: pipe.config[name] for name in SETTINGS} == SETTINGS
    assert np.array_equal(frames(pipe), expected)
    assert np.abs(frames(load_pipeline(str(folder), "cpu", "float32")).astype(int) - expected).max() <= 1


def test_it_may_be_saved_and_loaded_again(folder, expected, tmp_path):
    StreamVidPipeline.from_pretrained(folder).save_pretrained(tmp_path / "again")
    first, second = (
        json.loads((place / "model_index.json").read_text()) for place in (folder, tmp_path / "again")
    )
    assert second.pop("_name_or_path") == str(folder)  # where diffusers had it from
    assert first == second and first["distilled_for"] == "self_forcing"
    assert np.array_equal(frames(StreamVidPipeline.from_pretrained(tmp_path / "again")), expected)


def test_a_hub_id_gives_them_too(folder, expected, tmp_path):
    """From a cache as the hub's client lays it out; nothing is asked of a server."""
    repository = tmp_path / "hub" / "models--someone--tiny-forcing"
    shutil.copytree(folder, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    program = f"""
import numpy as np
from test_round_trip import frames
from streamvid import load_pipeline
from streamvid.pipelines.pipeline_streamvid import StreamVidPipeline

pipe = StreamVidPipeline.from_pretrained("{HUB_ID}")
np.savez("frames.npz", plain=frames(pipe), loaded=frames(load_pipeline("{HUB_ID}", "cpu", "float32")))
"""
    tests = Path(__file__).parent
    paths = os.pathsep.join(map(str, (tests, tests.parent)))
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": paths}
    environment.pop("HF_HUB_CACHE", None)
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    got = np.load(tmp_path / "frames.npz")
    assert np.array_equal(got["plain"], expected)
    assert np.abs(got["loaded"].astype(int) - expected).max() <= 1
