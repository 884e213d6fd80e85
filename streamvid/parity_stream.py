"""Recorded streams: a case's network, and its replay through `VideoStream`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from diffusers import AutoencoderKLWan

from streamvid.checkpoints import build_transformer, extract_transformer
from streamvid.errors import UserError
from streamvid.parity_case import EXACT, FORWARD, LATENTS, SCORES, X0, Case, Row, Tensors, Tolerance, compare
from streamvid.parity_settings import (
    LATENT_KEYS,
    SCHEDULE_KEYS,
    SCHEDULE_OPTIONS,
    check_derived,
    stream_method,
    switch_policies,
)
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


def case_transformer(case: Case, prefix: str = "") -> CausalWanTransformer3DModel:
    """The case's network with its weights, or with those whose names begin with `prefix`."""
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
    path = str(case.folder / "weights.safetensors")
    weights = {
        name.removeprefix(prefix): tensor
        for name, tensor in case.tensors("weights").items()
        if name.startswith(prefix)
    }
    transformer = build_transformer(extract_transformer(weights, None, path), config, path).eval()
    transformer.attention_name = case.attention
    return transformer


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


class RecordedNoise:
    """The noise of a case as a source: `noise` cut into blocks, then `renoise/<block>/<step just done>`."""

    def __init__(self, case: Case):
        self.case = case
        self.first_frame = {0: 0}
        self.at_block: Callable[[int], None] = lambda block: None

    def __call__(self, block: int, step: int, frames: int) -> torch.Tensor:
        if step == 0:
            self.at_block(block)
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

    def check_prompts(self, prompt: str | Sequence[str]) -> tuple[str, ...]:
        return (prompt,) if isinstance(prompt, str) else tuple(prompt)

    def encode_prompt(self, prompt: str | Sequence[str]) -> torch.Tensor:
        return self.inputs(prompt if isinstance(prompt, str) else prompt[0])


def run_stream(case: Case) -> Iterator[Row]:
    """Replay a streaming case block by block through `VideoStream`."""
    latent = case.section("latent", LATENT_KEYS)
    schedule = case.section("schedule", SCHEDULE_KEYS)
    method = stream_method(case)
    switches = switch_policies(case)
    blocks = case.settings["streaming"]["blocks"]
    shape = tuple(latent[key] for key in "BFCHW")
    if tuple(case.input("noise").shape) != shape or blocks * method.frames_per_block != latent["F"]:
        raise UserError(
            f"{case.folder}/case.json: latent {shape} and {blocks} blocks of {method.frames_per_block} frames do not "
            f"match the noise {tuple(case.input('noise').shape)}: record the case again"
        )
    prompts = case.section("prompts", ["segments", "valid_rows", "note"], ["segments", "valid_rows"])
    if prompts["segments"] != len(switches) + 1:
        raise UserError(
            f"{case.folder}/case.json: prompts.segments is {prompts['segments']}, and the switches give "
            f"{len(switches) + 1}: record the case again"
        )
    text = tuple(case.settings["model"][key] for key in ("text_len", "text_dim"))
    for segment in range(prompts["segments"]):
        case.check_prompt(f"prompt/{segment}", prompts["valid_rows"][segment], (latent["B"], *text))
    scheduler = RecordingScheduler(**{ours: schedule[key] for key, ours in SCHEDULE_OPTIONS.items()})
    outputs, x0 = scheduler.record()
    pipe = RecordedPipeline(case, scheduler)
    noise = RecordedNoise(case)
    stream = pipe.stream(
        ["prompt/1" if 0 in switches else "prompt/0"] * latent["B"],
        method=method,
        height=latent["H"] * pipe.spatial_ratio,
        width=latent["W"] * pipe.spatial_ratio,
        blocks=blocks,
        noise=noise,
        attention=case.attention,
        decode_pixels=False,
        context_pass="separate",  # also after the last block: a recording may end with its cache
    )
    if stream.cache.tokens_per_frame != latent["tokens_per_frame"]:
        raise UserError(
            f"{case.folder}/case.json: latent.tokens_per_frame does not follow from H, W and patch_size"
        )
    check_derived(case, method, switches)
    stored_frames(case)
    got = _play(stream, noise, switches, latent["B"])
    got |= {"flow/first": outputs[0].transpose(1, 2)}
    for index, prediction in enumerate(x0):
        block, step = divmod(index, len(scheduler.steps))
        name = f"x0/{index}" if method.sampler == "rolling" else f"x0/{block}/{step}"
        got[name] = prediction.transpose(1, 2)
    got |= _stored(case, stream)
    levels = torch.tensor(schedule["warped_denoising_steps"])
    yield compare("warped_denoising_steps", torch.tensor(scheduler.steps), levels, LEVELS)
    for name in case.recorded(OUTPUTS):
        yield _compare(name, got, case, stream)


OUTPUTS = (
    r"latents|flow/first|x0/\d+(/\d+)?|cache/\d+/(k|v|token_id)|cache_after_switch/\d+/\d+/[kv]"
    r"|pc/\d+/\d+/(scores|selected)"
)
LEVELS = Tolerance(
    1e-2
)  # they may have been written down with few digits; neighbouring ones are further apart
TOLERANCES = {"latents": LATENTS, "flow": FORWARD, "x0": X0, "cache_after_switch": LATENTS}


