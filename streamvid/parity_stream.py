"""Recorded streams: the options of the engine that a case's settings stand for, and its replay through `VideoStream`.

A setting without an entry in these tables is refused, never ignored.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from diffusers import AutoencoderKLWan

from streamvid.checkpoints import load_transformer
from streamvid.errors import UserError
from streamvid.methods import Method
from streamvid.parity_case import FORWARD, LATENTS, SCHEDULE, X0, Case, Row, compare
from streamvid.pipelines.pipeline_streamvid import StreamVidPipeline
from streamvid.rope import THETA, axis_pairs
from streamvid.schedule import FewStepFlowScheduler
from streamvid.stream import VideoStream
from streamvid.transformer import CausalWanTransformer3DModel

# --- model and schedule -----------------------------------------------------------------------------------------------

# Key of `model` -> option of our transformer. Keys with a fixed value are built in; other values do not exist.
MODEL_OPTIONS = {
    "num_heads": "num_attention_heads",
    "head_dim": "attention_head_dim",
    "ffn_dim": "ffn_dim",
    "num_layers": "num_layers",
    "in_dim": "in_channels",
    "out_dim": "out_channels",
    "patch_size": "patch_size",
    "text_dim": "text_dim",
    "text_len": "text_len",
    "freq_dim": "freq_dim",
    "cross_attn_norm": "cross_attn_norm",
    "eps": "eps",
}
MODEL_FIXED = {"model_type": "t2v", "qk_norm": True, "rope_theta": THETA}

SCHEDULE_OPTIONS = {
    "denoising_step_list": "denoising_steps",
    "warp": "warp",
    "timestep_shift": "shift",
    "num_train_timesteps": "num_train_timesteps",
    "sigma_min": "sigma_min",
    "extra_one_step": "extra_one_step",
}


def case_transformer(case: Case) -> CausalWanTransformer3DModel:
    """The case's network with its weights."""
    model = case.section("model", [*MODEL_OPTIONS, *MODEL_FIXED, "dim", "rope_complex_pairs_t_h_w"], [])
    for key, value in MODEL_FIXED.items():
        if model.get(key, value) != value:
            raise case.missing(f"model.{key} = {model[key]!r}", f"a transformer other than {key} = {value!r}")
    config = {ours: model[key] for key, ours in MODEL_OPTIONS.items() if key in model}
    heads, head_dim = model.get("num_heads"), model.get("head_dim")
    if not heads or not head_dim or model.get("dim", heads * head_dim) != heads * head_dim:
        raise UserError(
            f"{case.folder}/case.json: model.dim is not num_heads x head_dim: record the case again"
        )
    pairs = model.get("rope_complex_pairs_t_h_w", list(axis_pairs(head_dim)))
    if tuple(pairs) != axis_pairs(head_dim):
        raise case.missing(
            f"model.rope_complex_pairs_t_h_w = {pairs}", "another split of the rotary channels"
        )
    if "patch_size" in config:
        config["patch_size"] = tuple(config["patch_size"])
        if config["patch_size"][0] != 1:
            raise case.missing(f"model.patch_size = {model['patch_size']}", "patches of several frames")
    return load_transformer(case.folder / "weights.safetensors", config)


