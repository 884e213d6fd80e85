"""Protocols: what ships, what their fields do, and a run that generates, measures and resumes."""

import json

import pytest

from streamvid.cli import main
from streamvid.errors import UserError
from streamvid.evaluation import evaluate as evaluation
from streamvid.evaluation.produce import Producer, own_device
from streamvid.evaluation.protocol import jobs, load_protocol, protocol_names, script_of, seed_of
from streamvid.evaluation.registry import all_metrics, resolve
from streamvid.script import load_script
from streamvid.timeline import timeline


@pytest.mark.parametrize("name", protocol_names())
def test_every_shipped_protocol_is_complete(name, tmp_path):
    protocol = load_protocol(name)
    assert protocol.name == name and protocol.about
    measured = [request.name for request in protocol.requests()]
    assert set(protocol.primary) <= set(measured)
    if protocol.suite.kind == "world" or protocol.suite.file:
        found = jobs(protocol, tmp_path)
        assert len({job.video.id for job in found}) == len(found) > 0
    else:
        with pytest.raises(UserError, match="--suite"):
            jobs(protocol, tmp_path)


def test_the_issue_asks_for_these():
    asked = (
        "smoke_cpu",
        "embedded",
        "vbench_5s",
        "vbench_long_30s",
        "longlive_interactive_60s",
        "rolling_200x30s",
    )
    asked += ("deepforcing_128x30", "deepforcing_128x60", "reward_128x60", "flex_30_60")
    assert set(asked) <= set(protocol_names())


def test_the_suite_of_vbench(tmp_path):
    found = jobs(load_protocol("vbench_5s"), tmp_path)
    assert len(found) == 946 * 5
    assert len({job.video.prompt for job in found}) == 944
    longest = load_protocol("vbench_5s", {"suite.dimensions": ["scene"], "generation.samples": 1})
    assert len(jobs(longest, tmp_path)) == 86


def test_seeds_do_not_depend_on_order_or_number(tmp_path):
    few = jobs(load_protocol("embedded", {"suite.count": 3}), tmp_path)
    many = jobs(load_protocol("embedded", {"suite.count": 6}), tmp_path)
    assert [job.video.to_dict() for job in few] == [job.video.to_dict() for job in many[:3]]
    assert few[0].prompts == many[0].prompts and few[0].prompts[-1] == few[0].prompts[0]
    assert len({seed_of(b, n, s) for b in (0, 1) for n in range(5) for s in range(3)}) == 30
    other = jobs(load_protocol("embedded", {"suite.count": 3, "generation.seed": 9}), tmp_path)
    assert other[0].video.seed != few[0].video.seed


def test_switches_in_latents_are_at_their_frames():
    generation = load_protocol("longlive_interactive_60s").generation
    script = load_script(script_of(tuple("abcdef"), generation, 16.0))
    assert [round(shot.start * 16) for shot in script.shots] == [0, 157, 317, 477, 637, 797]
    assert timeline(script, 16, 1).frames == 957
    equal = load_script(script_of(("a", "b"), load_protocol("smoke_cpu").generation, 16.0))
    assert [shot.start for shot in equal.shots] == [0, 2.5]


