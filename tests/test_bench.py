"""The measuring command: what it writes down, and that every part and option counts. No number of seconds is judged."""

import json
from dataclasses import replace

import pytest
import torch

from streamvid import bench
from streamvid.cli import main
from streamvid.errors import UserError
from streamvid.transformer import CausalWanTransformer3DModel

FAST = [
    "bench",
    "--device",
    "cpu",
    "--dtype",
    "float32",
    "--size",
    "32x32",
    "--set",
    "window=6",
    "--blocks",
    "2",
]
RANDOM_WEIGHTS = [
    *FAST[:5],
    *["--wan", "1.3B", "--layers", "1", "--size", "32x32", "--decoder", "tiny", "--blocks", "2"],
]


def record(capsys, *arguments: str) -> dict:
    capsys.readouterr()
    assert main([*FAST, *arguments]) in (0, None)
    return json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict:
    """Everything but fresh processes, of the embedded model at a small size."""
    path = tmp_path_factory.mktemp("bench") / "deep" / "x.json"
    parts = ",".join(part for part in bench.PARTS if part != "first_frame")
    assert main([*FAST, "--parts", parts, "-o", str(path)]) in (0, None)
    return json.loads(path.read_text())


def test_what_is_written_down(whole):
    assert whole["command"] == (
        "streamvid bench --size 32x32 --dtype float32 --device cpu --set window=6 "
        "--parts denoise,decode,disk,prompt,roofline,scaling --blocks 2 --length 0"
    )
    assert whole["configuration"]["model"] == "diorama" and whole["configuration"]["options"]["window"] == 6
    assert whole["versions"]["torch"] == torch.__version__ and whole["machine"]["cores"] >= 1
    assert "at least 5" in whole["warm_up"] and whole["load_average_before"] >= 0
    assert len(whole["config_hash"]) == 12
    for part in ("denoise", "denoise_decode", "to_disk"):
        row = whole[part]
        assert row["fps"] > 0 and row["block_p50_ms"] <= row["block_p95_ms"]
        assert row["fps"] == pytest.approx(16 * row["real_time_factor"], rel=0.05, abs=0.2)
    assert whole["denoise"]["stage_shares"].keys() >= {"denoise", "context"}
    assert whole["prompt_to_pixel"]["prompts"] == len(bench.NEXT_PROMPTS)
    assert not whole["prompt_to_pixel"]["encoded_before"]


def test_the_roofline_is_counted_products_over_measured_seconds(whole):
    roof = whole["roofline"]
    row = roof["denoise"]
    achieved = row["gflop_per_block"] / row["seconds_per_block"]
    assert row["share_of_products"] == pytest.approx(achieved / roof["product_gflops"], rel=0.02, abs=1e-3)
    assert row["seconds_per_block"] == pytest.approx(whole["denoise"]["block_p50_ms"] / 1000, rel=1e-3)


def test_the_prediction_stands_beside_the_measurement(whole):
    plan = whole["plan"]
    assert plan["memory_ratio"] == pytest.approx(
        whole["peak_memory_mb"] / plan["predicted"]["peak_memory_mb"], abs=1e-3
    )
    assert plan["fps_ratio"] == pytest.approx(
        whole["denoise_decode"]["fps"] / plan["predicted"]["fps"], abs=2e-3
    )


def test_scaling_goes_along_every_axis(whole):
    scaling = whole["scaling"]
    assert set(scaling) == {"window", "sink", "size", "batch"}
    caches = {axis: [row["cache_mb"] for row in rows.values()] for axis, rows in scaling.items()}
    assert (
        caches["window"] == sorted(caches["window"])
        and len(set(caches["window"])) == len(caches["window"]) >= 2
    )
    assert caches["batch"][1] == pytest.approx(2 * caches["batch"][0], abs=0.02)
    assert caches["size"][-1] > caches["size"][0]


def test_parts_and_options_count(capsys):
    one = record(capsys, "--parts", "denoise")
    assert {"denoise", "peak_memory_mb", "plan"} <= set(one)
    assert not {
        "denoise_decode",
        "to_disk",
        "prompt_to_pixel",
        "roofline",
        "scaling",
        "first_frame",
        "long_stream",
    } & set(one)
    other = record(capsys, "--parts", "denoise", "--batch", "2")
    assert other["config_hash"] != one["config_hash"] and "--batch 2" in other["command"]


def test_random_weights_of_published_shapes(capsys):
    assert main([*RANDOM_WEIGHTS, "--parts", "denoise,decode"]) in (0, None)
    found = json.loads(capsys.readouterr().out)
    assert found["configuration"]["model"] == "Wan2.1 1.3B with 1 layers"
    assert "first_frame" not in found and found["denoise_decode"]["fps"] > 0