class RecordingScheduler(FewStepFlowScheduler):
    """Keeps every network output and x0 of a run, in order."""

    def record(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        self.outputs: list[torch.Tensor] = []
        self.x0: list[torch.Tensor] = []
        return self.outputs, self.x0

    def x0_from_output(
        self, output: torch.Tensor, x_t: torch.Tensor, sigma: float | torch.Tensor
    ) -> torch.Tensor:
        x_0 = super().x0_from_output(output, x_t, sigma)
        self.outputs.append(output)
        self.x0.append(x_0)
        return x_0


# --- streams ----------------------------------------------------------------------------------------------------------

# Key of `streaming` -> option of `Method`, taken as it is.
STREAMING_OPTIONS = {
    "frames_per_block": "frames_per_block",
    "sink_size": "sink",
    "context_noise": "context_timestep",
}
# Keys that `stream_method` and `run_stream` work out.
STREAMING_DERIVED = ("blocks", "local_attn_size", "cache_capacity_frames")
# Keys of what does not exist yet. To add it: an option of `Method`, and the key moves up.
STREAMING_MISSING = {
    "ema_decay": "a sink of moving averages (Reward Forcing)",
    "rolling_window_blocks": "the rolling sampler (Rolling Forcing)",
    "mode": "a deep sink (Deep Forcing)",
    "budget_frames": "participative compression (Deep Forcing)",
    "global_sink": "LongLive's released sink at a prompt switch",
    "switch_frame_indices": "switches that recache in both directions",
}
# `cache.k_stored_after_rope` -> positions: what is stored tells how the reference places it.
POSITIONS = {True: "absolute", False: "cache_relative"}


def stream_method(case: Case) -> Method:
    """The engine's options for a case's `streaming` section."""
    streaming = case.settings["streaming"]
    absent = {what: key for key, what in STREAMING_MISSING.items() if key in streaming}
    if absent:
        raise case.missing(f"streaming.{', '.join(absent.values())}", " and ".join(absent))
    streaming = case.section("streaming", [*STREAMING_OPTIONS, *STREAMING_DERIVED])
    window, capacity = streaming["local_attn_size"], streaming["cache_capacity_frames"]
    if window > capacity:
        raise UserError(
            f"{case.folder}/case.json: streaming.local_attn_size = {window} exceeds cache_capacity_frames = {capacity}: "
            "record the case again"
        )
    if window == -1:
        window = capacity
        if case.section("latent", LATENT_KEYS)["F"] > capacity:
            raise UserError(
                f"{case.folder}/case.json: latent.F exceeds streaming.cache_capacity_frames = {capacity}, "
                "and local_attn_size = -1 evicts nothing: give a window"
            )
    after_rope = case.settings.get("cache", {}).get("k_stored_after_rope", True)
    if not isinstance(after_rope, bool):
        raise case.missing(f"cache.k_stored_after_rope = {after_rope!r}", "keys of both kinds in one cache")
    sink, block = streaming["sink_size"], streaming["frames_per_block"]
    if "LongLive" in str(case.settings.get("reference", {}).get("project")) and sink > block:
        raise case.missing(
            f"streaming.sink_size = {sink} above frames_per_block = {block}",
            "LongLive's treatment of a sink larger than a block (empty slots attended, sink frames left noisy)",
        )
    options = {ours: streaming[key] for key, ours in STREAMING_OPTIONS.items()}
    options |= {"window": window, "positions": POSITIONS[after_rope], "transition": "cross_only"}
    return Method(name="recorded").with_overrides(options)


LATENT_KEYS = ("B", "F", "C", "H", "W", "tokens_per_frame")


class RecordedNoise:
    """The noise of a case as a source: `noise` cut into blocks, then `renoise/<block>/<step just done>`."""

    def __init__(self, case: Case):
        self.case = case
        self.first_frame = {0: 0}

    def __call__(self, block: int, step: int, frames: int) -> torch.Tensor:
        start = self.first_frame[block]
        self.first_frame[block + 1] = start + frames
        if step == 0:
            return self.case.input("noise")[:, start : start + frames].transpose(1, 2)
        return self.case.input(f"renoise/{block}/{step - 1}").transpose(1, 2)


class RecordedPipeline(StreamVidPipeline):
    """A pipeline whose prompts are names of recorded embeddings. It never decodes: its VAE is a placeholder."""

    def __init__(self, case: Case, scheduler: FewStepFlowScheduler):
        vae = AutoencoderKLWan(base_dim=2, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
        super().__init__(
            tokenizer=None,  # type: ignore[arg-type]
            text_encoder=None,  # type: ignore[arg-type]
            transformer=case_transformer(case),
            vae=vae,
            scheduler=scheduler,
        )
        self.inputs = case.input

    def encode_prompt(self, prompt: str | Sequence[str]) -> torch.Tensor:
        return self.inputs(prompt if isinstance(prompt, str) else prompt[0])


def run_stream(case: Case) -> Iterator[Row]:
    """Replay a streaming case block by block through `VideoStream`."""
    latent = case.section("latent", LATENT_KEYS)
    schedule = case.section("schedule", [*SCHEDULE_OPTIONS, "warped_denoising_steps"])
    method = stream_method(case)
    blocks = case.settings["streaming"]["blocks"]
    shape = tuple(latent[key] for key in "BFCHW")
    if tuple(case.input("noise").shape) != shape or blocks * method.frames_per_block != latent["F"]:
        raise UserError(
            f"{case.folder}/case.json: latent {shape} and {blocks} blocks of {method.frames_per_block} frames do not "
            f"match the noise {tuple(case.input('noise').shape)}: record the case again"
        )
    prompts = case.section("prompts", ["segments", "valid_rows", "note"], ["segments", "valid_rows"])
    if prompts["segments"] != 1:
        raise case.missing("prompts.segments", "several prompts without a switch setting")
    text = tuple(case.settings["model"][key] for key in ("text_len", "text_dim"))
    case.check_prompt("prompt/0", prompts["valid_rows"][0], (latent["B"], *text))
    scheduler = RecordingScheduler(**{ours: schedule[key] for key, ours in SCHEDULE_OPTIONS.items()})
    outputs, x0 = scheduler.record()
    pipe = RecordedPipeline(case, scheduler)
    stream = pipe.stream(
        ["prompt/0"] * latent["B"],
        method=method,
        height=latent["H"] * pipe.spatial_ratio,
        width=latent["W"] * pipe.spatial_ratio,
        blocks=blocks,
        noise=RecordedNoise(case),
        decode_pixels=False,
    )
    if stream.cache.tokens_per_frame != latent["tokens_per_frame"]:
        raise UserError(
            f"{case.folder}/case.json: latent.tokens_per_frame does not follow from H, W and patch_size"
        )
    latents = torch.cat([chunk.latents for chunk in stream], dim=2)

    got = {"latents": latents.transpose(1, 2), "flow/first": outputs[0].transpose(1, 2)}
    for index, prediction in enumerate(x0):
        block, step = divmod(index, len(scheduler.steps))
        got[f"x0/{block}/{step}"] = prediction.transpose(1, 2)
    frames = stored_frames(case, stream)
    levels = torch.tensor(schedule["warped_denoising_steps"])
    yield compare("warped_denoising_steps", torch.tensor(scheduler.steps), levels, SCHEDULE)
    for name in case.recorded(r"latents|flow/first|x0/\d+/\d+|cache/\d+/[kv]"):
        family = name.split("/")[0]
        if family == "cache":
            yield compare_cache(name, case, stream, frames)
        else:
            tolerance = {"latents": LATENTS, "flow": FORWARD, "x0": X0}[family]
            yield compare(name, got.get(name), case.outputs[name], tolerance)


def stored_frames(case: Case, stream: VideoStream) -> list[int]:
    """Frame of every slot of the recorded cache, in the reference's order."""
    live = stream.cache.planner.live_frames
    frames = case.settings.get("cache", {}).get("frames_in_slots", live)
    streaming, length = case.settings["streaming"], case.settings["latent"]["F"]
    if len(frames) != min(length, streaming["cache_capacity_frames"]):
        raise UserError(
            f"{case.folder}/case.json: cache.frames_in_slots has {len(frames)} frames, which does not follow from "
            f"cache_capacity_frames = {streaming['cache_capacity_frames']}: record the case again"
        )
    return frames


def compare_cache(name: str, case: Case, stream: VideoStream, frames: list[int]) -> Row:
    """A layer's keys or values. A buffer larger than the window also holds frames that nothing attends; we do not."""
    _, layer, kind = name.split("/")
    cache, recorded = stream.cache, case.outputs[name]
    live = cache.planner.live_frames
    kept = [frame for frame in frames if frame in live]
    larger = len(frames) > stream.method.window
    if set(kept) != set(live) or (len(kept) < len(frames) and not larger) or int(layer) >= len(cache.keys):
        return compare(name, None, recorded, LATENTS)  # another window
    if len(kept) < len(frames):
        name = f"{name} ({len(kept)} of {len(frames)} frames)"
        tokens = recorded.unflatten(1, (len(frames), -1))
        recorded = tokens[:, [slot for slot, frame in enumerate(frames) if frame in live]].flatten(1, 2)
    rotated = case.settings.get("cache", {}).get("k_stored_after_rope", True)
    return compare(name, cache.stored(int(layer), kept, rotated)["kv".index(kind)], recorded, LATENTS)
