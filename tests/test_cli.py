"""Mistakes of a user, through the real entry point: one sentence with field, value and fix, exit code 2, no traceback."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler
from safetensors.torch import load_file, save_file

from streamvid.cli import main
from streamvid.commands.common import parse_assignments
from streamvid.errors import UserError
from streamvid.script_fields import MAX_PROMPT_CHARACTERS

FOX = "a red fox walks [1s]"
TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """The folder of a tiny model."""
    folder = tmp_path_factory.mktemp("model")
    tiny.pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def no_weights(monkeypatch):
    """Fails the test when weights are loaded: some mistakes must be told before."""

    def load(*arguments, **options):
        raise AssertionError("weights are loaded before the mistake is told")

    monkeypatch.setattr("streamvid.checkpoints.load_transformer", load)


@pytest.fixture
def refused(capsys):
    """Runs the command line and returns the one sentence that a mistake costs."""

    def run(*arguments) -> str:
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == 2
        output = capsys.readouterr()
        lines = [line for line in output.err.splitlines() if not line.startswith("warning: ")]
        assert len(lines) == 1 and lines[0].startswith("streamvid: "), output.err
        assert "Traceback" not in output.out + output.err
        return lines[0].removeprefix("streamvid: ")

    return run


def assert_tells(sentence: str, *parts) -> None:
    for part in parts:
        assert str(part) in sentence


# --- scripts --------------------------------------------------------------------------------------------------------

SHOT = "shots:\n  - prompt: a red fox walks\n    duration: 1\n"
SCRIPTS = {
    "malformed YAML": ("bad.yaml", "shots: [", ["bad.yaml, line 1", "not valid", "check the indentation"]),
    "malformed JSON": ("bad.json", '{"shots": ', ["bad.json", "JSON"]),
    "unknown field": ("field.yaml", SHOT + "    promt: x\n", ["line 4", "'promt'", "did you mean 'prompt'"]),
    "empty prompt": ("a.yaml", "shots: [{prompt: ' ', duration: 1}]", ["shot 1: prompt is empty", "write"]),
    "zero duration": ("a.yaml", SHOT.replace("1\n", "0\n"), ["line 3", "duration is 0", "from 0.001"]),
    "negative duration": (
        "a.yaml",
        SHOT.replace("1\n", "-3\n"),
        ["duration is -3", "choose one in that range"],
    ),
    "overlong prompt": (
        "a.txt",
        "fox " * MAX_PROMPT_CHARACTERS,
        ["prompt", f"at most {MAX_PROMPT_CHARACTERS}", "shorten it"],
    ),
    "unknown transition": ("a.yaml", SHOT + "    transition: wipe\n", ["transition is 'wipe'", "cross_only"]),
    "unknown option": ("a.yaml", SHOT + "overrides: {sinck: 3}\n", ["'sinck'", "did you mean 'sink'"]),
    "unknown method": ("a.yaml", SHOT + "method: longlove\n", ["'longlove'", "did you mean longlive"]),
    "unknown model": ("a.yaml", SHOT + "model: a/b/c\n", ["model = 'a/b/c'", "hub id"]),
    "impossible window": ("a.yaml", SHOT + "overrides: {window: 4}\n", ["window = 4", "at least 6"]),
    "no text": ("a.yaml", b"\xff\xfe", ["0xff", "save the file as UTF-8"]),
    "another kind of file": ("fox.png", b"\x89PNG", ["'.png'", "must end in one of"]),
}


@pytest.mark.parametrize("mistake", SCRIPTS)
def test_a_bad_script(mistake, tmp_path, refused, no_weights, model):
    name, content, parts = SCRIPTS[mistake]
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    named = () if mistake == "unknown model" else ("--model", model)
    sentence = refused("generate", path, "-o", tmp_path / "a.mp4", *named)
    assert_tells(sentence, *parts)
    assert [entry.name for entry in tmp_path.iterdir()] == [name]  # nothing was made


@pytest.mark.parametrize("command", [["generate"], ["script", "check"]])
def test_a_missing_script(command, tmp_path, refused):
    (tmp_path / "story.yaml").write_text(SHOT)
    sentence = refused(*command, tmp_path / "stori.yaml")
    assert_tells(sentence, "stori.yaml", "no such script file", "did you mean", "story.yaml")
    assert "this is a folder" in refused(*command, tmp_path)


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("a fox [0s]", ["shot 1: duration is 0"]),
        ("a fox [-2s]", ["-2"]),
        ("a fox [3s] | [2s]", ["shot 2", "prompt"]),
        ("fox", ["no such script file", "fox [5s]"]),
        ("", ["empty"]),
    ],
)
def test_a_bad_one_line_script(line, parts, refused, no_weights):
    assert_tells(refused("generate", line), *parts)


# --- options --------------------------------------------------------------------------------------------------------

OPTIONS = {  # refused before the weights are loaded
    "--model diorema/x/y": ["model = 'diorema/x/y' is not known", "folder with model_index.json"],
    "--method longlove": ["method = 'longlove'", "did you mean longlive?", "self_forcing"],
    "--method self_forcing --set window=2": ["window = 2", "block of 3", "at least 3"],
    "--set window=4": ["window = 4", "sink = 3", "at least 6"],
    "--set sink=-1": ["sink = -1", "give 0"],
    "--set sink=three": ["sink = 'three'", "whole number"],
    "--set sinck=3": ["option sinck", "did you mean sink?"],
    "--set sink": ["--set 'sink'", "OPTION=VALUE"],
    "--set sink=[": ["--set 'sink=['", "quote it"],
    "--set sink=2024-13-45": ["cannot be read", "quote it"],
    "--set transition=wipe": ["transition = 'wipe'", "cross_only, recache, flush, blend, shot, cut"],
    "--set transition=blend(0)": ["transition = 'blend(0)'", "a number of blocks", "lerp, slerp"],
    "--set sampler=euler": ["sampler = 'euler'", "few_step, rolling"],
    "--set sink_update=ema --set sink=0": ["sink = 0", "give a sink or sink_update = static"],
    "--set budget=20": ["budget = 20", "window = 12"],
    "--set positions=sideways": ["positions = 'sideways'", "cache_relative"],
    "--set denoising_steps=4": ["denoising_steps = 4", "[1000, 750, 500, 250]"],
    "--set context_timestep=5000": ["context_timestep = 5000", "between 0 and 1000"],
    "--set frames_per_block=0": ["frames_per_block = 0", "at least 1"],
    "--height abc": ["--height", "'abc'", "streamvid generate --help"],
    "--height -16": ["height = -16", "from 1 to 8192"],
    "--width 1000000": ["width = 1000000", "8192"],
    "--fps 0": ["fps 0.0", "such as 16"],
    "--fps inf": ["fps inf", "such as 16"],
    "--fps nan": ["fps nan", "such as 16"],
    "--seed -1": ["seed = -1", "from 0"],
    "--seed 99999999999999999999": ["seed = 99999999999999999999", "to 9223372036854775807"],
    "--device tpu": ["device = 'tpu'", "give cpu, cuda"],
    "--device meta": ["device = 'meta'", "give cpu, cuda"],
    "--device cuda": ["device = 'cuda' asks for CUDA", "--device cpu"],
    "--device cuda:3": ["device = 'cuda:3' asks for CUDA", "--device cpu"],
    "--dtype int8": ["dtype = 'int8'", "float32, bfloat16, float16"],
    "--attention flash9": ["attention backend = 'flash9'", "auto, sdpa"],
    "--crf 99": ["crf 99", "0 (lossless) to 51"],
    "--sead 3": ["unrecognized arguments: --sead 3", "--help"],
}


@pytest.mark.parametrize("options", OPTIONS)
def test_a_bad_option(options, tmp_path, model, refused, no_weights, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    named = [] if options.startswith("--model") else ["--model", model]
    sentence = refused("generate", FOX, "-o", tmp_path / "a.mp4", *named, *options.split())
    assert_tells(sentence, *OPTIONS[options])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("script", "options", "parts"),
    [
        (FOX, "--height 40", ["height = 40", "multiple of 16", "e.g. 32"]),
        (FOX, "--noise pink", ["noise = 'pink'", "seeded, reference"]),
        (FOX, "--set denoising_steps=[500,1000]", ["denoising_steps = [500.0, 1000.0]", "descending"]),
        ({"seed": 3}, "--noise reference", ["seed of a shot", "noise = seeded"]),
        ({"overrides": {"window": 9}}, "", ["overrides.window cannot change", "denoising_steps"]),
        ({"overrides": {"denoising_steps": [7, 8]}}, "", ["denoising_steps = [7.0, 8.0]", "descending"]),
    ],
)
def test_an_option_that_this_model_cannot_serve(script, options, parts, tmp_path, model, refused):
    if isinstance(script, dict):
        shots = [{"prompt": "a fox", "duration": 1}, {"prompt": "a cat", "duration": 1, **script}]
        (tmp_path / "script.json").write_text(json.dumps({"shots": shots}))
        script = tmp_path / "script.json"
    output = tmp_path / "a.mp4"
    assert_tells(refused("generate", script, "-o", output, "--model", model, *options.split()), *parts)
    assert not output.exists()


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], ["COMMAND", "streamvid --help"]),
        (["generat"], ["'generat'", "generate"]),
        (["script", "check", FOX, "--fps", "0"], ["fps = 0.0", "above 0"]),
        (["script", "check", FOX, "--fps", "inf"], ["fps = inf", "at most 1000"]),
        (["script", "check", FOX, "--frames-per-block", "0"], ["frames-per-block = 0", "above 0"]),
        (["info", "diorema"], ["model = 'diorema' is not an embedded model"]),
        (["train", "nowhere.yaml"], ["config = 'nowhere.yaml'", "give the path"]),
        (["parity", "nowhere"], ["nowhere"]),
        (["convert", "out", "--method", "longlive"], ["--transformer", "streamvid convert --help"]),
        (["convert", "/nowhere/out", "--transformer", "x", "--method", "longlove"], ["'longlove'"]),
        (
            ["convert", "out", "--transformer", "x", "--method", "longlive", "--steps", "a,b"],
            ["--steps", "'a,b'"],
        ),
    ],
)
def test_a_bad_command(arguments, parts, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_tells(refused(*arguments), *parts)
    assert not list(tmp_path.iterdir())


def test_values_of_set_are_yaml():
    given = ["sink=0", "positions=absolute", "denoising_steps=[1000, 500]", "window = 9", "sink=3"]
    expected = {"sink": 3, "positions": "absolute", "denoising_steps": [1000, 500], "window": 9}
    assert parse_assignments(given) == expected
    with pytest.raises(UserError, match="OPTION=VALUE"):
        parse_assignments(["=3"])


# --- outputs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("output", "options", "parts"),
    [
        ("a.avi", [], ["'.avi'", "use .mp4, .gif, .webp"]),
        ("folder.mp4", [], ["it is a folder", "give the name of a file"]),
        ("file/a.mp4", [], ["a file stands where a folder is needed", "choose another place"]),
        ("file/frames/", [], ["a file stands where a folder is needed", "choose another place"]),
        ("locked/a.mp4", [], ["not permitted", "choose a folder"]),
        ("locked/frames/", [], ["not permitted", "choose a folder"]),
        ("a.gif", ["--crf", "20"], ["crf = 20 is for MP4 only", "leave it out"]),
        ("a.mp4", ["--contact-sheet", "file/a.png"], ["file/a.png", "choose another place"]),
        ("a.mp4", ["--contact-sheet", "locked/a.png"], ["locked/a.png", "choose a folder"]),
        ("a.mp4", ["--contact-sheet", "file"], ["contact sheet = 'file'", ".png"]),
    ],
)
def test_an_output_that_cannot_be_written(
    output, options, parts, tmp_path, model, refused, no_weights, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "locked").mkdir()
    lock(tmp_path / "locked", monkeypatch)
    sentence = refused("generate", FOX, "-o", output, "--model", model, *options)
    assert_tells(sentence, options[-1] if options else output.rstrip("/"), *parts)
    assert (tmp_path / "file").read_text() == "mine"


def lock(folder: Path, monkeypatch) -> None:
    """Make a folder read-only, for root too: the calls that write fail as they do for others."""
    folder.chmod(0o555)
    if os.geteuid() == 0:
        for name in ("open", "write_bytes", "mkdir"):
            real = getattr(Path, name)

            def call(self, *arguments, real=real, **options):
                if folder.name in self.parts:
                    raise PermissionError(13, "Permission denied", str(self))
                return real(self, *arguments, **options)

            monkeypatch.setattr(Path, name, call)


# --- models ---------------------------------------------------------------------------------------------------------


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def change_tensors(file: Path, change) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def change_index(folder: Path, **entries) -> None:
    index = folder / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), **entries}))


def other_vae(folder: Path) -> None:
    numbers = {"latents_mean": [0.0] * 8, "latents_std": [1.0] * 8}
    AutoencoderKLWan(base_dim=4, z_dim=8, num_res_blocks=1, **numbers).save_pretrained(folder / "vae")


def other_scheduler(folder: Path) -> None:
    UniPCMultistepScheduler().save_pretrained(folder / "scheduler")
    change_index(folder, scheduler=["diffusers", "UniPCMultistepScheduler"])


BROKEN = {  # what happened to the folder, and what must be told
    "transformer of another model": (
        lambda f: tiny.transformer(in_channels=8, out_channels=8).save_pretrained(f / "transformer"),
        ["vae has 16 latent channels", "transformer expects 8", "same model"],
    ),
    "VAE of another model": (other_vae, ["vae has 8 latent channels", "expects 16", "same model"]),
    "text encoder of another model": (
        lambda f: tiny.transformer(text_dim=24).save_pretrained(f / "transformer"),
        ["text_encoder has a width of 16", "expects 24", "same model"],
    ),
    "a model of many steps": (other_scheduler, ["scheduler", "UniPC", "streamvid convert"]),
    "truncated weights": (lambda f: cut(f / TRANSFORMER), [TRANSFORMER, "truncated", "download it again"]),
    "no safetensors": (lambda f: (f / TRANSFORMER).write_text("<html>" * 99), ["not a safetensors file"]),
    "truncated VAE": (lambda f: cut(f / "vae" / Path(TRANSFORMER).name), ["vae", "truncated"]),
    "truncated text encoder": (
        lambda f: cut(f / "text_encoder/model.safetensors"),
        ["model =", "incomplete", "download it again"],
    ),
    "no weights": (lambda f: (f / TRANSFORMER).unlink(), ["transformer", "name the file"]),
    "a tensor is missing": (
        lambda f: change_tensors(f / TRANSFORMER, lambda t: t.pop("blocks.1.attn1.to_q.bias")),
        ["1 tensors missing", "blocks.1.attn1.to_q.bias", "give the checkpoint"],
    ),
    "a tensor too many": (
        lambda f: change_tensors(f / TRANSFORMER, lambda t: t.update({"fox": torch.ones(1)})),
        ["1 tensors unexpected", "fox", "give the checkpoint"],
    ),
    "a word's tensor is missing": (
        lambda f: change_tensors(f / "text_encoder/model.safetensors", lambda t: t.pop("shared.weight")),
        ["text_encoder", "lacks", "download it again"],
    ),
    "broken tokenizer": (
        lambda f: (f / "tokenizer/tokenizer.json").write_text("{"),
        ["model =", "its files"],
    ),
    "broken index": (lambda f: (f / "model_index.json").write_text("{"), ["model_index.json", "its files"]),
    "no index": (
        lambda f: (f / "model_index.json").unlink(),
        ["without model_index.json", "streamvid convert"],
    ),
    "unknown method": (lambda f: change_index(f, method="longlove"), ["method = 'longlove'", "longlive?"]),
}


@pytest.mark.parametrize("damage", BROKEN)
def test_a_model_that_does_not_load(damage, tmp_path, model, refused):
    break_it, parts = BROKEN[damage]
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    break_it(folder)
    sentence = refused("generate", FOX, "-o", tmp_path / "a.mp4", "--model", folder)
    assert_tells(sentence, *parts)
    assert not (tmp_path / "a.mp4").exists()


def test_a_model_that_is_nowhere(tmp_path, model, refused):
    sentence = refused("generate", FOX, "-o", tmp_path / "a.mp4", "--model", "nobody/nothing")
    assert_tells(sentence, "model = 'nobody/nothing' cannot be loaded", "check its name")
    sentence = refused("generate", FOX, "-o", tmp_path / "a.mp4", "--model", model / TRANSFORMER)
    assert_tells(sentence, TRANSFORMER, "is a single file", "streamvid convert")


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")]
)
def test_too_little_memory(error, tmp_path, model, refused, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("streamvid.generate.load_pipeline", fail)
    sentence = refused("generate", FOX, "-o", tmp_path / "a.mp4", "--model", model)
    assert_tells(sentence, "not enough memory", "give a smaller size, window or batch")


def test_a_bug_is_no_mistake_of_the_user(tmp_path, model, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr("streamvid.generate.load_pipeline", fail)
    with pytest.raises(RuntimeError, match="shapes differ"):  # its traceback is wanted
        main(["generate", FOX, "-o", str(tmp_path / "a.mp4"), "--model", str(model)])


# --- a process of its own -------------------------------------------------------------------------------------------


def test_a_mistake_in_a_process_of_its_own(tmp_path):
    command = [sys.executable, "-m", "streamvid.cli", "script", "check", "nowhere.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1 and done.stderr.startswith(
        "streamvid: nowhere.yaml: there is no such"
    )


def test_warnings_are_one_line_and_end_with_the_command(capsys, monkeypatch):
    import warnings

    def warn(options):
        warnings.warn("two\nlines", stacklevel=1)

    shown = warnings.showwarning
    monkeypatch.setattr("streamvid.commands.info.run", warn)
    assert main(["info"]) == 0
    assert capsys.readouterr().err == "warning: two lines\n"
    assert warnings.showwarning is shown


def test_help_tells_every_command(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    told = capsys.readouterr().out
    assert_tells(told, "generate", "script", "info", "train", "parity", "convert")


def test_schema_is_printed(capsys):
    assert main(["script", "schema"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "streamvid script"
