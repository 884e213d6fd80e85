"""`streamvid generate`: what is on the disk after a run, and after a run that was stopped."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image
from streamvid.pipelines.pipeline_streamvid import StreamVidPipeline

from streamvid import sampler
from streamvid.cli import main
from streamvid.errors import UserError
from streamvid.io import read_video
from streamvid.models import load_pipeline
from streamvid.script import load_script

FOX, SNOW = "a red fox walks", "the snow falls"
STORY = f"{FOX} [2s] | {SNOW} [1s]"
BLOCKS = [9, 12, 12, 12, 12]  # frames of every block of STORY; the last two are the second shot's
PATIENCE = 400  # seconds: the machine may be busy


@cache
def pipeline() -> StreamVidPipeline:
    """The shared tiny pipeline with a VAE that decodes twice as fast."""
    parts = {**tiny.pipeline().components, "vae": tiny.vae(residual=True)}
    return StreamVidPipeline(**parts, height=tiny.PIXELS, width=tiny.PIXELS)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """The folder of a tiny model."""
    folder = tmp_path_factory.mktemp("model")
    pipeline().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def frames(model, tmp_path_factory):
    """Generates into PNG files, which lose nothing, and returns the frames `[T, H, W, 3]`."""
    folder = tmp_path_factory.mktemp("frames")

    @cache
    def run(script=STORY, *options) -> np.ndarray:
        arguments = ["generate", str(script), "-o", f"{folder}/", "--model", model, "--dtype", "float32"]
        assert main([*arguments, "--quiet", *options]) == 0
        return decoded(folder)

    return run


def decoded(path) -> np.ndarray:
    return np.stack(list(read_video(path)))


def manifest(path: Path) -> dict:
    return json.loads(path.with_suffix(".json").read_text())


# --- what a run leaves ----------------------------------------------------------------------------------------------


def test_a_video_with_its_manifest_and_contact_sheet(model, tmp_path, capsys):
    video = tmp_path / "deep" / "story.mp4"
    assert (
        main(["generate", STORY, "-o", str(video), "--model", model, "--contact-sheet", "--seed", "5"]) == 0
    )
    told = capsys.readouterr()
    assert "shot  requested" in told.out and "57 frames at 16 fps in 5 blocks" in told.out  # the timeline
    assert f"wrote {video} and {video.parent}/story_contact_sheet.png" in told.out
    assert "0:03/0:03" in told.err and "real time" in told.err and SNOW in told.err  # the progress
    assert decoded(video).shape == (57, 32, 32, 3)

    record = manifest(video)
    assert (record["status"], record["video"], record["seed"], record["fps"]) == (
        "complete",
        "story.mp4",
        5,
        16,
    )
    assert [chunk["frames"] for chunk in record["chunks"]] == BLOCKS
    assert [chunk["prompt"] for chunk in record["chunks"]] == [FOX, FOX, FOX, SNOW, SNOW]
    assert record["chunks"][3]["events"] == ["switch:recache"]
    assert record["chunks"][0]["timings"]["total"] > 0
    assert [shot["first_block"] for shot in record["timeline"]] == [0, 3]
    assert record["config"]["name"] == "longlive" and record["config"]["window"] == 12
    assert record["config"]["model"] == model and record["device"] == "cpu"
    assert record["script"]["shots"][1]["prompt"] == SNOW
    assert {"streamvid", "torch", "diffusers"} <= set(record["versions"])

    with Image.open(video.parent / "story_contact_sheet.png") as sheet:
        assert sheet.width > 2 * 256  # the frames at 0 s and 2 s
    assert sorted(path.name for path in video.parent.iterdir()) == [
        "story.json",
        "story.mp4",
        "story_contact_sheet.png",
    ]


def test_quiet_is_quiet(model, tmp_path, capsys):
    sheet = tmp_path / "elsewhere" / "sheet.png"
    output = ["-o", str(tmp_path / "a.gif"), "--contact-sheet", str(sheet)]
    assert main(["generate", f"{FOX} [0.5s]", *output, "--model", model, "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")
    assert len(decoded(tmp_path / "a.gif")) == 9 and sheet.is_file()


def test_the_default_model_is_the_embedded_one(model, tmp_path, monkeypatch):
    monkeypatch.setattr("streamvid.models.embedded_models", lambda: {"diorama": Path(model)})
    monkeypatch.chdir(tmp_path)
    assert main(["generate", f"{FOX} [0.5s]", "--quiet"]) == 0
    assert len(decoded("out/video.mp4")) == 9
    assert manifest(Path("out/video.mp4"))["config"]["model"] == "diorama"


def test_the_same_seed_gives_the_same_file(model, tmp_path):
    for name, seed in (("one", "3"), ("two", "3"), ("three", "4")):
        output = str(tmp_path / f"{name}.mp4")
        assert main(["generate", STORY, "-o", output, "--model", model, "--seed", seed, "--quiet"]) == 0
    one, two, three = (decoded(tmp_path / f"{name}.mp4") for name in ("one", "two", "three"))
    assert one.tobytes() == two.tobytes()
    assert one.shape == three.shape and one.tobytes() != three.tobytes()


def test_frames_are_those_of_the_pipeline(model, frames):
    pipe = load_pipeline(model, "cpu", "float32")
    pipe.set_progress_bar_config(disable=True)
    (video,) = pipe(STORY, output_type="pil", seed=2).frames
    assert np.array_equal(np.stack([np.asarray(frame) for frame in video]), frames(STORY, "--seed", "2"))


# --- every option and every field has an effect ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        "--seed 1",
        "--set denoising_steps=[1000]",
        "--set context_timestep=500",
        "--set window=6",
        "--set positions=cache_relative --set window=6",
        "--set transition=cross_only",
        "--set frames_per_block=1 --set sink=1",
        "--noise reference",
        "--method self_forcing",
        "--dtype bfloat16",
    ],
)
def test_an_option_has_an_effect(options, frames):
    one, other = frames(), frames(STORY, *options.split())
    count = min(len(one), len(other))
    assert not np.array_equal(one[:count], other[:count])


def test_overrides_of_one_option_add_up(frames):
    only_window = frames(STORY, "--set", "window=6")
    assert not np.array_equal(only_window, frames(STORY, "--set", "window=6", "--set", "sink=0"))


def test_size_and_rate(frames, model, tmp_path):
    assert frames(f"{FOX} [1s]", "--height", "48", "--width", "64").shape == (21, 48, 64, 3)
    assert len(frames(f"{FOX} [1s]", "--fps", "8")) == 9
    fine, coarse = tmp_path / "fine.mp4", tmp_path / "coarse.mp4"
    for path, crf in ((fine, "5"), (coarse, "45")):
        command = ["generate", f"{FOX} [1s]", "-o", str(path), "--model", model, "--crf", crf, "--quiet"]
        assert main(command) == 0
    assert fine.stat().st_size > 2 * coarse.stat().st_size


def test_attention_backends_agree(frames):
    one, other = frames(STORY, "--attention", "sdpa"), frames(STORY, "--attention", "reference")
    assert np.abs(one.astype(int) - other).max() <= 1


def script_file(folder: Path, second: dict, **fields) -> Path:
    shots = [{"prompt": FOX, "duration": 2}, {"prompt": SNOW, "duration": 1, **second}]
    path = folder / f"{'_'.join([*second, *fields])}.json"
    path.write_text(json.dumps({**fields, "shots": shots}))
    return path


@pytest.mark.parametrize(
    "second", [{"seed": 9}, {"overrides": {"denoising_steps": [1000]}}, {"transition": "cut"}]
)
def test_a_shot_s_own_fields_change_that_shot_only(second, frames, tmp_path):
    plain, changed = frames(), frames(script_file(tmp_path, second))
    first = sum(BLOCKS[:3])
    assert np.array_equal(plain[:first], changed[:first])
    assert not np.array_equal(plain[first:], changed[first:])


def test_what_the_command_says_goes_before_the_script(frames, tmp_path):
    fields = {"seed": 4, "method": "self_forcing", "height": 48, "width": 48, "fps": 8}
    script = script_file(tmp_path, {}, **fields, overrides={"denoising_steps": [1000]})
    own = frames(script)
    assert own.shape[1:3] == (48, 48)
    plain = ["--seed", "0", "--method", "longlive", "--height", "32", "--width", "32", "--fps", "16"]
    given = frames(script, *plain, "--set", "denoising_steps=null")
    assert np.array_equal(given, frames(STORY))


def test_what_an_importer_leaves_out_is_told(model, tmp_path, capsys):
    scope = {
        "prompts": [{"startTime": 0, "endTime": 0.5, "prompts": [{"text": FOX, "weight": 100}]}],
        "settings": {"manageCache": True, "seed": 42},
        "version": "2.1",
    }
    (tmp_path / "scope.json").write_text(json.dumps(scope))
    video = tmp_path / "a.mp4"
    assert (
        main(["generate", str(tmp_path / "scope.json"), "-o", str(video), "--model", model, "--quiet"]) == 0
    )
    assert "note: " in capsys.readouterr().err and manifest(video)["seed"] == 42


def test_words_the_model_does_not_know_are_one_warning(model, tmp_path, capsys):
    line = "a red foxx walks by [0.5s]"
    assert main(["generate", line, "-o", str(tmp_path / "a.mp4"), "--model", model, "--quiet"]) == 0
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning: ") and "foxx (nearest: fox)" in warning and "by" in warning


# --- a run that was stopped -----------------------------------------------------------------------------------------


def fail_at_block(monkeypatch, number: int, error: BaseException) -> None:
    real = sampler.few_step_block

    def block(transformer, scheduler, steps, plan, *rest, **options):
        if plan.block == number:
            raise error
        return real(transformer, scheduler, steps, plan, *rest, **options)

    monkeypatch.setattr(sampler, "few_step_block", block)


@pytest.mark.parametrize(
    ("error", "status"), [(ValueError("no such thing"), "failed"), (KeyboardInterrupt(), "interrupted")]
)
def test_an_exception_keeps_what_was_written(error, status, model, tmp_path, monkeypatch, capsys):
    fail_at_block(monkeypatch, 2, error)
    video = tmp_path / "story.mp4"
    command = ["generate", STORY, "-o", str(video), "--model", model, "--contact-sheet", "--quiet"]
    if status == "failed":
        with pytest.raises(ValueError, match="no such thing"):
            main(command)
        assert manifest(video)["error"] == "no such thing"
    else:
        assert main(command) == 130
        assert capsys.readouterr().err == "streamvid: interrupted; what was written so far is kept\n"
    record = manifest(video)
    assert record["status"] == status and [chunk["frames"] for chunk in record["chunks"]] == BLOCKS[:2]
    assert len(decoded(video)) == 21
    assert (tmp_path / "story_contact_sheet.png").is_file()


def test_a_mistake_found_on_the_way_keeps_what_was_written(model, tmp_path, monkeypatch, capsys):
    fail_at_block(monkeypatch, 1, UserError("the disk is full"))
    video = tmp_path / "story.mp4"
    assert main(["generate", STORY, "-o", str(video), "--model", model, "--quiet"]) == 2
    assert capsys.readouterr().err == "streamvid: the disk is full\n"
    assert len(decoded(video)) == 9 and manifest(video)["status"] == "failed"


def test_an_earlier_video_stays_where_nothing_new_was_made(model, tmp_path, monkeypatch):
    video = tmp_path / "story.mp4"
    video.write_bytes(b"the old one")
    fail_at_block(monkeypatch, 0, UserError("no"))
    assert main(["generate", STORY, "-o", str(video), "--model", model, "--quiet"]) == 2
    assert video.read_bytes() == b"the old one"


LIMITED = """
import resource, sys
from streamvid.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
sys.exit(main(sys.argv[2:]))
"""


@pytest.fixture
def start(model):
    """Starts the command in a process of its own, with ten minutes of video to make."""
    started = []

    def run(video, *python) -> subprocess.Popen:
        options = ["--model", model, "-o", str(video), "--dtype", "float32", "--crf", "10"]
        command = [
            sys.executable,
            *(python or ("-m", "streamvid.cli")),
            "generate",
            f"{FOX} [600s]",
            *options,
        ]
        started.append(
            subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                preexec_fn=listen_to_interrupts,
            )
        )
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.communicate()


def wait_for_blocks(video: Path, count: int, process) -> None:
    """Until so many blocks are in the manifest, which is written after the video."""
    end = time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < end:
        with suppress(FileNotFoundError):
            if manifest(video)["totals"]["chunks"] >= count:
                return
        time.sleep(0.05)
    raise AssertionError(f"no {count} blocks came, code {process.poll()}")


@pytest.fixture(scope="module")
def beginning(model, tmp_path_factory) -> np.ndarray:
    """The first two blocks of the same video, of a run that nothing stopped."""
    video = tmp_path_factory.mktemp("beginning") / "short.mp4"
    options = ["--model", model, "-o", str(video), "--dtype", "float32", "--crf", "10", "--quiet"]
    assert main(["generate", f"{FOX} [1s]", *options]) == 0
    return decoded(video)


def assert_begins(video: Path, beginning: np.ndarray) -> int:
    """What can be decoded is whole blocks of the right frames; returns how many frames."""
    shown = decoded(video)
    assert len(shown) >= len(beginning) == 21 and (len(shown) - 9) % 12 == 0
    assert np.array_equal(shown[:21], beginning)
    return len(shown)


def listen_to_interrupts() -> None:
    """A background job starts with SIGINT ignored, and so would its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_an_interrupt_keeps_everything(start, beginning, tmp_path):
    video = tmp_path / "story.mp4"
    process = start(video)
    wait_for_blocks(video, 2, process)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert told.splitlines()[-1] == "streamvid: interrupted; what was written so far is kept"
    assert "Traceback" not in told
    record = manifest(video)
    assert record["status"] == "interrupted"
    shown, noted = assert_begins(video, beginning), record["totals"]["frames"]
    assert shown in (noted, noted + 12)  # the signal may come between the writing of a chunk and its note