def _play(stream: VideoStream, noise: RecordedNoise, switches: dict[int, str], batch: int) -> Tensors:
    """Run a stream with its switches; the latents, and what is only seen on the way."""
    seen: Tensors = {}
    segment_of = {block: segment for segment, block in enumerate(switches, 1)}
    rolls, latents = 0, []
    rotated = stream.method.positions != "cache_relative"  # as the reference stores its keys

    def at_block(block: int) -> None:
        """The first forward of a block is about to run: its window is as the switch left it."""
        if block in segment_of:
            live = stream.cache.planner.live_frames
            seen[f"live_after_switch/{segment_of[block] - 1}"] = torch.tensor(live, dtype=torch.long)
            for layer in range(len(stream.cache.keys)):
                nothing = (stream.cache.keys[layer][:, :0],) * 2
                stored = stream.cache.stored(layer, live, rotated) if live else nothing
                for kind, tensor in zip("kv", stored, strict=True):
                    seen[f"cache_after_switch/{segment_of[block] - 1}/{layer}/{kind}"] = tensor

    noise.at_block = at_block
    for _ in range(stream.blocks or 0):
        if stream.block in switches and stream.block > 0:
            stream.prompt([f"prompt/{segment_of[stream.block]}"] * batch, policy=switches[stream.block])
        latents.append(next(stream).latents)
        ledger = stream.cache.ledger
        if ledger is not None and ledger.scores:
            for layer, scores in ledger.scores.items():
                options = stream.cache.options
                sink, recent = (
                    n * stream.cache.tokens_per_frame for n in (options.sink, options.recent_frames)
                )
                seen[f"pc/{rolls}/{layer}/scores"] = scores[:, sink : scores.shape[1] - recent]
                seen[f"pc/{rolls}/{layer}/selected"] = ledger.selected[layer]
            ledger.scores.clear()
            rolls += 1
    seen["latents"] = torch.cat(latents, dim=2).transpose(1, 2)
    return seen


def _stored(case: Case, stream: VideoStream) -> Tensors:
    """The tokens of every layer at the end, where the order of slots is the reference's own (compressed caches)."""
    cache = stream.cache
    if cache.ledger is None:
        return {}
    planner = cache.planner
    sink, recent = planner._split(planner.live_frames)
    slots = [
        *(planner.slot_of[f] for f in sink),
        *planner.compressed,
        *(planner.slot_of[f] for f in recent),
    ]
    tokens = cache.ledger._tokens(slots)
    got: Tensors = {}
    for layer in range(len(cache.keys)):
        keys = cache.keys[layer][:, tokens]
        if sink:  # may be turned on load
            keys[:, : len(sink) * cache.tokens_per_frame] = cache.stored(layer, sink)[0]
        got[f"cache/{layer}/k"] = keys
        got[f"cache/{layer}/v"] = cache.values[layer][:, tokens]
        got[f"cache/{layer}/token_id"] = cache.ledger.ids[layer][:, tokens]
    return got


def _compare(name: str, made: Tensors, case: Case, stream: VideoStream) -> Row:
    parts, got = name.split("/"), made.get(name)
    family, kind = parts[0], parts[-1]
    if kind in ("token_id", "selected"):
        return compare(name, got, case.outputs[name], EXACT)
    if kind == "scores":
        return compare(name, got, case.outputs[name], SCORES)
    if family == "cache" and got is None:
        return compare_cache(name, case, stream, stored_frames(case) or stream.cache.planner.live_frames)
    recorded = case.outputs[name]
    live = made.get(f"live_after_switch/{parts[1]}") if family == "cache_after_switch" else None
    if live is not None and len(live):
        recorded = recorded.unflatten(1, (-1, stream.cache.tokens_per_frame))
        count, end = recorded.shape[1], int(live[-1]) + 1
        if count > len(live):  # a buffer that holds frames beside those that are attended
            sink = case.settings["streaming"]["sink_size"]
            slots = [*range(sink), *range(end - count + sink, end)]
            recorded = recorded[:, [slots.index(frame) for frame in live.tolist()]]
        recorded = recorded.flatten(1, 2)
    return compare(name, got, recorded, TOLERANCES.get(family, LATENTS))


def stored_frames(case: Case) -> list[int] | None:
    """Frame of every slot of the recorded cache, in the reference's order, where it is recorded."""
    frames = case.settings.get("cache", {}).get("frames_in_slots")
    streaming, length = case.settings["streaming"], case.settings["latent"]["F"]
    capacity = streaming.get("cache_capacity_frames", streaming.get("cache_frames"))
    if frames is not None and len(frames) != min(length, capacity):
        raise UserError(
            f"{case.folder}/case.json: cache.frames_in_slots has {len(frames)} frames, which does not follow from "
            f"a cache of {capacity} frames: record the case again"
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
    rotated = stream.method.positions != "cache_relative"
    if stream.method.sampler == "rolling":  # the sink is stored as it came, everything else rotated
        sink = [frame for frame in kept if frame < stream.method.sink]
        parts = [
            cache.stored(int(layer), kept[: len(sink)], rotated=False),
            cache.stored(int(layer), kept[len(sink) :]),
        ]
        got = torch.cat([part["kv".index(kind)] for part in parts], 1)
    else:
        got = cache.stored(int(layer), kept, rotated)["kv".index(kind)]
    return compare(name, got, recorded, LATENTS)
