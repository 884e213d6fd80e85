"""Recorded runs of the references through the engine, and that the comparison can fail."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from streamvid.errors import UserError
from streamvid.parity import compare, format_report, main, run_case
from streamvid.parity_case import EXACT, LATENTS, Tolerance

GOLDEN = Path(__file__).parent / "golden"
CASES = sorted(folder.name for folder in GOLDEN.iterdir())


def changed(tmp_path: Path, name: str, change) -> Path:
    """A copy of a case with other settings: `change(settings)` edits them in place."""
    folder = tmp_path / name
    shutil.copytree(GOLDEN / name, folder, dirs_exist_ok=True)
    settings = json.loads((folder / "case.json").read_text())
    change(settings)
    (folder / "case.json").write_text(json.dumps(settings))
    return folder


def update(section: str, **values):
    return lambda settings: settings[section].update(values)


def variant(name: str, **values):
    return lambda settings: settings["variants"][name].update(values)


def failed(rows) -> list[str]:
    return [row.name for row in rows if not row.ok]


@pytest.mark.parametrize("name", CASES)
def test_recorded_case(name, capsys):
    assert main([GOLDEN / name]) == 0
    report = capsys.readouterr().out
    assert "all within tolerance" in report
    for tensor in load_file(GOLDEN / name / "outputs.safetensors"):
        assert f"  {tensor} " in report  # nothing recorded is left out


def test_all_cases_are_here():
    assert CASES == [
        "deep_forcing",
        "deep_forcing_ds",
        "deep_forcing_short_window",
        "dmd_loss",
        "longlive_infinite",
        "longlive_recache_global_sink",
        "longlive_recache_no_global_sink",
        "longlive_sink",
        "reward_forcing",
        "rolling_forcing",
        "scheduler",
        "self_forcing",
        "vae_stream",
        "wan_bidirectional",
    ]


# --- the comparison can fail ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("longlive_sink", update("streaming", sink_size=0)),
        ("longlive_sink", update("streaming", sink_size=2)),
        ("longlive_sink", update("streaming", sink_size=6)),
        ("longlive_sink", update("streaming", local_attn_size=9)),
        ("longlive_sink", update("streaming", context_noise=50.0)),
        ("longlive_sink", update("schedule", timestep_shift=8.0)),
        ("longlive_sink", update("schedule", denoising_step_list=[1000, 800, 500, 250])),
        ("longlive_sink", update("schedule", denoising_step_list=[1000, 750, 500])),
        ("longlive_sink", update("schedule", warp=False)),
        ("longlive_sink", update("schedule", sigma_min=0.1)),
        ("longlive_sink", update("schedule", extra_one_step=False)),
        ("longlive_sink", update("cache", k_stored_after_rope=False)),
        ("self_forcing", update("streaming", local_attn_size=12)),
        ("self_forcing", update("model", eps=1e-2)),
        ("vae_stream", update("config", latents_mean=[0.0] * 16)),
        ("vae_stream", update("config", latents_std=[1.0] * 16)),
        ("scheduler", update("config", shifts=[5.0, 7.0])),
        ("scheduler", update("config", extra_one_step=False)),
        ("scheduler", update("config", sigma_min=0.01)),
        ("scheduler", update("denoising_lists", two_step=[1000, 600])),
        ("wan_bidirectional", update("model", eps=1e-2)),
        ("dmd_loss", variant("dmd", real_guidance_scale=2.9)),
        ("dmd_loss", variant("dmd", timestep_shift=4.9)),
        ("dmd_loss", variant("dmd_unshifted", min_step=979)),
        ("dmd_loss", variant("dmd", max_step=700)),
        ("dmd_loss", variant("dmd", generator_timestep_shift=8.0)),
        ("dmd_loss", variant("dmd_fake_cfg", fake_guidance_scale=1.4)),
        ("dmd_loss", variant("redmd", beta=1.9)),
        ("dmd_loss", variant("critic", score_models_timestep_shift=5.0)),
    ],
)
def test_another_setting_is_out_of_tolerance(tmp_path, name, change, capsys):
    folder = changed(tmp_path, name, change)
    assert main([folder]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_a_wider_window_is_out_of_tolerance(tmp_path):
    """Nothing the old window attended is missing, but more is attended; the recorded cache then holds other frames."""

    def widen(settings):
        settings["streaming"].update(local_attn_size=15, cache_capacity_frames=15)
        settings["cache"]["frames_in_slots"] = [0, 1, 2, *range(24, 36)]

    names = failed(run_case(changed(tmp_path, "longlive_sink", widen)))
    assert {"latents", "cache/0/k", "x0/4/0"} <= set(names)
    assert "x0/3/3" not in names  # the window was not full before block 4


def test_shorter_blocks_are_out_of_tolerance(tmp_path):
    """Blocks of one frame: the noise of the recorded blocks does not fit, and the case says so."""
    folder = changed(tmp_path, "self_forcing", update("streaming", frames_per_block=1, blocks=21))
    with pytest.raises(UserError, match=r"do not fit each other|has no renoise"):
        run_case(folder)


@pytest.mark.parametrize("case", ["longlive_sink", "wan_bidirectional", "vae_stream"])
def test_another_weight_is_out_of_tolerance(tmp_path, case):
    folder = changed(tmp_path, case, lambda settings: None)
    weights = load_file(folder / "weights.safetensors")
    name = next(name for name in weights if name.endswith(("blocks.1.ffn.0.bias", "decoder.conv1.bias")))
    weights[name] = weights[name] + 1e-3
    save_file(weights, folder / "weights.safetensors")
    assert failed(run_case(folder))


def test_buffer_larger_than_the_window(tmp_path):
    """What is attended follows from the window; of a larger recorded buffer the frames of the window are compared."""

    def enlarge(settings):
        settings["streaming"]["cache_capacity_frames"] = 13
        settings["cache"]["frames_in_slots"].insert(3, 26)

    folder = changed(tmp_path, "longlive_sink", enlarge)
    outputs = load_file(folder / "outputs.safetensors")
    for name in list(outputs):
        if name.startswith("cache/"):
            frames = outputs[name].unflatten(1, (12, -1))
            outputs[name] = torch.cat([frames[:, :3], frames[:, :1] * 0, frames[:, 3:]], 1).flatten(1, 2)
    save_file(outputs, folder / "outputs.safetensors")
    rows = run_case(folder)
    assert not failed(rows)
    assert "cache/0/k (12 of 13 frames)" in [row.name for row in rows]


def test_a_span_beyond_the_buffer(tmp_path):
    """All of a buffer that is shorter than the span is attended."""
    assert not failed(run_case(changed(tmp_path, "longlive_sink", update("streaming", local_attn_size=15))))


def test_what_bounded_the_draw_of_a_timestep_does_not_matter(tmp_path):
    """What was drawn is recorded."""
    for name, value in (("ts_schedule", True), ("min_score_timestep", 20)):
        assert not failed(run_case(changed(tmp_path, "dmd_loss", variant("dmd", **{name: value}))))


def test_a_batch(tmp_path):
    """Two videos at once, each with its own prompt length; the second is the first again."""

    def double(settings):
        settings["latent"]["B"] = 2
        settings["prompts"]["valid_rows"] = [[6, 6]]

    folder = changed(tmp_path, "self_forcing", double)
    for file in ("inputs", "outputs"):
        path = folder / f"{file}.safetensors"
        save_file({name: torch.cat([t, t]) for name, t in load_file(path).items()}, path)
    assert not failed(run_case(folder))


def test_a_level_of_noise_in_the_context_pass_is_an_option(tmp_path):
    """`context_noise` reaches the context pass and nothing before it."""
    names = failed(run_case(changed(tmp_path, "self_forcing", update("streaming", context_noise=20.0))))
    assert "x0/0/3" not in names and "x0/1/0" in names


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("longlive_sink", update("streaming", sinks=3), "streaming.sinks = 3 is not known"),
        ("longlive_sink", update("streaming", cache_capacity_frames=15), "frames_in_slots has 12 frames"),
        ("longlive_sink", update("streaming", blocks=11), "do not match the noise"),
        (
            "longlive_sink",
            update("streaming", sink_size=11, frames_per_block=12, blocks=3),
            "window = 12 cannot hold",
        ),
        ("longlive_sink", update("streaming", context_noise="a"), "context_timestep = 'a' must be a number"),
        (
            "self_forcing",
            update("streaming", cache_capacity_frames=18),
            "local_attn_size = -1 evicts nothing",
        ),
        ("longlive_sink", update("schedule", solver="unipc"), "schedule.solver = 'unipc' is not known"),
        ("longlive_sink", update("model", qk_norm=False), "a transformer other than qk_norm = True"),
        ("longlive_sink", update("model", model_type="i2v"), "a transformer other than model_type = 't2v'"),
        ("longlive_sink", update("model", num_heads=4), "model.dim is not num_heads x head_dim"),
        ("longlive_sink", update("model", num_layers=3), "27 tensors missing"),
        ("longlive_sink", update("model", rope_complex_pairs_t_h_w=[2, 3, 3]), "another split of the rotary"),
        ("longlive_sink", update("model", window_size=4), "model.window_size = 4 is not known"),
        ("longlive_sink", update("prompts", segments=2), "prompts.segments is 2, and the switches give 1"),
        (
            "longlive_sink",
            update("prompts", valid_rows=[5]),
            "with \\[5\\] rows of text and is .* with \\[7\\]",
        ),
        ("longlive_sink", update("latent", B=2), "do not match the noise"),
        ("longlive_sink", update("latent", tokens_per_frame=8), "tokens_per_frame does not follow"),
        ("longlive_sink", lambda s: s.pop("schedule"), "has no section schedule"),
        ("longlive_sink", lambda s: s["streaming"].pop("sink_size"), "streaming.sink_size is not there"),
        ("longlive_sink", lambda s: s.pop("streaming"), "describes no kind of case"),
        ("wan_bidirectional", lambda s: s.update(timesteps=[1.0, 2.0]), "timesteps do not match"),
        ("vae_stream", update("config", attn_scales=[1.0]), "does not fit the recorded VAE"),
        ("vae_stream", update("config", is_residual=True), "config.is_residual = True is not known"),
        ("scheduler", update("config", num_inference_steps=50), "cannot be replayed"),
        ("dmd_loss", variant("critic", denoising_loss_type="x0"), "another loss than flow"),
        ("dmd_loss", variant("dmd", gamma=1.0), "variants.dmd.gamma is not known"),
        ("dmd_loss", update("latent", F=5), "latent does not match generator_x0"),
    ],
)
def test_impossible_settings_are_refused(tmp_path, name, change, message, capsys):
    folder = changed(tmp_path, name, change)
    with pytest.raises(UserError, match=message) as raised:
        run_case(folder)
    assert "\n" not in str(raised.value)
    assert main([folder]) == 2
    assert str(folder) in capsys.readouterr().err


def test_malformed_folders(tmp_path, capsys):
    def refusal(folder: Path) -> str:
        assert main([folder]) == 2
        return capsys.readouterr().err

    assert "is no recorded case" in refusal(tmp_path / "absent")
    folder = changed(tmp_path, "self_forcing", lambda s: None)
    whole = load_file(folder / "inputs.safetensors")
    save_file({name: t for name, t in whole.items() if name != "renoise/3/1"}, folder / "inputs.safetensors")
    assert "has no renoise/3/1" in refusal(folder)
    save_file(whole | {"renoise/3/1": whole["renoise/3/1"][:, :2]}, folder / "inputs.safetensors")
    assert "do not fit each other" in refusal(folder)
    (folder / "inputs.safetensors").write_bytes(b"\0" * 40)
    assert "not a safetensors file" in refusal(folder)
    (folder / "inputs.safetensors").unlink()
    assert "inputs.safetensors does not exist" in refusal(folder)
    (folder / "case.json").write_text("{")
    assert "cannot be read as JSON" in refusal(folder)


def test_unknown_recorded_tensors_are_refused(tmp_path):
    folder = changed(tmp_path, "wan_bidirectional", lambda s: None)
    outputs = load_file(folder / "outputs.safetensors")
    save_file(outputs | {"attention/0": torch.zeros(1)}, folder / "outputs.safetensors")
    with pytest.raises(UserError, match="recorded tensor attention/0"):
        run_case(folder)


def test_several_cases_give_the_worst_exit_code(tmp_path, capsys):
    wrong = changed(tmp_path / "1", "scheduler", update("config", shifts=[5.0, 7.0]))
    impossible = changed(tmp_path / "2", "scheduler", update("config", reverse=True))
    good = GOLDEN / "scheduler"
    assert main([good, good]) == 0
    assert main([wrong, good]) == 1
    assert main([impossible, wrong]) == 2  # and the others were run all the same
    assert "out of tolerance" in capsys.readouterr().out


# --- the measure ------------------------------------------------------------------------------------------------------


def test_compare():
    recorded = torch.tensor([100.0, 0.0, -3.0])
    assert compare("x", recorded.clone(), recorded, EXACT).ok
    assert compare("x", recorded + torch.tensor([0.005, 0, 0]), recorded, Tolerance(1e-4, 1e-4)).ok
    off = compare("x", recorded + torch.tensor([0, 0.005, 0]), recorded, Tolerance(1e-4, 1e-4))
    assert not off.ok and off.max_abs == pytest.approx(0.005) and off.rel_l2 == pytest.approx(5e-5, rel=0.01)
    assert not compare("x", recorded + torch.tensor([0.005, 0, 0]), recorded, LATENTS).ok  # relative L2
    for got in (None, recorded[:2], recorded * float("nan")):
        assert not compare("x", got, recorded, Tolerance(1.0)).ok
    report = format_report("title", [off])
    assert "FAILED" in report and "1 out of tolerance" in report and "0.0001 + 0.0001 rel" in report