def test_a_kill_keeps_what_was_committed(start, beginning, tmp_path):
    video = tmp_path / "story.mp4"
    process = start(video)
    wait_for_blocks(video, 2, process)
    process.kill()
    process.communicate()
    record = manifest(video)
    assert record["status"] == "running"
    assert assert_begins(video, beginning) >= record["totals"]["frames"] >= 21


@pytest.mark.skipif(not hasattr(os, "fork"), reason="limits of processes are POSIX")
def test_a_full_disk_is_one_sentence_and_keeps_what_fitted(start, beginning, tmp_path):
    video = tmp_path / "story.mp4"
    process = start(video, "-c", LIMITED, "40000")
    _, told = process.communicate(timeout=PATIENCE)
    assert process.returncode == 2, told
    sentence = told.splitlines()[-1]
    assert "Traceback" not in told and sentence.startswith(
        f"streamvid: output '{video}': the disk is full; the "
    )
    assert "written before are kept; free some space" in sentence
    record = manifest(video)
    assert record["status"] == "failed"
    assert assert_begins(video, beginning) == record["totals"]["frames"]


def test_script_of_the_library_form_is_the_one_of_the_command(model, tmp_path):
    """`generate` as a function: the same arguments, a path in return."""
    from streamvid.generate import generate

    path = generate(load_script(STORY), tmp_path / "a.mp4", model=model, quiet=True)
    assert path == tmp_path / "a.mp4" and len(decoded(path)) == 57


def test_options_of_memory(model, tmp_path, monkeypatch):
    """What `streamvid plan` proposes is what the pipeline is loaded with."""
    given = []

    def load(*arguments):
        given.extend(arguments)
        raise UserError("that is enough")

    monkeypatch.setattr("streamvid.generate.load_pipeline", load)
    options = ["--weights", "int8", "--text-encoder", "free", "--decoder", "tiny", "--compile"]
    assert main(["generate", STORY, "-o", str(tmp_path / "a.mp4"), "--model", model, *options]) == 2
    assert given[3:] == ["tiny", "int8", "free", (FOX, SNOW), True]
