"""Random settings of every kind of recorded stream, through `streamvid parity` and through `tests/released.py`.

The restatement is first proved on the shipped recordings; then it records cases of its own, which the engine has to replay.
"""

import random
from pathlib import Path

import pytest
import torch
from recording import GRIDS, drawn_model, random_text, write_case
from released import Levels, Release, play, roll
from released_network import Network, random_weights
from safetensors.torch import load_file

from streamvid.cli import main
from streamvid.parity import run_case
from streamvid.parity_case import Case

GOLDEN = Path(__file__).parent / "golden"
KINDS = {
    "self_forcing": "self_forcing",
    "longlive_sink": "longlive",
    "longlive_recache_global_sink": "longlive",
    "longlive_recache_no_global_sink": "longlive",
    "longlive_infinite": "infinite",
    "reward_forcing": "reward",
    "deep_forcing_ds": "deep_sink",
    "deep_forcing_short_window": "deep_compression",
}


def release_of(kind: str, streaming: dict) -> Release:
    return Release(
        kind,
        streaming["frames_per_block"],
        streaming["local_attn_size"],
        streaming["sink_size"],
        streaming["cache_capacity_frames"],
        streaming.get("ema_decay", 0.999),
        streaming.get("budget_frames", 0),
        streaming.get("recent_frames", 0),
        streaming.get("score_fusion", "sum"),
        streaming.get("topc_max_reuse", 7),
        streaming.get("first_sink_rotation_literal", 21),
        streaming.get("global_sink", True),
        tuple(streaming.get("switch_frame_indices", ())),
        streaming["context_noise"],
    )


def replay(
    kind: str, streaming: dict, network: Network, inputs: dict, levels: Levels, grid
) -> tuple[dict, dict]:
    """What the restatement makes of a case."""
    if kind == "rolling":
        return roll(
            network,
            inputs,
            levels,
            grid,
            streaming["frames_per_block"],
            streaming["sink_frames"],
            streaming["attention_frames"],
            streaming["cache_frames"],
            streaming["context_noise"],
        )
    return play(release_of(kind, streaming), network, inputs, levels, grid)