def test_generated_from_the_rewritten_line_and_scored_with_the_original(tmp_path):
    suite = tmp_path / "suite.jsonl"
    suite.write_text(json.dumps({"prompt": "a cat", "generate": "a small cat, studio light"}) + "\n")
    job = jobs(load_protocol("vbench_5s", {"generation.samples": 1}), tmp_path, str(suite))[0]
    assert job.prompts == ("a small cat, studio light",) and job.video.prompt == "a cat"
    lines = tmp_path / "suite.txt"
    lines.write_text("one\n\ntwo\n")
    assert [j.video.prompt for j in jobs(load_protocol("vde_60s"), tmp_path, str(lines))] == ["one", "two"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("name: x\nmetrics: [long.freeze]\ngeneration: {}", "latents or seconds"),
        ("name: x\nmetrics: [long.freez]\ngeneration: {seconds: 1}", "did you mean long.freeze"),
        ("name: x\nmetrics: [long.freeze]\ngeneration: {second: 1}", "generation.second is not known"),
        ("name: x\nmetrics: [long.freeze]\nsuite: {kind: w}\ngeneration: {seconds: 1}", "suite.kind"),
        ("name: x\nmetrics: [{name: drift.luma, definition: wrong}]\ngeneration: {seconds: 1}", "definition"),
        ("name: [", "mend the YAML"),
        ("- 1", "no mapping"),
    ],
)
def test_mistakes_are_one_sentence(text, problem, tmp_path):
    path = tmp_path / "p.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=problem):
        protocol = load_protocol(str(path))
        for request in protocol.requests():
            request.build(None)
    with pytest.raises(UserError, match="did you mean smoke_cpu"):
        load_protocol("smoke_gpu")


def test_patterns_choose_and_leave_out():
    assert [r.name for r in resolve(["drift.*", "!drift.imaging"])] == [
        n for n in all_metrics() if n.startswith("drift.") and n != "drift.imaging"
    ]
    assert resolve(["drift.luma", {"name": "drift.*", "definition": "slope"}])[0].options == {
        "definition": "slope"
    }


def test_a_protocol_runs_and_goes_on(tmp_path, monkeypatch, capsys):
    metrics = "[vbench.temporal_flickering, drift.luma, interactive.probe_adherence, timing.*]"
    (tmp_path / "tiny.yaml").write_text(
        "name: tiny\nsuite: {kind: world, count: 2, shots: 2}\ngeneration: {seconds: 3}\n"
        f"metrics: {metrics}\nprimary: [drift.luma]\ndeviations: [it is tiny]\n"
    )
    run = tmp_path / "run"
    arguments = ["eval", "run", str(tmp_path / "tiny.yaml"), "-o", str(run), "--quiet"]
    assert main([*arguments, "--limit", "1"]) == 0
    first = (run / "videos" / "p0000-0.mp4").stat().st_mtime_ns
    made, real = [], Producer._make
    monkeypatch.setattr(Producer, "_make", lambda self, job: made.append(job.video.id) or real(self, job))
    assert main(arguments) == 0
    assert made == ["p0001-0"] and (run / "videos" / "p0000-0.mp4").stat().st_mtime_ns == first
    results = json.loads((run / "results.json").read_text())
    assert results["videos"] == 2 and results["problems"] == []
    assert results["metrics"]["drift.luma"]["used"] == 2
    adherence = results["metrics"]["interactive.probe_adherence"]["per_video"]
    assert set(adherence) == {"p0000-0", "p0001-0"}
    videos = [json.loads(line) for line in (run / "manifest.jsonl").read_text().splitlines()]
    assert [len(v["segments"]) for v in videos] == [2, 2] and len(videos[0]["borders"]) >= 3
    timing = json.loads((run / "timing.json").read_text())["metrics"]
    assert timing["timing.first_chunk"]["value"] > 0 and timing["timing.prompt_to_pixel"]["used"] == 2
    assert timing["timing.peak_memory"]["value"] > 50
    assert "it is tiny" in (run / "report.html").read_text()
    with pytest.raises(UserError, match="another folder"):
        evaluation.run_protocol(
            load_protocol(str(tmp_path / "tiny.yaml")), run, method="self_forcing", quiet=True
        )
    assert main([*arguments, "--plan"]) == 0 and "2 videos" in capsys.readouterr().out


def test_every_process_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert own_device("auto") == "auto"  # one process alone: the pipeline chooses
    for rank, device in enumerate(("cuda:0", "cuda:1", "cuda:0")):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        assert own_device("auto") == device and own_device("cpu") == "cpu"
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert own_device("auto") == "auto"
