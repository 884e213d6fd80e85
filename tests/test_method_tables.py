"""`streamvid methods`: tables and pictures of what methods attend, and the bytes of their keys and values."""

from itertools import pairwise
from pathlib import Path

import pytest
import tiny
import torch
from PIL import Image

from streamvid import method_picture
from streamvid.cli import main
from streamvid.errors import UserError
from streamvid.method_list import WAN, Shape, format_bytes, format_methods, model_shape
from streamvid.method_picture import COLOURS, EMPTY, layout, roles
from streamvid.method_tables import (
    MOST_FRAMES,
    attended_text,
    changes_text,
    enough_blocks,
    event_text,
    format_forwards,
    heading,
    planned,
    positions_text,
    runs,
    switches_at,
    window_options,
)
from streamvid.methods import Method, load_method, method_names

DEEP = {"window": 9, "sink": 3, "positions": "sink_before_window", "budget": 7, "recent": 3}


def texts(forward) -> tuple[str, str, str]:
    """Frames, attended frames and positions as the table prints them."""
    return runs(forward.plan.frames), attended_text(forward.plan), positions_text(forward.plan)


def test_what_a_released_sink_does_while_it_fills_is_told():
    method = load_method("longlive", {"sink": 5, "sink_filling": "longlive_release"})
    told = [changes_text(forward) for forward in planned(method, 3)]
    assert told == ["attends 2 empty", "3-4 stay as in the first step", ""]


# --- what the releases were recorded to attend (algorithms, sections 3.1, 3.2, 3.5 and 4.1) --------------------------

LONGLIVE = {
    0: ("0-2", "0-2"),
    1: ("3-5", "0-5"),
    2: ("6-8", "0-8"),
    3: ("9-11", "0-11"),
    4: ("12-14", "0-2, 6-14"),
    7: ("21-23", "0-2, 15-23"),
}
# window: frames, positions and sources of the joint forward; frames and keys of the context pass
ROLLING = {
    4: ("0-14", "0-14", "0-14", "0-2", "0-2"),
    5: ("3-17", "0-17", "0-17", "3-5", "0-5"),
    9: ("15-29", "9-29", "0-2, 12-29", "15-17", "0-17"),
    10: ("18-32", "12-32", "0-2, 15-32", "18-20", "0-20"),
    11: ("21-35", "15-35", "0-2, 18-35", "21-23", "3-23"),
    17: ("39-41", "21-41", "0-2, 24-41", "39-41", "21-41"),
}
MULTISHOT = {
    4: ("32-39", "0-7, 16-39", "0-7, 16-39"),
    5: ("40-47", "0-7, 24-47", "0-7, 24-39, 48-55"),
    6: ("48-55", "0-7, 32-55", "0-7, 32-39, 48-63"),
    7: ("56-63", "0-7, 40-63", "0-7, 48-71"),
    9: ("72-79", "0-7, 40-47, 64-79", "0-7, 48-55, 72-87"),
    11: ("88-95", "0-7, 40-47, 80-95", "0-7, 48-55, 88-95, 104-111"),
    12: ("96-103", "0-7, 80-103", "0-7, 88-95, 104-119"),
}


@pytest.mark.parametrize("block", LONGLIVE)
def test_longlive_is_what_was_recorded(block):
    frames, keys = LONGLIVE[block]
    assert texts(planned(load_method("longlive"), 8)[block]) == (frames, keys, keys)
    assert texts(planned(load_method("longlive_infinite"), 8)[7]) == ("21-23", "0-2, 15-23", "0-11")


@pytest.mark.parametrize("window", ROLLING)
def test_rolling_forcing_is_what_was_recorded(window):
    forwards = planned(load_method("rolling_forcing_release"), 14)
    (joint,) = [n for n, f in enumerate(forwards) if f.kind == "window" and f.number == window]
    frames, positions, sources, context_frames, context_keys = ROLLING[window]
    assert texts(forwards[joint]) == (frames, sources, positions)
    assert forwards[joint + 1].kind == "context"
    assert texts(forwards[joint + 1]) == (context_frames, context_keys, context_keys)


