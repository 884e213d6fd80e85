"""Recorded runs of the reference implementations, replayed through the engine: `streamvid parity CASE_FOLDER...`.

A case is a folder with `case.json`, `weights.safetensors`, `inputs.safetensors` and `outputs.safetensors`. Every setting
comes from its `case.json`; one that is not known is refused, never ignored. What a case records decides what is run: a
stream (streamvid.parity_stream), losses (streamvid.parity_losses), one bidirectional forward, a VAE or scheduler tables.

    rows = run_case("golden/self_forcing")      # float32 on the CPU
    print(format_report("self_forcing", rows))
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan

from streamvid.checkpoints import fit, vae_state
from streamvid.decoding import decode, decoder_state, encode, encoder_state
from streamvid.errors import UserError
from streamvid.parity_case import EXACT, FORWARD, PIXELS, SCHEDULE, Case, Row, Tensors, compare
from streamvid.parity_losses import run_losses
from streamvid.parity_stream import LATENT_KEYS, case_transformer, run_stream
from streamvid.schedule import FewStepFlowScheduler, flow_table, training_weights
from streamvid.transformer import CausalWanTransformer3DModel

# --- one bidirectional forward ----------------------------------------------------------------------------------------

# `trace/<name>` -> module whose output it is.
TRACED = {
    "patch_embedding": "patch_embedding",
    "text_embedding": "condition_embedder.text_embedder",
    "time_embedding": "condition_embedder.time_embedder",
    "time_projection": "condition_embedder.time_proj",
    r"block/(\d+)": r"blocks.\1",
    "head": "proj_out",
}


def run_forward(case: Case) -> Iterator[Row]:
    """One forward of the transformer over all frames at once, with the outputs of its parts."""
    latent = case.section("latent", LATENT_KEYS)
    x = case.input("x")
    if tuple(x.shape) != tuple(latent[key] for key in "BCFHW"):
        raise UserError(f"{case.folder}/case.json: latent does not match the input x {tuple(x.shape)}")
    if not torch.equal(case.input("timestep").float(), torch.tensor(case.settings["timesteps"]).float()):
        raise UserError(
            f"{case.folder}/case.json: timesteps do not match the input timestep: record the case again"
        )
    transformer = case_transformer(case)
    text = (latent["B"], transformer.config.text_len, transformer.config.text_dim)
    case.check_prompt("prompt", case.settings["prompt_valid_rows"], text)
    with hooked(transformer) as got, torch.no_grad():
        got["flow"] = transformer(x, case.input("timestep"), case.input("prompt"), return_dict=False)[0]
    traced = "|".join(TRACED)
    for name in case.recorded(f"flow|trace/({traced})"):
        value, recorded = got.get(name), case.outputs[name]
        if value is not None and value.ndim > recorded.ndim:  # we keep one per frame, here all equal
            recorded = recorded[:, None].expand_as(value)
        yield compare(name, value, recorded, FORWARD)


@contextmanager
def hooked(transformer: CausalWanTransformer3DModel) -> Iterator[Tensors]:
    """Outputs of the traced modules, by the names that cases use."""
    got: Tensors = {}
    handles = []
    for name, module in transformer.named_modules():
        for trace, path in TRACED.items():
            match = re.fullmatch(re.escape(path).replace(r"\\1", r"(\d+)"), name)
            if match:
                label = "trace/" + trace.replace(r"(\d+)", match[1] if match.groups() else "")
                handles.append(module.register_forward_hook(_keeper(got, label)))
    yield got
    for handle in handles:
        handle.remove()


def _keeper(store: Tensors, name: str) -> Callable:
    def keep(module, inputs, output):
        store[name] = output

    return keep


# --- VAE --------------------------------------------------------------------------------------------------------------

VAE_OPTIONS = {
    "base_dim": "base_dim",
    "z_dim": "z_dim",
    "dim_mult": "dim_mult",
    "num_res_blocks": "num_res_blocks",
    "attn_scales": "attn_scales",
    "temporal_downsample": "temperal_downsample",
    "dropout": "dropout",
    "latents_mean": "latents_mean",
    "latents_std": "latents_std",
}


@torch.no_grad()
def run_vae(case: Case) -> Iterator[Row]:
    """Decode at once, in chunks and with the caches cleared; encode. Both namings of the weights where recorded."""
    config = case.section("config", list(VAE_OPTIONS))
    with torch.device("meta"):
        vae = AutoencoderKLWan(**{ours: config[key] for key, ours in VAE_OPTIONS.items()})
    state = vae_state(case.tensors("weights"))
    fit(vae, state, "the recorded VAE", str(case.folder / "weights.safetensors"))
    vae.eval()
    if (case.folder / "weights_diffusers.safetensors").is_file():
        other = case.tensors("weights_diffusers")
        same = state.keys() == other.keys() and all(torch.equal(state[name], other[name]) for name in other)
        off = 0.0 if same else float("inf")
        yield Row(f"names of {len(other)} weights", off, off, EXACT, same)
    latents = case.input("latents").transpose(1, 2)
    whole = decode(vae, latents, decoder_state(vae), clamp=False)
    for first, size in ((3, 3), (1, 4), (1, 1)):
        chunks = [latents[:, :, :first], *latents[:, :, first:].split(size, 2)]
        state_ = decoder_state(vae)
        pieces = [decode(vae, chunk, state_, clamp=False) for chunk in chunks if chunk.shape[2]]
        yield compare(f"pixels in chunks of {first}, {size}, ...", torch.cat(pieces, 2), whole, PIXELS)
    for name in case.recorded(r"pixels|pixels_cache_cleared_every_\d+|encode/latents"):
        if name == "pixels":
            got = whole
        elif name == "encode/latents":
            got = encode(vae, case.outputs["pixels"].clamp(-1, 1), encoder_state(vae)).transpose(1, 2)
        else:
            pieces = latents.split(int(name.rsplit("_", 1)[1]), dim=2)
            got = torch.cat([decode(vae, piece, decoder_state(vae), clamp=False) for piece in pieces], 2)
        yield compare(name, got, case.outputs[name], PIXELS)


# --- scheduler --------------------------------------------------------------------------------------------------------

SCHEDULER_KEYS = (
    "shifts",
    "num_train_timesteps",
    "num_inference_steps",
    "sigma_max",
    "sigma_min",
    "extra_one_step",
    "training",
)
# what the reference's class does when it is told nothing
REFERENCE_DEFAULTS = {"shift": 3.0, "sigma_max": 1.0, "sigma_min": 0.003 / 1.002, "extra_one_step": False}


def run_scheduler(case: Case) -> Iterator[Row]:
    """Sigma and timestep tables, conversions and steps, for every recorded shift."""
    config = case.section("config", SCHEDULER_KEYS)
    total, length = config["num_train_timesteps"], config["num_inference_steps"]
    table = {name: config[name] for name in ("sigma_max", "sigma_min", "extra_one_step")}
    got: Tensors = {}
    for shift in config["shifts"]:
        scheduler = FewStepFlowScheduler(shift=shift)
        scheduler.sigmas, scheduler.timesteps = flow_table(length, shift, **table, num_train_timesteps=total)
        got |= {f"shift{shift:g}/{name}": t for name, t in conversions(case, scheduler).items()}
        for name, levels in case.settings.get("denoising_lists", {}).items():
            warped = f"shift{shift:g}/warped/{name}"
            if warped in case.outputs:  # a shorter table has no rows for some levels
                got[warped] = torch.tensor(scheduler.warped(levels))
    for name in case.outputs:
        rows = re.fullmatch(r"(?:shift([\d.]+)_(\d+)steps|default(\d+))/(sigmas|timesteps)", name)
        if rows:
            options = table | {"shift": float(rows[1])} if rows[1] else REFERENCE_DEFAULTS
            pair = flow_table(int(rows[2] or rows[3]), **options, num_train_timesteps=total)
            got[name] = pair[rows[4] == "timesteps"]
    for name in case.recorded(r"(shift|default)[\d.]+(_\d+steps)?/.+"):
        exact = re.search(r"/(sigmas|timesteps|nearest_index|warped/.+)$", name)
        yield compare(name, got.get(name), case.outputs[name], EXACT if exact else SCHEDULE)


def conversions(case: Case, scheduler: FewStepFlowScheduler) -> Tensors:
    """Everything that is recorded of one table."""
    x0, noise, flow, timestep = (case.input(name) for name in ("x0", "noise", "flow", "timestep"))
    rows = case.input("step_rows").long()

    def wide(values: torch.Tensor) -> torch.Tensor:
        return values.view(-1, *[1] * (x0.ndim - 1))

    def step(t: torch.Tensor, v: torch.Tensor, x: torch.Tensor, to_final: bool = False) -> torch.Tensor:
        return scheduler.euler_step(v, x, wide(scheduler.sigma(t)), wide(scheduler.next_sigma(t, to_final)))

    sigma = wide(scheduler.sigma(timestep))
    noisy = scheduler.add_noise(x0, noise, sigma)
    weights = training_weights(scheduler.timesteps)
    return {
        "sigmas": scheduler.sigmas,
        "timesteps": scheduler.timesteps,
        "training_weights": weights,
        "training_weight": weights[scheduler.nearest_index(timestep)],
        "nearest_index": scheduler.nearest_index(timestep),
        "add_noise": noisy,
        "x0_from_flow": scheduler.x0_from_output(flow, noisy, sigma),
        "flow_from_x0": scheduler.flow_from_x0(x0, noise, sigma),
        "step": step(timestep[rows], flow[rows], noise[rows]),
        "step_batch_containing_last": step(timestep, flow, noise),
        "step_to_final": step(timestep[rows], flow[rows], noise[rows], True),
    }


# --- command ----------------------------------------------------------------------------------------------------------

# What a case is: the first whose keys are there.
KINDS: tuple[tuple[Callable[[Mapping[str, Any]], bool], Callable[[Case], Iterator[Row]]], ...] = (
    (lambda s: "streaming" in s, run_stream),
    (lambda s: "timesteps" in s and "model" in s, run_forward),
    (lambda s: "base_dim" in s.get("config", {}), run_vae),
    (lambda s: "shifts" in s.get("config", {}), run_scheduler),
    (lambda s: "variants" in s, run_losses),
)


def run_case(folder: str | Path, attention: str = "auto") -> list[Row]:
    """Replay a recorded case with an attention backend: one row per recorded tensor.

    Raises:
        UserError: the folder is no case, or asks for what does not exist.
    """
    case = Case(folder, attention)
    for fits, run in KINDS:
        if fits(case.settings):
            try:
                return list(run(case))
            except UserError:
                raise
            except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
                raise UserError(
                    f"{case.folder} cannot be replayed ({type(error).__name__}: {str(error).splitlines()[0]}): "
                    "its settings and tensors do not fit each other; record it again"
                ) from error
    raise UserError(
        f"{case.folder}/case.json describes no kind of case: stream, forward, VAE, scheduler or losses"
    )


def format_report(title: str, rows: Sequence[Row]) -> str:
    """A table of all rows and a last line with the verdict."""
    width = max(len(row.name) for row in rows)
    lines = [title, f"  {'tensor':{width}}  {'max abs':>9}  {'rel L2':>9}  tolerance"]
    for row in rows:
        verdict = "" if row.ok else "   FAILED"
        lines.append(f"  {row.name:{width}}  {row.max_abs:9.2e}  {row.rel_l2:9.2e}  {row.tolerance}{verdict}")
    failed = sum(not row.ok for row in rows)
    lines.append(
        f"  {len(rows)} compared, " + (f"{failed} out of tolerance" if failed else "all within tolerance")
    )
    return "\n".join(lines)


def main(folders: Sequence[str | Path], attention: str = "auto") -> int:
    """Replay cases and print their reports: 0 all fit, 1 one is out of tolerance, 2 one is impossible."""
    code = 0
    for folder in folders:
        try:
            rows = run_case(folder, attention)
        except UserError as error:
            print(f"streamvid: {'' if str(folder) in str(error) else f'{folder}: '}{error}", file=sys.stderr)
            code = 2
            continue
        print(format_report(str(folder), rows), flush=True)
        code = max(code, 0 if all(row.ok for row in rows) else 1)
    return code