def test_a_fresh_process_tells_the_time_to_the_first_frame(monkeypatch):
    called = []

    class Done:
        stdout = "note\n0.25 3.5\n"

    monkeypatch.setattr(bench.subprocess, "run", lambda command, **options: called.append(command) or Done)
    subject = subject_of_diorama()
    assert bench.first_frame(subject, runs=3) == {"after_load_s": 0.25, "from_process_start_s": 3.5}
    assert len(called) == 3 and all("compiled=False" in command[-1] for command in called)
    bench.first_frame(replace(subject, compiled=True), runs=1)
    assert "compiled=True" in called[-1][-1]
    compile(called[0][-1], "first frame", "exec")
    assert "'diorama', 'cpu', 'float32', 'exact', 'native'" in called[0][-1]


def test_compiled_blocks_are_asked_for(capsys, monkeypatch):
    """Of a model and of random weights; and a record of them is another configuration's."""
    asked = []
    monkeypatch.setattr(
        CausalWanTransformer3DModel, "compile_repeated_blocks", lambda self: asked.append(len(self.blocks))
    )
    plain, compiled = (record(capsys, "--parts", "denoise", *more) for more in ((), ("--compile",)))
    assert asked == [6] and "--compile" in compiled["command"]
    assert plain["config_hash"] != compiled["config_hash"]
    assert main([*RANDOM_WEIGHTS, "--parts", "denoise", "--compile"]) in (0, None)
    assert asked == [6, 1]


def subject_of_diorama() -> bench.Subject:
    from streamvid.costs import Configuration
    from streamvid.methods import load_method
    from streamvid.specs import model_spec

    configuration = Configuration(model_spec("diorama"), load_method("longlive"), 32, 32, dtype=torch.float32)
    return bench.Subject(configuration, torch.device("cpu"), lambda: None, "diorama")


class Slowing:
    """A stream whose blocks take longer from the 300th on and keep memory from the 200th on, by a clock of its own."""

    def __init__(self, clock: dict[str, float]):
        self.clock, self.block = clock, 0

    def __next__(self):
        self.block += 1
        self.clock["now"] += 0.2 if self.block > 300 else 0.1
        self.clock["held"] += self.block > 200


def test_a_long_stream_is_compared_with_its_beginning(monkeypatch):
    clock = {"now": 0.0, "held": 100e6}
    monkeypatch.setattr(bench.time, "perf_counter", lambda: clock["now"])
    monkeypatch.setattr(bench, "resident", lambda: clock["held"] * (1 if clock["held"] < 100000100 else 3))
    streams: list[Slowing] = []

    def stream(*arguments, **options):
        streams.append(Slowing(clock))
        return streams[-1]

    monkeypatch.setattr(bench.Subject, "stream", stream)
    found = bench.long_stream(subject_of_diorama(), None, 700)
    assert [made.block for made in streams] == [700, 250]
    assert found["time_ratio"] == pytest.approx(2.0) and found["memory_ratio"] == 3.0
    assert found["blocks"] == 700


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ("--parts denoise,dance", ["parts = 'dance'", "first_frame, denoise"]),
        ("--blocks 1", ["blocks = 1", "at least 2"]),
        ("--length 100", ["length = 100", "450"]),
        ("--device h100", ["device = 'h100'", "give cpu"]),
        ("--output /proc/x/y.json", ["output '/proc/x/y.json'"]),
    ],
)
def test_bad_options(arguments, parts, capsys, monkeypatch):
    monkeypatch.setattr(
        "streamvid.models.load_pipeline", lambda *given: pytest.fail("loaded before it was told")
    )
    assert main([*FAST, *arguments.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("streamvid: ") and error.count("\n") == 1
    for part in parts:
        assert part in error


def test_the_hash_does_not_depend_on_order():
    assert (
        bench.config_hash({"a": 1, "b": 2})
        == bench.config_hash({"b": 2, "a": 1})
        != bench.config_hash({"a": 2, "b": 1})
    )


def test_a_window_is_full_before_anything_counts():
    subject = subject_of_diorama().configuration
    assert bench.warm_up(subject) == 5
    from dataclasses import replace

    assert bench.warm_up(replace(subject, method=subject.method.with_overrides({"window": 21}))) == 8


def test_unknown_parts_are_refused_by_the_library_too():
    with pytest.raises(UserError, match="parts = 'x'"):
        bench.bench(subject_of_diorama(), ["x"])