def test_our_rolling_forcing_shows_the_context_pass_what_denoising_saw():
    forwards = planned(load_method("rolling_forcing"), 14)
    for joint, context in pairwise(forwards):
        if context.kind == "context":
            past = joint.plan.window[: len(joint.plan.window) - len(joint.plan.own)]
            assert context.plan.window[: len(past)] == past and len(context.plan.window) == len(past) + 3


@pytest.mark.parametrize("block", MULTISHOT)
def test_longlive_2_is_what_was_recorded(block):
    forwards = planned(load_method("longlive2_multishot"), 13, {5: "shot", 11: "shot"})
    assert texts(forwards[block]) == MULTISHOT[block]
    assert forwards[block].event == ("shot" if block in (5, 11) else "")
    assert runs(forwards[9].pinned) == "40-47" and changes_text(forwards[9]).endswith("40-47 pinned")


def test_recache_is_what_was_recorded():
    method = load_method("longlive")
    keep = planned(method, 9, {8: "recache(bidirectional, keep_once_full)"})
    assert texts(keep[8]) == ("15-23", "0-2, 15-23", "0-2, 15-23") and keep[8].kind == "replay"
    anew = planned(method, 9, {8: "recache(bidirectional, reanchor)"})
    assert texts(anew[8]) == ("12-23", "12-23", "12-23") and event_text(anew[8]).endswith("forgets 0-2")
    assert texts(anew[9])[1] == "12-14, 18-26"


def test_what_is_seen_before_rotation_has_no_position():
    """The rest of the sink in the window of the released context pass, where the cache is shorter than sink and window."""
    method = load_method("rolling_forcing_release", {"cache_frames": 23})
    last = planned(method, 20)[-1]
    assert last.kind == "context" and texts(last)[1:] == ("2, 40-59", "none, 40-59")


# --- the same as streams --------------------------------------------------------------------------------------------

SMALL = {
    "static": {},
    "relative": {"positions": "cache_relative"},
    "averaged": {"sink_update": "ema", "positions": "cache_relative"},
    "compressed": DEEP,
    "rolling": {"sampler": "rolling", "positions": "sink_before_window"},
    "rolling as released": {
        "sampler": "rolling",
        "positions": "sink_before_window",
        "context_window": "release",
    },
    "rolling, unrotated": {
        "sampler": "rolling",
        "positions": "sink_before_window",
        "context_window": "release",
        "cache_frames": 10,
    },
    "pinned": {"window": 12, "shot_offset": 3, "pin_shots": True},
}


@pytest.mark.parametrize("policy", ["cut", "shot", "flush", "recache", "recache(bidirectional, reanchor)"])
@pytest.mark.parametrize("name", SMALL)
def test_a_stream_plans_the_same(name, policy, monkeypatch):
    """Every `begin` of a real stream's cache is a row, in order."""
    method, begun = Method(**{"window": 9, **SMALL[name]}), []
    blocks, at = 9, 5
    cache = type(tiny.context_cache(window_options(method, 2)))
    begin = cache.begin
    monkeypatch.setattr(cache, "begin", lambda self, plan: (begun.append(plan), begin(self, plan)))
    stream = tiny.pipeline().stream(
        "a fox", method=method, blocks=blocks, decode_pixels=False, context_pass="separate"
    )
    for chunk in stream:
        if chunk.index == at - 1:
            stream.prompt("a red cat", policy)
    assert [forward.plan for forward in planned(method, blocks, {at: policy}, levels=2)] == begun


# --- rows -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ([], ""),
        ([4], "4"),
        ([0, 1, 2, 15, 16], "0-2, 15-16"),
        ([3.0, 4.0, 9.0], "3-4, 9"),
        ([0.5, 1.5], "0.5-1.5"),
        ([2, 1], "2, 1"),
        ([1234567, 1234568], "1234567-1234568"),
    ],
)
def test_runs(numbers, text):
    assert runs(numbers) == text