@pytest.mark.parametrize("name", [*KINDS, "rolling_forcing"])
def test_the_restatement_is_the_recorded_release(name):
    case = Case(GOLDEN / name)
    streaming, latent = case.settings["streaming"], case.settings["latent"]
    levels = Levels(case.settings["schedule"]["denoising_step_list"])
    grid = (latent["H"] // 2, latent["W"] // 2)
    weights = {name.removeprefix("model."): t for name, t in case.tensors("weights").items()}
    network = Network(weights, case.settings["model"])
    got, _ = replay(KINDS.get(name, "rolling"), streaming, network, case.inputs, levels, grid)
    assert got.keys() == case.outputs.keys()
    for key, recorded in case.outputs.items():
        torch.testing.assert_close(got[key], recorded, atol=1e-4, rtol=1e-4)


# --- cases of our own -------------------------------------------------------------------------------------------------

STEPS = ([1000, 750, 500, 250], [1000, 500], [1000], [1000, 900, 400], [1000, 500, 0], [750, 300])
SCHEDULES = (  # warp, shift, end of the table, whether that is left out
    *[(True, 5.0, 0.0, True)] * 3,
    (False, 5.0, 0.0, True),
    (True, 8.0, 0.0, True),
    (True, 1.0, 0.0, True),
    (True, 3.0, 0.003, False),
)


def switches(draw: random.Random, blocks: int, block: int) -> list[int]:
    count = draw.randint(1, 3)
    frames = [draw.randint(0, blocks * block - 1) for _ in range(count)]
    return sorted(frames)


def drawn_settings(kind: str, draw: random.Random) -> dict:
    """A `streaming` section that the release can run."""
    if kind == "rolling":
        steps, block = draw.randint(2, 5), draw.randint(1, 4)
        blocks = draw.randint(steps, steps + 8)
        # a full window leaves room for some frames between it and the sink, or lacks room for the sink
        span = block * (steps + 1) + draw.choice([0, 0, block, 2 * block, draw.randint(-block, 3 * block)])
        capacity = draw.choice(
            [span + block, span + block, draw.randint(max(2 * block, span - block), span + 2 * block)]
        )
        return {
            "frames_per_block": block,
            "blocks": blocks,
            "context_noise": draw.choice([0.0, 0.0, 40.0]),
            "rolling_window_blocks": steps,
            "windows": blocks + steps - 1,
            "attention_frames": span,
            "cache_frames": capacity,
            "sink_frames": block,
        }
    block = draw.randint(1, 4)
    sink = draw.choice([0, 1, block, block + 1, 2 * block + 1])
    if kind == "reward":
        sink = max(sink, 1)
    window = sink + block + draw.randint(0, 7)
    blocks = draw.randint(1, 2 * (window // block) + 3)
    streaming = {
        "frames_per_block": block,
        "blocks": blocks,
        "context_noise": draw.choice([0.0, 0.0, 40.0]),
        "local_attn_size": window,
        "sink_size": sink,
        "cache_capacity_frames": window,
    }
    if not kind.startswith("deep") and draw.random() < 0.25:
        # nothing is evicted; LongLive attends 21 frames of them all
        blocks = draw.randint(1, 30 // block)
        capacity = blocks * block if kind == "longlive" else 21
        blocks = min(blocks, capacity // block)
        streaming |= {"local_attn_size": -1, "cache_capacity_frames": capacity, "blocks": blocks}
    if kind == "reward":
        streaming["ema_decay"] = draw.choice([0.999, 0.9, 0.5])
    if kind == "deep_sink":
        streaming["mode"] = "deep sink only"
    if kind == "deep_compression":
        recent = draw.randint(block, block + 3)
        if draw.random() < 0.3:
            recent = draw.randint(1, block)  # the block is not kept as a whole
        whole = sink + max(recent, block)
        window = whole + draw.randint(0, 7)
        # the release keeps it between sink + recent and window
        budget = draw.randint(whole - (recent >= block), window + 1)
        streaming |= {
            "local_attn_size": window,
            "cache_capacity_frames": window,
            "blocks": window // block + draw.randint(1, 7),
            "mode": "deep sink + participative compression",
            "budget_frames": budget,
            "recent_frames": recent,
            "score_fusion": draw.choice(["sum", "max"]),
            "topc_max_reuse": draw.choice([2, 3, 7]),
            "first_sink_rotation_literal": draw.choice([21, 21, 12]),
        }
    if kind in ("longlive", "infinite") and draw.random() < 0.6:
        streaming |= {
            "global_sink": draw.random() < 0.5,
            "switch_frame_indices": switches(draw, streaming["blocks"], block),
        }
    return (
        streaming if streaming["local_attn_size"] == -1 else streaming | other_buffer(kind, streaming, draw)
    )


def other_buffer(kind: str, streaming: dict, draw: random.Random) -> dict:
    """Sometimes a buffer of another size than the span that is attended."""
    window, sink, chance = streaming["local_attn_size"], streaming["sink_size"], draw.random()
    if kind == "self_forcing" and chance < 0.3:
        return {"cache_capacity_frames": window + max(1, sink) + draw.randint(0, 3)}
    if kind == "longlive" and chance < 0.3 and streaming.get("global_sink", True):
        return {"cache_capacity_frames": window + draw.randint(1, 4)}
    if chance > 0.8 and "global_sink" not in streaming and kind != "deep_compression":
        return {"local_attn_size": window + draw.randint(1, 3)}
    return {}


def record(folder: Path, kind: str, seed: int) -> None:
    """Draw settings, weights and inputs, run the restatement, and write what it did as a case."""
    draw = random.Random(f"{kind} {seed}")
    streaming, model = drawn_settings(kind, draw), drawn_model(draw)
    steps = draw.choice(STEPS)
    if kind == "rolling":
        steps = sorted(draw.sample(range(100, 1000), streaming["rolling_window_blocks"] - 1), reverse=True)
        steps = [1000, *steps]
    batch = 1 if kind == "infinite" else draw.randint(1, 2)
    grid = draw.choice(GRIDS)
    block, frames = streaming["frames_per_block"], streaming["frames_per_block"] * streaming["blocks"]
    height, width = 2 * grid[0], 2 * grid[1]
    weights = random_weights(model, seed)
    segments = len(streaming.get("switch_frame_indices", ())) + 1
    random_ = torch.Generator().manual_seed(seed)
    inputs = {"noise": torch.randn(batch, frames, 16, height, width, generator=random_)}
    for number in range(streaming["blocks"]):
        for step in range(len(steps) - 1):
            shape = (batch, block, 16, height, width)
            inputs[f"renoise/{number}/{step}"] = torch.randn(shape, generator=random_)
    rows = [[draw.randint(1, model["text_len"]) for _ in range(batch)] for _ in range(segments)]
    inputs |= {f"prompt/{s}": random_text(model, rows[s], random_) for s in range(segments)}
    warp, shift, sigma_min, extra = draw.choice(SCHEDULES)
    levels = Levels(steps, shift, warp, sigma_min, extra)
    outputs, seen = replay(kind, streaming, Network(weights, model), inputs, levels, grid)
    raw = kind in ("infinite", "reward")
    cache = {
        "layers": model["num_layers"],
        "tokens_per_frame": grid[0] * grid[1],
        "k_stored_after_rope": not raw,
        "v_has_rope": False,
    }
    if kind != "deep_compression":
        cache["frames_in_slots"] = seen["slots"]
    if kind == "deep_sink" and streaming["sink_size"]:
        cache["sink_rotation_frames_per_roll"] = seen["rotations"]
    if "switch_frame_indices" in streaming:
        streaming["switches_applied_at_frame"] = seen["applied"]
    project = {"longlive": "LongLive v1", "infinite": "LongLive v1"}.get(kind, kind)
    latent = {"B": batch, "F": frames, "C": 16, "H": height, "W": width}
    settings = {
        "reference": {"project": project},
        "model": model,
        "latent": latent | {"tokens_per_frame": grid[0] * grid[1]},
        "schedule": {
            "denoising_step_list": steps,
            "warped_denoising_steps": levels.steps,
            "warp": warp,
            "timestep_shift": shift,
            "num_train_timesteps": 1000,
            "sigma_min": sigma_min,
            "extra_one_step": extra,
        },
        "streaming": streaming,
        "prompts": {"segments": segments, "valid_rows": rows},
        "cache": cache,
    }
    weights = {f"model.{name}": tensor for name, tensor in weights.items()}
    write_case(folder, settings, inputs, outputs, weights)


CASES = [
    (kind, seed)
    for kind in ("self_forcing", "longlive", "infinite", "reward", "deep_sink", "deep_compression", "rolling")
    for seed in range(8)
]


@pytest.mark.parametrize(("kind", "seed"), CASES)
def test_random_settings_replay(tmp_path, kind, seed):
    record(tmp_path, kind, seed)
    rows = run_case(tmp_path)
    assert len(rows) == 1 + len(load_file(tmp_path / "outputs.safetensors"))
    assert [row.name for row in rows if not row.ok] == []


@pytest.mark.parametrize("kind", sorted({kind for kind, _ in CASES}))
def test_random_settings_replay_on_the_command_line(tmp_path, kind, capsys):
    record(tmp_path, kind, 1)
    assert main(["parity", str(tmp_path)]) == 0
    assert "all within tolerance" in capsys.readouterr().out
