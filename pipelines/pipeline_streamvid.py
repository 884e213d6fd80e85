"""The diffusers-style pipeline. `pipe.stream(script)` is the engine; `pipe(...)` is a loop over it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan, DiffusionPipeline
from PIL import Image
from streamvid.pipelines.pipeline_output import StreamVidPipelineOutput
from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

from streamvid.errors import UserError
from streamvid.methods import Method, load_method
from streamvid.noise import NoiseSource, ReferenceNoise, SeededNoise
from streamvid.saving import load_stream
from streamvid.schedule import FewStepFlowScheduler
from streamvid.script import Script, load_script, timeline
from streamvid.script_fields import MAX_PROMPT_CHARACTERS
from streamvid.stream import PromptChange, VideoStream
from streamvid.text import encode_prompts
from streamvid.tiny_decoder import TinyDecoder
from streamvid.transformer import CausalWanTransformer3DModel

NOISE_ORDERS = ("seeded", "reference")
OUTPUT_TYPES = ("pil", "np", "pt", "latent")


class StreamVidPipeline(DiffusionPipeline):
    """Text to endless video, block by block.

    Args:
        tokenizer, text_encoder, transformer, vae, scheduler: the model's parts.
        method: preset the model was made for (`configs/methods`), used where a caller names none.
        fps: frames per second of the videos the model was trained on.
        height, width: pixel size it was trained on.
        distilled_for: preset that a converted model was distilled for; playing it with another one is warned of.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    tiny_decoder: TinyDecoder | None = None

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        text_encoder: UMT5EncoderModel,
        transformer: CausalWanTransformer3DModel,
        vae: AutoencoderKLWan,
        scheduler: FewStepFlowScheduler,
        method: str = "longlive",
        fps: float = 16.0,
        height: int = 480,
        width: int = 832,
        distilled_for: str | None = None,
    ):
        super().__init__()
        self.register_modules(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            transformer=transformer,
            vae=vae,
            scheduler=scheduler,
        )
        self.register_to_config(
            method=method, fps=fps, height=height, width=width, distilled_for=distilled_for
        )

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
            UserError: one is empty or too long.
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
        return prompts

    def encode_prompt(self, prompt: str | Sequence[str]) -> torch.Tensor:
        """Text embeddings `[B, text_len, D]`."""
        return encode_prompts(
            self.tokenizer, self.text_encoder, self.check_prompts(prompt), self.transformer.config.text_len
        )

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
        seed: int | Sequence[int] | None = None,
        height: int | None = None,
        width: int | None = None,
        fps: float | None = None,
        blocks: int | None = None,
        noise: str | NoiseSource = "seeded",
        attention: str = "auto",
        decode_pixels: bool = True,
    ) -> VideoStream:
        """Start a stream.

        Args:
            script: a `Script` (or its path or one-line form with durations), which ends by itself; or a plain prompt
                or list of prompts (one video each), which never ends unless `blocks` is given.
            method: a preset's name or a `Method`; default: the script's, else the model's.
            overrides: single options of the method, on top of the script's.
            seed: of the noise, one number (video i of a batch uses seed + i) or one per video.
            height, width, fps: of the video; default: the script's, else the model's.
            blocks: stop after so many blocks at the latest.
            noise: `seeded` (from seed, block and step), `reference` (the releases' draw order), or a noise source.
            attention: attention backend; decode_pixels: False leaves `chunk.videos` empty.
        """
        plan = self._as_script(script)
        if plan is not None:
            first_shot = plan.shots[0]
            prompts = self.check_prompts(first_shot.prompt)
            method = method or plan.method
            overrides = {**plan.overrides, **(overrides or {})}
            seed = plan.seed if seed is None else seed
            height, width = plan.height if height is None else height, plan.width if width is None else width
            fps = plan.fps if fps is None else fps
            first = PromptChange(prompts, None, first_shot.seed, first_shot.overrides)
        else:
            prompts = self.check_prompts(script)  # type: ignore[arg-type]
            first = PromptChange(prompts)
        chosen = self._method(method, overrides)
        fps = self.config.fps if fps is None else fps
        for name, value in (("fps", fps), ("blocks", blocks)):
            if value is not None and not value > 0:
                raise UserError(f"{name} = {value} must be above 0")
        shots = (
            None
            if plan is None
            else timeline(plan, fps, chosen.frames_per_block, self.temporal_ratio, chosen.transition)
        )
        size = self.latent_size(height, width)
        length = (
            shots.blocks if shots is not None else blocks
        )  # of the clip whose noise the releases draw at once
        frames = None if length is None else length * chosen.frames_per_block
        source = self._noise(noise, seed, len(prompts), frames, (self.transformer.config.in_channels, *size))
        return VideoStream(self, chosen, first, size, source, fps, shots, blocks, attention, decode_pixels)

    def load_stream(self, path: str | Path) -> VideoStream:
        """Go on with a stream that `VideoStream.save` has written.

        Raises:
            UserError: the file is damaged, or was saved from another model.
        """
        return load_stream(self, path)

    def _method(self, method: str | Method | None, overrides: Mapping[str, Any] | None) -> Method:
        chosen = method if isinstance(method, Method) else load_method(method or self.config.method)
        if self.config.distilled_for not in (None, chosen.name):
            warnings.warn(
                f"method = {chosen.name} is not {self.config.distilled_for}, which this model was distilled for: "
                "expect other pictures than its authors'",
                stacklevel=3,
            )
        return chosen.with_overrides(overrides or {})

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

    def _noise(
        self, noise, seed, batch: int, frames: int | None, frame_shape: tuple[int, int, int]
    ) -> NoiseSource:
        if callable(noise):
            return noise
        seed = 0 if seed is None else seed
        if noise == "seeded":
            seeds = [seed + i for i in range(batch)] if isinstance(seed, int) else list(seed)
            if not all(isinstance(number, int) and number >= 0 for number in seeds):
                raise UserError(f"seed = {seed} must be a whole number from 0, or a list of them")
            if len(seeds) != batch:
                raise UserError(
                    f"seed = {seeds} has {len(seeds)} numbers for {batch} videos: give one per video"
                )
            return SeededNoise(seeds, frame_shape)
        if noise == "reference":
            if frames is None:
                raise UserError(
                    "noise = 'reference' needs a known length: give blocks or a script with durations"
                )
            if not isinstance(seed, int):
                raise UserError(f"seed = {seed} must be one number with noise = 'reference'")
            return ReferenceNoise(seed, batch, frames, frame_shape, self.transformer.device)
        raise UserError(f"noise = {noise!r} is not known: choose one of {', '.join(NOISE_ORDERS)}")

    @torch.no_grad()
    def __call__(
        self,
        prompt: Script | str | Path | Sequence[str],
        num_frames: int | None = None,
        *,
        output_type: str = "pil",
        return_dict: bool = True,
        **options: Any,
    ) -> StreamVidPipelineOutput | tuple[Any]:
        """Whole videos in memory: at least `num_frames` pixel frames are generated, exactly that many returned.

        Args:
            prompt: as in `stream`; a script brings its own length.
            num_frames: pixel frames, default 81 (5 s at 16 fps), or what `blocks` gives.
            output_type: `pil`, `np`, `pt` or `latent` (see `StreamVidPipelineOutput`).
            options: those of `stream`.
        """
        if output_type not in OUTPUT_TYPES:
            raise UserError(
                f"output_type = {output_type!r} is not known: choose one of {', '.join(OUTPUT_TYPES)}"
            )
        if num_frames is not None and num_frames < 1:
            raise UserError(f"num_frames = {num_frames} must be at least 1")
        script = self._as_script(prompt)
        if script is None:
            method = self._method(options.pop("method", None), options.pop("overrides", None))
            if num_frames is None and options.get("blocks") is None:
                num_frames = 81
            if num_frames is not None:
                options["blocks"] = -(-self._latent_frames(num_frames) // method.frames_per_block)
            options["method"] = method
        stream = self.stream(
            prompt if script is None else script, decode_pixels=output_type != "latent", **options
        )
        with self.progress_bar(total=stream.blocks) as bar:
            chunks = []
            for chunk in stream:
                chunks.append(chunk)
                bar.update()
        frames = self._gather(chunks, num_frames if script is None else None, output_type)
        return StreamVidPipelineOutput(frames=frames) if return_dict else (frames,)

    def _latent_frames(self, num_frames: int) -> int:
        """Latent frames that give at least so many pixel frames."""
        return 1 + -(-(num_frames - 1) // self.temporal_ratio)

    def _gather(self, chunks, num_frames: int | None, output_type: str):
        if output_type == "latent":
            latents = torch.cat([chunk.latents for chunk in chunks], dim=2)
            return latents if num_frames is None else latents[:, :, : self._latent_frames(num_frames)]
        videos = np.concatenate([chunk.videos for chunk in chunks], axis=1)[:, : num_frames or None]
        if output_type == "pil":
            return [[Image.fromarray(frame) for frame in video] for video in videos]
        scaled = videos.astype(np.float32) / 255
        return scaled if output_type == "np" else torch.from_numpy(scaled).permute(0, 1, 4, 2, 3)