def test_compression_is_told():
    forwards = planned(load_method("deep_forcing"), 10)
    assert texts(forwards[7]) == ("21-23", "0-9, top 2 frames, 20-23", "8-17, theirs, 20-23")
    assert [changes_text(forward) for forward in forwards[6:]] == [
        "",
        "compresses 10-19 to top 2 frames",
        "",
        "compresses top 2 frames, 20-25 to top 2 frames",
    ]
    assert runs(forwards[9].sources) == "10-25"
    released = planned(load_method("deep_forcing_release"), 10)
    assert texts(released[7])[2] == "5-14, theirs, 20-23"  # the gap of the release


def test_what_is_forgotten_is_no_source_of_tokens_any_more():
    forwards = planned(load_method("deep_forcing"), 14, {10: "flush"})
    assert texts(forwards[10])[1] == "0-9, 29-32" and forwards[10].sources == ()
    assert event_text(forwards[10]) == "flush: forgets 26-28" and not event_text(forwards[11])
    assert runs(forwards[13].sources) == "29-37"


def test_averages_are_told():
    reward = load_method("reward_forcing")
    forward = planned(reward, 4)[3]
    assert forward.fused == ((3, 0), (4, 1), (5, 2))
    assert changes_text(forward) == "averages 3-5 into 0-2"
    released = reward.with_overrides({"sink": 2, "sink_update": "ema_release"})
    assert changes_text(planned(released, 4)[3]) == "evicts 2-4, overwriting 0-1"


def test_a_cut_forgets_everything():
    forwards = planned(load_method("longlive"), 8, {6: "cut"})
    assert event_text(forwards[6]) == "cut: forgets 0-2, 9-17"
    assert texts(forwards[6]) == ("18-20", "18-20", "0-2")
    lines = format_forwards(forwards).splitlines()
    assert lines[7] == "-- cut: forgets 0-2, 9-17" and lines[8].split() == ["6", "18-20", "18-20", "0-2"]
    assert lines[0].split() == ["block", "frames", "attends", "seen", "at"]


def test_rows_of_joint_blocks():
    lines = format_forwards(planned(load_method("rolling_forcing"), 14)).splitlines()
    assert lines[0].startswith("forward") and lines[5].split()[:3] == ["window", "4", "0-14"]
    assert lines[6].split() == ["context", "0-2", "0-2", "0-2"]
    assert len(lines) == 1 + 18 + 14  # windows, and a context pass per block
    assert sum("evicts" in line for line in lines) == 6


def test_the_default_length_shows_a_full_window():
    for name in method_names():
        method = load_method(name)
        options = window_options(method, 4)
        forwards = planned(method, enough_blocks(options, {}), levels=4)
        assert any(forward.plan.evicted for forward in forwards), name
        assert enough_blocks(options, {20: "cut"}) == enough_blocks(options, {}) + 20
        assert name in heading(method) and str(options.window) in heading(method)


@pytest.mark.parametrize(
    ("blocks", "switches", "message"),
    [
        (0, {}, "blocks = 0 must be between 1 and 1000"),
        (5000, {}, "blocks = 5000 must be between 1 and 1000"),
        (9, {0: "cut"}, "cut at block 0 is not possible: give a block between 1 and 999"),
        (9, {-1: "cut"}, "cut at block -1 is not possible"),
        (9, {9: "shot"}, "shot at block 9 is after the end: give --blocks of at least 10"),
        (9, {4: "fade"}, "transition = 'fade' is not known"),
    ],
)
def test_impossible_numbers_are_refused(blocks, switches, message):
    with pytest.raises(UserError, match=message):
        planned(load_method("longlive"), blocks, switches)


def test_endless_windows_are_refused():
    with pytest.raises(UserError, match=f"too many for a table: give at most {MOST_FRAMES} frames"):
        planned(Method(window=10**9), 9)
    with pytest.raises(UserError, match="block 4 has two switches, cut and shot: give one of them"):
        switches_at([4], [4])
    assert switches_at([4, 4], [6], {8: "flush"}) == {4: "cut", 6: "shot", 8: "flush"}


