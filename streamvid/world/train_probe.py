"""Train the attribute probe on rendered windows: python -m streamvid.world.train_probe --out FOLDER."""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import torch
from torch.nn import functional

from streamvid.training.optimizers import build_optimizers
from streamvid.world.probe import STRIDE, WINDOW_FRAMES, AttributeProbe
from streamvid.world.render import FADE_FRAMES, render_frame
from streamvid.world.scene import ATTRIBUTES, Scene, change_scene, sample_scene, sample_scenery

BATCH = 32
MUON_LEARNING_RATE = 1e-2
ADAMW_LEARNING_RATE = 2e-3
WEIGHT_DECAY = 0.01
WARMUP_STEPS = 30
SAVE_EVERY_SECONDS = 60.0
LOOKED_AT = [index for index in range(WINDOW_FRAMES) if index % STRIDE < 2]  # the frames that a probe reads


def sample_window(
    rng: np.random.Generator, held_out: bool | None = None, more_rolling: float = 0.0
) -> tuple[np.ndarray, Scene]:
    """A window [32, 128, 128, 3] uint8 and what it shows; frames that the probe does not read stay black.

    It starts anywhere in the first minute; in 40% of the cases soon after a switch, as early as at the end of
    the cross-fade. more_rolling is the share of windows that are made to roll, whatever was drawn.
    """
    scene = sample_scene(rng, held_out)
    if more_rolling and rng.random() < more_rolling:
        scene = replace(scene, motion=("rolls left", "rolls right")[int(rng.integers(2))])
    shots = [(0, scene)]
    start = int(rng.integers(960))
    if rng.random() < 0.4:
        before = change_scene(rng, scene, int(rng.integers(1, 4)), None)
        switch = int(rng.integers(FADE_FRAMES, 240))
        shots = [(0, before), (switch, scene)]
        start = switch + int(rng.integers(FADE_FRAMES, 64))
    scenery = sample_scenery(rng)
    window = np.zeros((WINDOW_FRAMES, 128, 128, 3), np.uint8)
    for index in LOOKED_AT:
        window[index] = render_frame(shots, scenery, start + index)
    return window, scene


def augment(rng: np.random.Generator, window: np.ndarray) -> np.ndarray:
    """Make the window [32, 128, 128, 3] uint8 a little worse, as autoencoders and generators do."""
    if rng.random() < 0.2:
        return window
    gain = rng.uniform(0.92, 1.08)
    offset = rng.uniform(-8, 8)
    blur = rng.uniform(0.4, 1.6) if rng.random() < 0.6 else 0.0
    noise = rng.uniform(0, 6) if rng.random() < 0.5 else 0.0
    result = np.zeros_like(window)
    for index in LOOKED_AT:
        frame = cv2.GaussianBlur(window[index], (0, 0), blur) if blur else window[index]
        frame = frame.astype(np.float32)
        if noise:  # soft noise: autoencoders leave blotches, not grain
            grain = rng.standard_normal((64, 64, 3), np.float32) * np.float32(2 * noise)
            frame += cv2.resize(grain, (128, 128), interpolation=cv2.INTER_LINEAR)
        result[index] = np.clip(frame * gain + offset, 0, 255)
    return result


