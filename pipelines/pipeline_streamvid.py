"""The diffusers-style pipeline. `pipe.stream(script)` is the engine; `pipe(...)` is a loop over it."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan, DiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from streamvid.pipelines.lora import StreamVidLoraMixin
from streamvid.pipelines.pipeline_output import (
    StreamVidPipelineOutput,
    as_output_type,
    check_output_type,
)
from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

from streamvid.errors import UserError
from streamvid.given import encode_frames, fill_blocks, frames_of, given_clips
from streamvid.methods import Method, load_method
from streamvid.models import embedded_models
from streamvid.noise import NoiseSource, drawn_seed, noise_source
from streamvid.schedule import FewStepFlowScheduler
from streamvid.script import Script, load_script
from streamvid.script_fields import MAX_PROMPT_CHARACTERS
from streamvid.stream import Chunk, PromptChange, VideoStream
from streamvid.stream_file import load_stream
from streamvid.text import PromptCache
from streamvid.timeline import timeline
from streamvid.tiny_decoder import TinyDecoder
from streamvid.transformer import CausalWanTransformer3DModel

# (pipeline, step or chunk, its time, what can be seen) -> what shall be changed
EndCallback = Callable[[Any, int, Any, dict[str, Any]], dict[str, Any] | None]
# arguments of other pipelines that have nothing to act on here: values that ask for nothing, and why others are refused
FOREIGN_OPTIONS: dict[str, tuple[tuple[Any, ...], str]] = {
    "negative_prompt": (
        (None, ""),
        "a few-step student makes no second, unconditioned prediction to steer away from",
    ),
    "guidance_scale": ((None, 1.0), "guidance was distilled into the weights of a few-step student"),
}


class StreamVidPipeline(StreamVidLoraMixin, DiffusionPipeline):
    """Text to endless video, block by block.

    Args:
        tokenizer, text_encoder, transformer, vae, scheduler: the model's parts; without the first two, only prompts that
            are in `prompt_cache` can be streamed.
        method: preset the model was made for (`configs/methods`), used where a caller names none.
        fps: frames per second of the videos the model was trained on.
        height, width: pixel size it was trained on.
        distilled_for: preset that a converted model was distilled for; playing it with another one is warned of.
        tiny_decoder: makes the pixels in the VAE's place.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae->tiny_decoder"
    _optional_components = ["tokenizer", "text_encoder", "tiny_decoder"]
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        text_encoder: UMT5EncoderModel | None,
        transformer: CausalWanTransformer3DModel,
        vae: AutoencoderKLWan,
        scheduler: FewStepFlowScheduler,
        method: str = "longlive",
        fps: float = 16.0,
        height: int = 480,
        width: int = 832,
        distilled_for: str | None = None,
        tiny_decoder: TinyDecoder | None = None,
    ):
        super().__init__()
        self.register_modules(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            transformer=transformer,
            vae=vae,
            scheduler=scheduler,
            tiny_decoder=tiny_decoder,
        )
        self.register_to_config(
            method=method, fps=fps, height=height, width=width, distilled_for=distilled_for
        )
        self.prompt_cache = PromptCache()
        self._interrupt = False

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> StreamVidPipeline:
        """As in diffusers: a folder or a hub id, or the name of an embedded model."""
        name = str(pretrained_model_name_or_path)
        return super().from_pretrained(str(embedded_models().get(name, name)), **kwargs)

    @property
    def interrupt(self) -> bool:
        """Set `_interrupt` in a callback to end a call with the chunk in the making."""
        return self._interrupt

    @property
    def decoder(self) -> AutoencoderKLWan | TinyDecoder:
        """What makes pixels: the VAE, or the tiny decoder where there is one."""
        return self.tiny_decoder or self.vae

    @property
    def temporal_ratio(self) -> int:
        """Pixel frames per latent frame."""
        return 2 ** sum(self.vae.config.temperal_downsample)

    @property
    def spatial_ratio(self) -> int:
        """Pixels per latent row or column."""
        return 2 ** len(self.vae.config.temperal_downsample) * (self.vae.config.patch_size or 1)

    def check_prompts(self, prompt: str | Sequence[str]) -> tuple[str, ...]:
        """One or several prompts as a tuple.

        Raises:
            UserError: one is empty or too long, or was not encoded before the text encoder was freed.
        """
        prompts = tuple(prompt) if isinstance(prompt, (list, tuple)) else (prompt,)
        for text in prompts or [""]:
            if not isinstance(text, str):
                raise UserError(f"prompt = {text!r} must be a text or a list of texts")
            if not text.strip():
                raise UserError(f"prompt = {text!r} is empty: say what the video shall show")
            if len(text) > MAX_PROMPT_CHARACTERS:
                raise UserError(
                    f"prompt = {text[:30]!r}... has {len(text)} characters: shorten it to {MAX_PROMPT_CHARACTERS}"
                )
        if self.text_encoder is None:
            self.encode_prompt(prompts)
        return prompts

    def encode_prompt(self, prompt: str | Sequence[str]) -> torch.Tensor:
        """Text embeddings `[B, text_len, D]` on the CPU; each prompt is encoded once, while it stays in `prompt_cache`."""
        prompts = [prompt] if isinstance(prompt, str) else prompt
        return self.prompt_cache.encode(
            self.tokenizer, self.text_encoder, prompts, self.transformer.config.text_len
        )

    def encode_script(self, script: Script | str | Path | Sequence[str]) -> dict[str, torch.Tensor]:
        """Encode all prompts of a script, or of `stream`'s other forms, now; afterwards `pipe.text_encoder = None` frees the
        encoder, and the script still streams.

        Returns:
            The embedding `[text_len, D]` of every prompt.
        """
        plan = self._as_script(script)
        texts = script if plan is None else [shot.prompt for shot in plan.shots]
        prompts = list(dict.fromkeys(self.check_prompts(texts)))  # type: ignore[arg-type]
        self.prompt_cache.limit = max(self.prompt_cache.limit, len(prompts))
        return dict(zip(prompts, self.encode_prompt(prompts), strict=True))

    def latent_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Latent rows and columns of a pixel size (default: the model's).

        Raises:
            UserError: the size does not fill the patches.
        """
        size = []
        for name, value, axis in (
            ("height", self.config.height if height is None else height, 1),
            ("width", self.config.width if width is None else width, 2),
        ):
            unit = self.spatial_ratio * self.transformer.config.patch_size[axis]
            if value <= 0 or value % unit:
                raise UserError(
                    f"{name} = {value} must be a positive multiple of {unit}, e.g. {max(unit, round(value / unit) * unit)}"
                )
            size.append(value // self.spatial_ratio)
        return size[0], size[1]

    def stream(
        self,
        script: Script | str | Path | Sequence[str],
        *,
        method: str | Method | None = None,
        overrides: Mapping[str, Any] | None = None,
        num_inference_steps: int | None = None,
        num_videos_per_prompt: int = 1,
        seed: int | Sequence[int] | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        height: int | None = None,
        width: int | None = None,
        fps: float | None = None,
        blocks: int | None = None,
        noise: str | NoiseSource = "seeded",
        attention: str | None = None,
        decode_pixels: bool = True,
        context_pass: str = "auto",
        image: Any = None,
        video: Any = None,
    ) -> VideoStream:
        """Start a stream.

        Args:
            script: a `Script` (or its path or one-line form with durations), which ends by itself; or a plain prompt
                or list of prompts (one video each), which never ends unless `blocks` is given.
            method: a preset's name or a `Method`; default: the script's, else the model's.
            overrides: single options of the method, on top of the script's.
            num_inference_steps: as many evenly spaced levels from 1000 down in place of those the model was trained with.
            num_videos_per_prompt: videos of every prompt, one after the other in the batch.
            seed: of the noise, one number (video i of a batch uses seed + i) or one per video.
            generator: draws the seed in its place; with one per video, each draws its own.
            height, width, fps: of the video; default: the script's, else the model's.
            blocks: stop after so many blocks at the latest.
            noise: `seeded` (from seed, block and step), `reference` (the releases' draw order), or a noise source.
            attention: attention backend; default: the transformer's (`set_attention_backend`).
            decode_pixels: False leaves `chunk.videos` empty.
            context_pass: of a finished block: `separate`, or `joint` with the next block's first step (`VideoStream`).
            image, video: a picture or a clip to go on from (`streamvid.given` says in which forms). It is scaled to cover
                the size, cut around its middle, encoded, and taken for blocks made before the first one; the chunks begin
                after it. A picture stands still for one block; of a clip, the last frames that fill whole blocks are taken.
        """
        if image is not None and video is not None:
            raise UserError("image and video are both given: leave one of them out")
        self._warn_of_tiling()
        for name, value in (
            ("fps", fps),
            ("blocks", blocks),
            ("num_videos_per_prompt", num_videos_per_prompt),
        ):
            if value is not None and not value > 0:
                raise UserError(f"{name} = {value} must be above 0")
        plan = self._as_script(script)
        if plan is not None:
            first_shot = plan.shots[0]
            prompts = self.check_prompts(first_shot.prompt)
            method = method or plan.method
            overrides = {**plan.overrides, **(overrides or {})}
            seed = plan.seed if seed is None and generator is None else seed
            height, width = plan.height if height is None else height, plan.width if width is None else width
            fps = plan.fps if fps is None else fps
            first = PromptChange(prompts, None, first_shot.seed, first_shot.overrides)
        else:
            prompts = self.check_prompts(script)  # type: ignore[arg-type]
            first = PromptChange(prompts)
        prompts = tuple(prompt for prompt in prompts for _ in range(num_videos_per_prompt))
        first = replace(first, prompts=prompts)
        chosen = self._method(method, overrides, num_inference_steps)
        fps = self.config.fps if fps is None else fps
        shots = None
        if plan is not None:
            per_block, ratio = chosen.frames_per_block, self.temporal_ratio
            continued = image is not None or video is not None
            shots = timeline(plan, fps, per_block, ratio, chosen.transition, continued)
        size = self.latent_size(height, width)
        length = blocks if shots is None else shots.blocks
        frames = None if length is None else length * chosen.frames_per_block
        seed = seed if generator is None else drawn_seed(generator, seed, noise, len(prompts))
        shape = self.transformer.config.in_channels, *size
        source = noise_source(noise, seed, len(prompts), frames, shape, self.transformer.device)
        attention = attention or self.transformer.attention_name
        stream = VideoStream(
            self, chosen, first, size, source, fps, shots, blocks, attention, decode_pixels, context_pass
        )
        for kind, given in (("image", image), ("video", video)):
            if given is not None:
                stream.begin_with(
                    self._given_latents(kind, given, len(prompts), size, chosen.frames_per_block)
                )
        return stream

    def _warn_of_tiling(self) -> None:
        """What is set on the VAE for its own `decode` does not reach a stream's decoder."""
        for option in ("tiling", "slicing"):
            if getattr(self.vae, f"use_{option}", False):
                warnings.warn(
                    f"vae.enable_{option}() has no effect on streams, which decode block by block in whole pictures: for "
                    "less memory take a tiny decoder, a smaller size or one video at a time",
                    stacklevel=3,
                )

    def _given_latents(
        self, kind: str, given: Any, videos: int, size: tuple[int, int], frames_per_block: int
    ) -> torch.Tensor:
        """Clean latents `[B, C, F, H, W]` of a given picture or clip, whole blocks."""
        height, width = (n * self.spatial_ratio for n in size)
        clips = [frames_of(kind, clip, height, width) for clip in given_clips(kind, given, videos)]
        if len({len(clip) for clip in clips}) > 1:
            raise UserError("video has clips of different lengths: cut them to one length")
        filled = [fill_blocks(clip, frames_per_block, self.temporal_ratio) for clip in clips]
        return encode_frames(self.vae, np.stack(filled))

    def load_stream(self, path: str | Path) -> VideoStream:
        """Go on with a stream that `VideoStream.save` has written.

        Raises:
            UserError: the file is damaged, or was saved from another model.
        """
        return load_stream(self, path)

    def _method(
        self,
        method: str | Method | None,
        overrides: Mapping[str, Any] | None,
        num_inference_steps: int | None = None,
    ) -> Method:
        chosen = method if isinstance(method, Method) else load_method(method or self.config.method)
        if self.config.distilled_for not in (None, chosen.name):
            warnings.warn(
                f"method = {chosen.name} is not {self.config.distilled_for}, which this model was distilled for: "
                "expect other pictures than its authors'",
                stacklevel=3,
            )
        overrides = dict(overrides or {})
        if num_inference_steps is not None:
            total = self.scheduler.config.num_train_timesteps
            if not 0 < num_inference_steps <= total or overrides.get("denoising_steps"):
                raise UserError(
                    f"num_inference_steps = {num_inference_steps} must be between 1 and {total}, "
                    "and excludes overrides of denoising_steps, which name the levels themselves"
                )
            overrides["denoising_steps"] = [
                total * (num_inference_steps - i) / num_inference_steps for i in range(num_inference_steps)
            ]
        return chosen.with_overrides(overrides)

    def _as_script(self, script: Script | str | Path | Sequence[str]) -> Script | None:
        if isinstance(script, Script):
            return script
        if isinstance(script, Path):
            return load_script(script)
        if isinstance(script, str) and (
            "[" in script or "|" in script or script.endswith((".yaml", ".yml", ".json", ".jsonl", ".txt"))
        ):
            return load_script(script)
        return None

    @torch.no_grad()
    def __call__(
        self,
        prompt: Script | str | Path | Sequence[str],
        num_frames: int | None = None,
        *,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: EndCallback | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        callback_on_chunk_end: EndCallback | None = None,
        **options: Any,
    ) -> StreamVidPipelineOutput | tuple[Any]:
        """Whole videos in memory: at least `num_frames` pixel frames are generated, exactly that many returned.

        Args:
            prompt: as in `stream`; a script brings its own length.
            num_frames: pixel frames, default 81 (5 s at 16 fps), or what `blocks` gives.
            output_type: `pil`, `np`, `pt` or `latent` (see `StreamVidPipelineOutput`).
            return_dict: False returns a tuple.
            callback_on_step_end: called as in diffusers with the pipeline, the number of the denoising step in this call,
                its timestep and `{"latents": ...}`: what the next step starts from, of the block being made (all of those
                denoised together); the latents of the dictionary that it returns take their place.
            callback_on_step_end_tensor_inputs: what it is given.
            callback_on_chunk_end: called with the pipeline, the chunk's index, its media time in s, and `{"chunk": ...,
                "stream": ...}`, through which the video can be steered.
            options: those of `stream`.
        """
        check_output_type(output_type)
        decode = output_type != "latent"
        stream, num_frames = self.stream_whole(prompt, num_frames, decode_pixels=decode, **options)
        if callback_on_step_end is not None:
            stream.sampler.on_step_end = self._step_end(
                callback_on_step_end, callback_on_step_end_tensor_inputs
            )
        self._interrupt = False
        chunks: list[Chunk] = []
        with self.progress_bar(total=stream.blocks) as bar:
            for chunk in stream:
                chunks.append(chunk)
                bar.update()
                if callback_on_chunk_end is not None:
                    seen = {"chunk": chunk, "stream": stream}
                    callback_on_chunk_end(self, chunk.index, chunk.media_time, seen)
                if self.interrupt:
                    break
        if decode:
            videos = np.concatenate([chunk.videos for chunk in chunks], axis=1)[:, :num_frames]
            frames = as_output_type(videos, output_type)
        else:
            frames = torch.cat([chunk.latents for chunk in chunks], dim=2)
            if num_frames is not None:
                frames = frames[:, :, : self.latent_frames(num_frames, stream.given is not None)]
        self.maybe_free_model_hooks()
        return StreamVidPipelineOutput(frames=frames) if return_dict else (frames,)

    def stream_whole(
        self, prompt: Script | str | Path | Sequence[str], num_frames: int | None = None, **options: Any
    ) -> tuple[VideoStream, int | None]:
        """A stream that ends by itself, and how many of its pixel frames a call returns (None: all).

        Raises:
            UserError: besides what `stream` raises, an option that does not exist.
        """
        known = [name for name in inspect.signature(self.stream).parameters if name != "script"]
        for name in list(options):
            if name not in known:
                nothing, why = FOREIGN_OPTIONS.get(name, ((), ""))
                if options[name] in nothing:
                    del options[name]
                    continue
                raise UserError(
                    f"{name} has no effect here, {why}: leave it out"
                    if why
                    else f"option {name} is not known: choose from num_frames, {', '.join(known)}"
                )
        if num_frames is not None and num_frames < 1:
            raise UserError(f"num_frames = {num_frames} must be at least 1")
        script = self._as_script(prompt)
        if script is not None:
            return self.stream(script, **options), None
        if num_frames is None and options.get("blocks") is None:
            num_frames = 81
        if num_frames is not None:
            steps = options.pop("num_inference_steps", None)
            method = self._method(options.pop("method", None), options.pop("overrides", None), steps)
            continued = options.get("image") is not None or options.get("video") is not None
            blocks = -(-self.latent_frames(num_frames, continued) // method.frames_per_block)
            options |= {"method": method, "blocks": blocks}
        return self.stream(prompt, **options), num_frames

    def latent_frames(self, num_frames: int, continued: bool = False) -> int:
        """Latent frames that give at least so many pixel frames; `continued`: after given ones."""
        missing = 0 if continued else self.temporal_ratio - 1  # of the first latent frame, which gives one
        return -(-(num_frames + missing) // self.temporal_ratio)

    def _step_end(self, callback: EndCallback, names: Sequence[str]):
        """diffusers' callback as a sampler calls it."""
        if isinstance(callback, PipelineCallback | MultiPipelineCallbacks):
            names = callback.tensor_inputs
        unknown = [name for name in names if name not in self._callback_tensor_inputs]
        if unknown:
            raise UserError(
                f"callback_on_step_end_tensor_inputs = {unknown[0]!r} is not known: choose from "
                f"{', '.join(self._callback_tensor_inputs)}"
            )
        step = -1

        def on_step_end(timestep: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
            nonlocal step
            step += 1
            given = {"latents": latents} if "latents" in names else {}
            changed = callback(self, step, timestep, given) or {}
            return changed.get("latents", latents)

        return on_step_end