# --- bytes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "frames", "told"),
    [
        ("1.3B", 9, "2.59 GB"),
        ("1.3B", 12, "3.45 GB"),
        ("1.3B", 21, "6.04 GB"),
        ("1.3B", 33, "9.49 GB"),
        ("14B", 6, "7.67 GB"),
        ("14B", 21, "26.8 GB"),
        ("5B", 32, "10.4 GB"),
    ],
)
def test_bytes_of_published_models(size, frames, told):
    assert format_bytes(frames * WAN[size].frame_bytes) == told  # algorithms, section 2.3


@pytest.mark.parametrize("name", SMALL)
def test_cache_bytes_are_those_of_a_stream(name):
    method = Method(**{"window": 9, **SMALL[name]})
    stream = tiny.pipeline().stream("a fox", method=method)
    shape = Shape("tiny", 2, 2, 12, tiny.GRID, torch.float32, levels=2)
    assert shape.cache_bytes(method) == stream.cache.bytes
    assert stream.cache.bytes >= method.window * shape.frame_bytes
    if name == "static":
        assert stream.cache.bytes == 9 * shape.frame_bytes


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (999_900, "1 MB"), (2.5e12, "2.5 TB")]
)
def test_bytes_as_text(number, text):
    assert format_bytes(number) == text


def test_the_shape_of_a_model_folder_is_that_of_its_pipeline(tmp_path):
    pipe = tiny.pipeline()
    pipe.save_pretrained(tmp_path)
    shape = model_shape(str(tmp_path))
    assert shape.grid == pipe.transformer.token_grid(*pipe.latent_size(None, None))
    assert (shape.layers, shape.heads, shape.head_dim, shape.levels) == (2, 2, 12, 2)
    (tmp_path / "vae" / "config.json").write_text("{}")
    with pytest.raises(
        UserError, match=r"configurations that cannot be read \(KeyError.*`streamvid convert`"
    ):
        model_shape(str(tmp_path))


def test_all_presets_are_listed():
    text = format_methods(WAN["1.3B"])
    lines = text.splitlines()
    for name in method_names():
        method = load_method(name)
        row, source = (line for line in lines if line.split()[:1] == [name])
        assert source.endswith(method.source)
        for part in (
            method.sampler,
            method.positions,
            method.transition,
            f"{method.window} = {method.sink} + ",
        ):
            assert part in row
    rows = {line.split()[0]: " ".join(line.split()) for line in lines if line}
    told = format_methods(WAN["1.3B"]).split("\n\n")[0]
    assert "21 = 3 + 3 + 15" in told and "5 x 3" in told and "16 = 10 + 2 + 4" in told
    assert "2.59 GB" in told and "3.45 GB" in told and "6.04 GB" in told
    assert rows["for"].startswith("for Wan2.1 1.3B at 480x832: 30 layers, width 1536, 1560 tokens")


def test_streamingllm_is_a_composition():
    forward = planned(load_method("streamingllm"), 9)[8]
    assert texts(forward) == ("24-26", "0-2, 9-26", "0-20")
    assert load_method("streamingllm").transition == "cross_only"


# --- pictures -------------------------------------------------------------------------------------------------------


def colour_of(picture: Image.Image, grid, row: int, frame: int):
    """Of a cell, in its corner, where no number is."""
    left, top, _, _ = grid.box(row, frame)
    return picture.getpixel((left + 1, top + 1))


def check_picture(method: Method, blocks: int, expected: dict[tuple[int, int], str], switches=None):
    forwards = planned(method, blocks, switches)
    picture, grid = method_picture.draw(forwards, heading(method)), layout(forwards)
    for row, forward in enumerate(forwards):
        parts = roles(forward)
        for frame in range(grid.frames):
            part = parts.get(frame)
            assert colour_of(picture, grid, row, frame) == (COLOURS[part] if part else EMPTY), (row, frame)
    for (row, frame), part in expected.items():
        assert roles(forwards[row]).get(frame) == (part or None), (row, frame)


