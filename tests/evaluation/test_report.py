"""The report in a real browser, offline; comparison, leaderboard, and what goes to and comes from the official tool."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from reference import SCORING, clip
from test_eval_run import SETTINGS, write

from streamvid.cli import main
from streamvid.errors import UserError
from streamvid.evaluation.comparison import compare_pair, verdict
from streamvid.evaluation.evaluate import evaluate
from streamvid.evaluation.manifest import name_problem
from streamvid.evaluation.protocol import jobs, load_protocol
from streamvid.evaluation.registry import resolve
from streamvid.evaluation.sampling import prompt_of_name
from streamvid.evaluation.types import Segment, Video

METRICS = ["vbench.temporal_flickering", "drift.luma", "drift.sharpness", "long.*", "!long.*clip_to_clip"]
METRICS += ["interactive.*", "timing.*"]
TIMINGS = {
    "chunk_seconds": [1.0, 0.5, 0.6, 0.5, 0.9, 0.5],
    "chunk_frames": [9, 12, 12, 12, 12, 7],
    "switches": [3],
}


def make_run(folder, worsen=lambda frames: frames, method="one"):
    """Five videos of two prompts each."""
    rng = np.random.default_rng(0)
    videos = []
    for number, name in enumerate(("c_pan", "d_drift", "e_loop_switch", "b_flicker", "a_static")):
        frames = np.concatenate([clip(name)[:32], clip("c_pan")[:32][:, ::-1]])
        frames = np.clip(frames + rng.normal(0, 1, frames.shape), 0, 255).astype(np.uint8)
        path = folder / "videos" / f"p{number:04d}-0.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, worsen(frames))
        videos.append(
            Video(
                path.stem,
                str(path),
                f"prompt {name}",
                group=f"p{number:04d}",
                seed=number,
                fps=16.0,
                segments=(Segment(0, 32, f"prompt {name}"), Segment(32, 64, "then <b>another</b>")),
                borders=(9, 21, 33, 45, 57),
                timings=TIMINGS,
            )
        )
    settings = {
        **SETTINGS,
        "protocol": "test",
        "method": method,
        "primary": ["drift.luma"],
        "deviations": ["not real"],
    }
    return evaluate(folder, videos, resolve(METRICS), settings, quiet=True)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    ramp = np.linspace(0, 30, 64)[:, None, None, None]
    make_run(root / "one")
    make_run(root / "two", lambda frames: np.clip(frames + ramp, 0, 255).astype(np.uint8), "two")
    return root


def chromium():
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert found, "no Chromium: apt-get install chromium"
    return found


def test_the_report_opens_in_a_browser_without_a_network(runs, tmp_path):
    from playwright.sync_api import sync_playwright

    report = runs / "one" / "report.html"
    assert "http" not in report.read_text()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        context = browser.new_context(
            offline=True, java_script_enabled=True, viewport={"width": 1000, "height": 800}
        )
        page = context.new_page()
        complaints, asked = [], []
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on(
            "console", lambda message: complaints.append(message.text) if message.type == "error" else None
        )
        page.on("request", lambda request: asked.append(request.url))
        page.goto(report.as_uri())
        assert page.title() == "test, one" and page.locator("#scores tr").count() > 15
        for part in ("curves", "lags", "latency"):
            box = page.locator(f"#{part} svg").first.bounding_box()
            assert box["width"] > 300 and box["height"] > 50
        # every number of an axis is inside its picture
        cut = """all => all.filter(t => { const a = t.getBoundingClientRect(), b = t.closest('svg').getBoundingClientRect();
            return a.left < b.left - 1 || a.right > b.right + 1 || a.top < b.top - 1; }).map(t => t.textContent)"""
        assert page.eval_on_selector_all("svg text", cut) == []
        assert page.locator("#strips img").count() == 24 and page.locator("#cards div").count() >= 2
        assert page.locator("#curves polyline").count() >= 2 and page.locator("#curves polygon").count() >= 2
        widths = page.eval_on_selector_all("#gallery img", "all => all.map(i => i.naturalWidth)")
        assert len(widths) >= 30 and all(width == 112 for width in widths)
        assert page.locator("#timing tr").count() > 5 and "not real" in page.inner_text("body")
        assert page.locator("b", has_text="another").count() == 0  # what a prompt says is text
        assert page.evaluate("document.documentElement.scrollWidth") <= 1000
        page.screenshot(path=str(tmp_path / "report.png"), full_page=True)
        browser.close()
    assert complaints == [] and [url for url in asked if not url.startswith(("file:", "data:"))] == []
    assert (tmp_path / "report.png").stat().st_size > 20_000


def test_a_report_is_written_again_and_shows_the_same(runs):
    path = runs / "one" / "report.html"
    before = path.read_bytes()
    assert main(["eval", "report", str(runs / "one")]) == 0 and path.read_bytes() == before


def test_compare_sees_what_was_made_worse(runs, tmp_path, capsys):
    told = compare_pair(runs / "one", runs / "two", margin=0.5)
    drift = told["metrics"]["drift.luma"]
    assert drift["prompts"] == 5 and drift["difference"] > 5 and drift["losses"] == 5 and drift["low"] > 0
    assert (
        drift["p"] == pytest.approx(2 / 32) and drift["holm_p"] == drift["p"] and drift["equivalence_p"] > 0.5
    )
    assert verdict({**drift, "holm_p": 0.01}) == "worse" and verdict(drift) == "-"
    same = compare_pair(runs / "one", runs / "one")
    assert all(row["difference"] == 0 and row["p"] == 1.0 for row in same["metrics"].values())
    assert main(["eval", "compare", str(runs / "one"), str(runs / "two"), "-o", str(tmp_path)]) == 0
    assert "two against one" in capsys.readouterr().out
    assert json.loads((tmp_path / "comparison.json").read_text())[0]["second"] == "two"
    assert "http" not in (tmp_path / "comparison.html").read_text()
    assert main(["eval", "compare", str(runs / "one"), str(tmp_path / "none")]) == 2


@pytest.fixture
def official(tmp_path):
    """A run over prompts as VBench names them."""
    videos = []
    for number, (prompt, dimensions) in enumerate(
        (("In a still frame, a stop sign", ("temporal_flickering",)), ("a red bicycle", ("color",)))
    ):
        path = tmp_path / "run" / "videos" / f"p{number}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, clip("c_pan"))
        videos.append(Video(path.stem, str(path), prompt, sample=number, dimensions=dimensions, group=prompt))
    settings = {**SETTINGS, "protocol": "vbench"}
    evaluate(tmp_path / "run", videos, resolve(["vbench.temporal_flickering"]), settings, quiet=True)
    return tmp_path / "run"


def test_exported_folders_are_what_vbench_reads(official, tmp_path):
    out = tmp_path / "out"
    assert main(["eval", "export", str(official), "--format", "vbench", "-o", str(out)]) == 0
    files = sorted(str(path.relative_to(out / "videos")) for path in (out / "videos").rglob("*.mp4"))
    assert files == ["color/a red bicycle-1.mp4", "temporal_flickering/In a still frame, a stop sign-0.mp4"]
    told = json.loads((out / "temporal_flickering_eval_results.json").read_text())["temporal_flickering"]
    assert told[0] == pytest.approx(0.9002340354171454, abs=1e-8)
    assert told[1][0]["video_path"].endswith("In a still frame, a stop sign-0.mp4")
    assert main(["eval", "export", str(official), "--format", "custom", "-o", str(out / "c")]) == 0
    prompts = json.loads((out / "c" / "prompt_file.json").read_text())
    assert set(prompts) == {path.name for path in (out / "c" / "videos").iterdir()}
    assert main(["eval", "export", str(official), "--format", "nonsense", "-o", str(out)]) == 2


def test_segments_are_exported_frame_by_frame(runs, tmp_path):
    from streamvid.evaluation.sources import open_source

    assert main(["eval", "export", str(runs / "one"), "--format", "segments", "-o", str(tmp_path)]) == 0
    whole = np.stack(list(open_source(runs / "one" / "videos" / "p0000-0.mp4").frames()))
    part = open_source(next((tmp_path / "segments" / "p0000-0-s0").iterdir()))
    assert np.array_equal(np.stack(list(part.frames())), whole[:32])


def test_the_leaderboard_zip_and_the_way_back(official, tmp_path):
    assert main(["eval", "export", str(official), "--format", "leaderboard", "-o", str(tmp_path / "z")]) == 0
    zipped = tmp_path / "z" / "leaderboard.zip"
    first = zipped.read_bytes()
    main(["eval", "export", str(official), "--format", "leaderboard", "-o", str(tmp_path / "z")])
    assert zipped.read_bytes() == first
    assert zipfile.ZipFile(zipped).namelist() == ["temporal_flickering_eval_results.json"]
    assert main(["eval", "import", str(zipped), "-o", str(tmp_path / "back")]) == 0
    results = json.loads((tmp_path / "back" / "results.json").read_text())
    assert results["metrics"]["vbench.temporal_flickering"]["value"] == pytest.approx(
        0.9002340354171454, abs=1e-8
    )


def test_official_results_give_official_totals(tmp_path):
    case = SCORING["cal_final_score"]["memflow_issue7_like"]
    for name, value in case["input"].items():
        (tmp_path / f"{name}_eval_results.json").write_text(json.dumps({name: [value, []]}))
    from streamvid.evaluation.exchange import import_official

    scores = import_official([tmp_path], tmp_path / "run")["scores"]["vbench"]
    assert scores["total"]["value"] == pytest.approx(case["output"]["total score"], abs=1e-12)
    (tmp_path / "bad_eval_results.json").write_text('{"colour": [1, []]}')
    with pytest.raises(UserError, match="no dimension"):
        import_official([tmp_path], tmp_path / "run")


def test_names_of_the_suite_come_back():
    """Every prompt of VBench is a file name that its own parser reads back as the prompt."""
    prompts = {job.video.prompt for job in jobs(load_protocol("vbench_5s"), Path("."))}
    assert len(prompts) == 944
    for prompt in prompts:
        assert name_problem(prompt) is None and name_problem(prompt, long=True) is None
        assert {prompt_of_name(f"{prompt}-{i}.mp4") for i in (0, 4, 24)} == {prompt}


@pytest.mark.skipif("VBENCH_CHECKOUT" not in os.environ, reason="needs a checkout of VBench: VBENCH_CHECKOUT")
def test_the_official_script_reads_the_zip(tmp_path):
    """scripts/cal_final_score.py needs nothing but Python; what it prints is what we say."""
    case = SCORING["cal_final_score"]["memflow_issue7_like"]
    for name, value in case["input"].items():
        (tmp_path / f"{name}_eval_results.json").write_text(json.dumps({name: [value, []]}))
    main(["eval", "import", str(tmp_path), "-o", str(tmp_path / "run")])
    main(["eval", "export", str(tmp_path / "run"), "--format", "leaderboard", "-o", str(tmp_path / "z")])
    script = Path(os.environ["VBENCH_CHECKOUT"]) / "scripts" / "cal_final_score.py"
    command = [
        sys.executable,
        str(script),
        "--zip_file",
        str(tmp_path / "z/leaderboard.zip"),
        "--model_name",
        "m",
    ]
    shown = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert f"{case['output']['total score']:.6f}"[:8] in shown