def _batch(seed: int, step: int, more_rolling: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Frames [B, 32, 128, 128, 3] uint8 and labels [B, attributes] of one training step."""
    rng = np.random.default_rng((seed, 1, step))
    pairs = [sample_window(rng, more_rolling=more_rolling) for _ in range(BATCH)]
    frames = np.stack([augment(rng, window) for window, _ in pairs])
    return torch.from_numpy(frames), torch.tensor([scene.labels() for _, scene in pairs])


def measure_probe(probe: AttributeProbe, windows: int, seed: int, held_out: bool | None) -> dict[str, float]:
    """Accuracy per attribute, their mean, and the share of windows with all attributes right."""
    rng = np.random.default_rng((seed, 2))
    right = []
    for start in range(0, windows, BATCH):
        pairs = [sample_window(rng, held_out) for _ in range(min(BATCH, windows - start))]
        found = probe.classify(np.stack([window for window, _ in pairs]))
        labels = torch.tensor([scene.labels() for _, scene in pairs])
        right.append(torch.stack(list(found.values()), 1) == labels)
    hits = torch.cat(right).float()
    result = dict(zip(ATTRIBUTES, hits.mean(0).tolist(), strict=True))
    return {**result, "mean": hits.mean().item(), "all": hits.prod(1).mean().item()}


def _learning_rate_share(step: int, steps: int) -> float:
    """Warm-up, then a cosine to zero."""
    warm = min(1.0, (step + 1) / WARMUP_STEPS)
    return warm * 0.5 * (1 + math.cos(math.pi * step / steps))


def _write(path: Path, write) -> None:
    """Write a file whole or not at all."""
    draft = path.with_name(path.name + ".part")
    write(draft)
    os.replace(draft, path)


def train_probe(
    steps: int = 800,
    seed: int = 0,
    out: str | Path = "probe",
    test_windows: int = 1024,
    more_rolling: float = 0.25,
) -> dict:
    """Train, write probe.safetensors and metrics.json to the folder `out`, and return the metrics.

    more_rolling is the share of training windows made to roll: left and right are the hardest to tell apart,
    above all for a ball or a ring.

    Goes on from checkpoint.pt in that folder if there is one, and removes it at the end. log.jsonl gets one
    line per progress report.
    """
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    torch.manual_seed(seed)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    checkpoint = out / "checkpoint.pt"
    probe = AttributeProbe()
    optimisers = build_optimizers(probe, MUON_LEARNING_RATE, ADAMW_LEARNING_RATE, WEIGHT_DECAY)
    for group in (group for optimiser in optimisers for group in optimiser.param_groups):
        group["peak"] = group["lr"]
    first = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        probe.load_state_dict(state["probe"])
        for optimiser, saved in zip(optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        first = state["step"]
        print(f"resumed at step {first}", flush=True)

    def save(step: int) -> None:
        saved = [optimiser.state_dict() for optimiser in optimisers]
        state = {"probe": probe.state_dict(), "optimisers": saved, "step": step}
        _write(checkpoint, lambda path: torch.save(state, path))

    _train_steps(probe, optimisers, first, steps, seed, more_rolling, out / "log.jsonl", save)
    metrics = {
        "steps": steps,
        "seed": seed,
        "more_rolling": more_rolling,
        "parameters": sum(parameter.numel() for parameter in probe.parameters()),
        "test_windows": test_windows,
        "accuracy_all_scenes": measure_probe(probe, test_windows, seed + 1000, None),
        "accuracy_held_out_pairs": measure_probe(probe, test_windows, seed + 2000, True),
    }
    _write(out / "probe.safetensors", probe.save)
    _write(out / "metrics.json", lambda path: path.write_text(json.dumps(metrics, indent=2) + "\n"))
    checkpoint.unlink(missing_ok=True)
    return metrics


def _report(step: int, logits: dict, labels: torch.Tensor, loss: float, seconds: float) -> dict[str, float]:
    """One line of the log: step, loss, seconds since the start, accuracy per attribute on this batch."""
    hits = {
        name: round((values.argmax(1) == labels[:, index]).float().mean().item(), 3)
        for index, (name, values) in enumerate(logits.items())
    }
    return {"step": step, "loss": round(loss, 4), "seconds": round(seconds, 1), **hits}


def _train_steps(
    probe, optimisers, first: int, steps: int, seed: int, more_rolling: float, log: Path, save
) -> None:
    """Run steps first ... steps - 1, reporting every 25 and calling save(step) about once a minute."""
    probe.train()
    began = saved = time.monotonic()
    for step in range(first, steps):
        for group in (group for optimiser in optimisers for group in optimiser.param_groups):
            group["lr"] = group["peak"] * _learning_rate_share(step, steps)
        frames, labels = _batch(seed, step, more_rolling)
        torch.manual_seed(seed * 1_000_003 + step)  # dropout: a resumed run equals an uninterrupted one
        with torch.autocast("cpu", torch.bfloat16):
            logits = probe.logits(frames)
        losses = [
            functional.cross_entropy(values.float(), labels[:, index], label_smoothing=0.02)
            for index, values in enumerate(logits.values())
        ]
        probe.zero_grad()
        loss = torch.stack(losses).sum()
        loss.backward()
        for optimiser in optimisers:
            optimiser.step()
        now = time.monotonic()
        if (step + 1) % 25 == 0:
            report = _report(step + 1, logits, labels, loss.item(), now - began)
            left = (now - began) / (step + 1 - first) * (steps - step - 1)
            print(
                *(f"{name} {value}" for name, value in report.items()),
                f"| {left / 60:.1f} min left",
                flush=True,
            )
            with log.open("a") as file:
                file.write(json.dumps(report) + "\n")
        if now - saved > SAVE_EVERY_SECONDS:
            save(step + 1)
            saved = now


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--test-windows", type=int, default=1024)
    parser.add_argument("--more-rolling", type=float, default=0.25)
    arguments = parser.parse_args()
    metrics = train_probe(**vars(arguments))
    print(json.dumps(metrics, indent=2))


if __name__ == "__main__":
    main()