def test_the_picture_of_longlive():
    expected = {
        (0, 0): "current block",
        (4, 0): "sink",
        (4, 3): "evicted",
        (4, 6): "recent",
        (4, 14): "current block",
        (4, 15): "",
        (5, 3): "",
    }
    check_picture(load_method("longlive"), 6, expected)


def test_pictures_of_compression_pins_cuts_and_joint_blocks():
    check_picture(
        load_method("deep_forcing"), 10, {(7, 9): "sink", (7, 10): "compressed", (9, 25): "compressed"}
    )
    multishot = load_method("longlive2_multishot")
    check_picture(multishot, 10, {(9, 40): "pinned", (9, 48): "", (9, 64): "recent"}, {5: "shot"})
    check_picture(load_method("longlive"), 6, {(5, 0): "evicted", (5, 15): "current block"}, {5: "cut"})
    rolling = {(10, 3): "in the cache, not attended", (11, 3): "recent", (11, 12): ""}
    check_picture(load_method("rolling_forcing_release"), 9, rolling)


def test_a_long_stream_has_narrow_cells_and_too_long_a_one_is_refused():
    forwards = planned(load_method("longlive"), 300)
    assert layout(forwards).cell == method_picture.SMALLEST_CELL
    assert layout(forwards).size[0] < 4000
    with pytest.raises(
        UserError, match="3000 latent frames and 1000 forwards is too large: give fewer --blocks"
    ):
        layout(planned(load_method("longlive"), 1000))


def test_numbers_are_drawn_where_they_fit():
    """Ink on a wide cell, on a run of narrow ones, and none where a run is too short."""
    for blocks, size, inked in ((4, 3, True), (20, 8, True), (200, 3, False)):
        method = Method(frames_per_block=size, window=4 * size, sink=size)
        forwards = planned(method, blocks)
        grid = layout(forwards)
        left, top, _, bottom = grid.box(1, 0)
        picture = method_picture.draw(forwards, heading(method))
        cells = picture.crop((left, top, left + size * grid.cell - 1, bottom + 1))
        colours = {colour for _, colour in cells.getcolors(10**6)} - {COLOURS["sink"]}
        assert bool(colours & {method_picture.ON_DARK}) == inked, blocks


# --- the command line -----------------------------------------------------------------------------------------------


@pytest.fixture
def refused(capsys):
    """Runs the command line and returns the one sentence that a mistake costs."""

    def run(*arguments) -> str:
        assert main(["methods", *map(str, arguments)]) == 2
        output = capsys.readouterr()
        assert output.out == "" and output.err.count("\n") == 1 and output.err.startswith("streamvid: ")
        return output.err

    return run


def test_the_list(tmp_path, capsys, monkeypatch):
    tiny.pipeline().save_pretrained(tmp_path)
    monkeypatch.setattr("streamvid.models.embedded_models", lambda: {"diorama": tmp_path})
    assert main(["methods"]) == 0
    told = capsys.readouterr().out
    assert "for diorama at 32x32: 2 layers, width 24, 4 tokens" in told and "longlive" in told
    assert main(["methods", "--model", str(tmp_path)]) == 0
    assert f"for {tmp_path} at 32x32" in capsys.readouterr().out
    assert main(["methods", "--wan", "14B"]) == 0
    assert "26.8 GB" in capsys.readouterr().out


def test_no_weights_are_read(tmp_path, capsys):
    tiny.pipeline().save_pretrained(tmp_path)
    for weights in tmp_path.rglob("*.safetensors"):
        weights.unlink()
    assert main(["methods", "--model", str(tmp_path)]) == 0
    assert main(["methods", "show", "longlive"]) == 0


def test_show(tmp_path, capsys):
    picture = tmp_path / "new" / "longlive.png"
    command = ["methods", "show", "longlive", "--blocks", "12", "--set", "window=9", "--cut", "4", "6"]
    assert main([*command, "--shot", "8", "--switch", "10", "--picture", str(picture)]) == 0
    told = capsys.readouterr().out
    assert told.startswith("longlive: LongLive") and "window 9 = 3 + 3 + 3" in told
    assert "-- cut: forgets 0-2, 6-11" in told and "-- shot" in told and "-- recache" in told
    assert f"wrote {picture}" in told
    assert Image.open(picture).format == "PNG" and Image.open(picture).mode == "RGB"
    assert [path.name for path in picture.parent.iterdir()] == ["longlive.png"]


