"""Published checkpoints to one pipeline folder in diffusers' layout, for `StreamVidPipeline.from_pretrained`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError

from streamvid.checkpoints import load_text_encoder, load_tokenizer, load_transformer, load_vae
from streamvid.errors import UserError
from streamvid.methods import load_method
from streamvid.models import DTYPES
from streamvid.pipelines.pipeline_streamvid import StreamVidPipeline
from streamvid.releases import RELEASES, Release
from streamvid.schedule import FewStepFlowScheduler


def convert(
    output: str | Path,
    *,
    transformer: str | Path,
    method: str | None = None,
    vae: str | Path | None = None,
    text_encoder: str | Path | None = None,
    tokenizer: str | Path | None = None,
    base: str | Path | None = None,
    lora: str | Path | None = None,
    release: str | None = None,
    which: str | None = None,
    head_dim: int | None = None,
    shift: float | None = None,
    steps: Sequence[float] | None = None,
    fps: float | None = None,
    height: int | None = None,
    width: int | None = None,
    dtype: str | None = None,
) -> Path:
    """Write a pipeline folder and return it. Keyword arguments are the flags of `streamvid convert`.

    Args:
        output: folder to write, new or empty.
        transformer: the generator's checkpoint, in any published form.
        method: preset the transformer was distilled for; its window travels with the model. None: the release's.
        vae, text_encoder, tokenizer: files or folders of the other parts.
        base: pipeline folder (diffusers' Wan2.1) that supplies the parts not given.
        lora: LoRA file merged into the transformer.
        release: published model that this is (streamvid.releases); gives everything below that is not given.
        which: `ema` or `raw` weights of the checkpoint; None prefers the averaged ones.
        head_dim: size of an attention head, where neither 128 nor told by a config.json.
        shift, steps: timestep shift and levels of the distillation (None without a release: 5; 1000, 750, 500, 250).
        fps, height, width: of the videos the model was trained on (None without a release: 16, 480, 832).
        dtype: of the transformer, float32, bfloat16 or float16; None keeps the file's.

    Raises:
        UserError: a part is missing, damaged or does not fit the others, or the folder cannot be written.
    """
    known = _release(release, method)
    method = method or known.method
    load_method(method)
    shift, steps = known.shift if shift is None else shift, known.steps if steps is None else tuple(steps)
    fps = known.fps if fps is None else fps
    height, width = known.height if height is None else height, known.width if width is None else width
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"dtype = {dtype!r} is not known: choose one of {', '.join(DTYPES)}")
    if fps <= 0:
        raise UserError(f"fps = {fps} must be positive, e.g. 16")
    if shift <= 0:
        raise UserError(f"shift = {shift} must be positive, e.g. 5")
    scheduler = FewStepFlowScheduler(shift=shift, denoising_steps=steps, warp=known.warp)
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"output = {output} exists already: give a new or an empty folder")
    if base is not None and not (Path(base) / "model_index.json").is_file():
        raise UserError(f"base = {base} is no pipeline folder: it should hold model_index.json")
    parts = {"vae": vae, "text_encoder": text_encoder, "tokenizer": tokenizer}
    absent = [name for name, path in parts.items() if path is None and base is None]
    if absent:
        raise UserError(f"{', '.join(absent)} of the pipeline not given: pass {', '.join(absent)}, or base")

    network = load_transformer(
        transformer,
        None if head_dim is None else {"attention_head_dim": head_dim},
        which=which,
        lora=lora,
        merge=True,
        dtype=None if dtype is None else DTYPES[dtype],
    )
    pipe = StreamVidPipeline(
        tokenizer=load_tokenizer(tokenizer or base),  # type: ignore[arg-type]
        text_encoder=load_text_encoder(text_encoder or base),  # type: ignore[arg-type]
        transformer=network,
        vae=load_vae(vae or base),  # type: ignore[arg-type]
        scheduler=scheduler,
        method=method,
        fps=fps,
        height=height,
        width=width,
        distilled_for=method,
    )
    _check_fit(pipe)
    try:
        pipe.save_pretrained(output)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"output = {output} cannot be written ({error}): choose another folder or free space"
        ) from None
    return output


def _release(name: str | None, method: str | None) -> Release:
    """What is known of a published model; without one, the family's usual settings."""
    if name is None:
        if method is None:
            raise UserError(
                f"method of the transformer not given: pass method, or release ({', '.join(RELEASES)})"
            )
        return Release("", method)
    if name not in RELEASES:
        raise UserError(f"release = {name!r} is not known: choose one of {', '.join(RELEASES)}")
    return RELEASES[name]


def _check_fit(pipe: StreamVidPipeline) -> None:
    """Parts of different models do not make a pipeline."""
    channels, text = pipe.transformer.config.in_channels, pipe.transformer.config.text_dim
    if pipe.vae.config.z_dim != channels:
        raise UserError(
            f"vae has {pipe.vae.config.z_dim} latent channels, the transformer {channels}: give its VAE"
        )
    if pipe.text_encoder.config.d_model != text:
        raise UserError(
            f"text_encoder has a width of {pipe.text_encoder.config.d_model}, the transformer expects {text}: "
            "give its text encoder"
        )
    pipe.latent_size(None, None)