def test_show_asks_the_model_for_levels_where_the_method_names_none(tmp_path, capsys):
    tiny.pipeline().save_pretrained(tmp_path)  # of two levels
    command = ["show", "longlive", "--set", "sampler=rolling", "--set", "window=21"]
    for arguments in (["--model", str(tmp_path), *command], [*command, "--model", str(tmp_path)]):
        assert main(["methods", *arguments]) == 0
        assert "2 jointly denoised blocks of 3" in capsys.readouterr().out
    assert main(["methods", *command, "--wan", "1.3B"]) == 0
    assert "4 jointly denoised blocks of 3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["show", "longlife"], ["method = 'longlife' is not known", "did you mean longlive?"]),
        (["show", "longlive", "--set", "windw=9"], ["option windw", "did you mean window?"]),
        (["show", "longlive", "--set", "window=1"], ["window = 1 cannot hold sink = 3", "at least 6"]),
        (["show", "longlive", "--set", "window"], ["OPTION=VALUE"]),
        (["show", "longlive", "--blocks", "0"], ["blocks = 0 must be between 1 and 1000"]),
        (["show", "longlive", "--blocks", "many"], ["--blocks", "'many'", "methods show --help"]),
        (["show", "longlive", "--cut", "soon"], ["--cut", "'soon'"]),
        (["show", "longlive", "--cut", "0"], ["cut at block 0 is not possible"]),
        (["show", "longlive", "--blocks", "4", "--shot", "4"], ["shot at block 4", "--blocks of at least 5"]),
        (["show", "longlive", "--cut", "4", "--shot", "4"], ["two switches, cut and shot"]),
        (["show", "longlive", "--picture", "table.jpg"], ["'table.jpg'", "ends in .png"]),
        (["shw"], ["'shw'", "show"]),
        (["--wan", "2B"], ["--wan", "'2B'", "1.3B"]),
        (["--wan", "14B", "--model", "diorama"], ["--model", "not allowed with", "--wan"]),
        (["--model", "diorma"], ["model = 'diorma' is not known"]),
        (["--model", "owner/name"], ["not on this machine"]),
    ],
)
def test_mistakes_are_told_in_one_sentence(refused, arguments, parts):
    sentence = refused(*arguments)
    for part in parts:
        assert part in sentence


def test_a_picture_that_cannot_be_written_is_told(refused, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("kept")
    assert "a file stands where a folder is needed" in refused(
        "show", "longlive", "--picture", tmp_path / "file" / "a.png"
    )
    (tmp_path / "folder.png").mkdir()
    assert "it is a folder" in refused("show", "longlive", "--picture", tmp_path / "folder.png")

    def full(self, file, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    assert "the disk is full" in refused("show", "longlive", "--picture", tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()


# --- the document ---------------------------------------------------------------------------------------------------

DOCS = Path(__file__).resolve().parents[1] / "docs"


@pytest.mark.parametrize("name", ["longlive", "deep_forcing"])
def test_the_document_shows_what_is(name):
    """Pictures cell by cell, as letters differ from one font library to the next; the table line by line."""
    method = load_method(name)
    forwards = planned(method, enough_blocks(window_options(method, 4), {}))
    grid, picture = layout(forwards), Image.open(DOCS / "pictures" / f"methods_{name}.png")
    for row, forward in enumerate(forwards):
        parts = roles(forward)
        for frame in range(grid.frames):
            part = parts.get(frame)
            assert colour_of(picture, grid, row, frame) == (COLOURS[part] if part else EMPTY)
    if name == "deep_forcing":
        text = (DOCS / "methods.md").read_text()
        assert all(line in text for line in format_forwards(forwards).splitlines()[7:11])


def test_the_document_names_every_preset():
    text = (DOCS / "methods.md").read_text()
    assert [name for name in method_names() if f"`{name}`" not in text] == []
