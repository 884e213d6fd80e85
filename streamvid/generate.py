"""`streamvid generate`: a script in, a video with its manifest out, written as the stream runs."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from streamvid.ahead import decode_ahead, decodes_beside
from streamvid.errors import UserError
from streamvid.io import ContactSheet, Manifest, ProgressBar, manifest_path, open_writer
from streamvid.io.files import prepare_output_file
from streamvid.io.writers import frame_rate
from streamvid.kernels.attention import attention_backend
from streamvid.kernels.check import verify
from streamvid.methods import load_method
from streamvid.models import DEFAULT_MODEL, load_pipeline, model_method
from streamvid.script import Script, to_dict
from streamvid.timeline import format_timeline


def generate(
    script: Script,
    output: str | Path,
    *,
    model: str | None = None,
    method: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    seed: int | None = None,
    height: int | None = None,
    width: int | None = None,
    fps: float | None = None,
    device: str = "auto",
    dtype: str = "auto",
    noise: str = "seeded",
    attention: str = "auto",
    check_attention: bool = False,
    decoder: str = "exact",
    weights: str = "native",
    text_encoder: str = "device",
    compiled: bool = False,
    crf: int | None = None,
    contact_sheet: str | Path | None = None,
    image: str | Path | None = None,
    video: str | Path | None = None,
    quiet: bool = False,
) -> Path:
    """Generate a script's video; what was written before an error stays and plays.

    Args:
        script: what to show; its own model, method, size, fps, seed and overrides count where no argument is given.
        output: `.mp4`, `.gif`, `.webp`, or a folder for PNG frames.
        crf: quality of an MP4, lower is better.
        check_attention: compare the attention backend with the reference on this machine first (streamvid.kernels.check).
        contact_sheet: PNG with a frame every two seconds; quiet: print nothing.
        The other arguments are those of `StreamVidPipeline.stream` and `load_pipeline`.

    Returns:
        The path of the video.
    """
    model = model or script.model or DEFAULT_MODEL
    # what can be refused before weights are loaded is
    ranges = (("height", height, 1, 8192), ("width", width, 1, 8192), ("seed", seed, 0, 2**63 - 1))
    for name, value, least, most in ranges:
        if value is not None and not least <= value <= most:
            raise UserError(f"{name} = {value} is out of range: give a number from {least} to {most}")
    if fps is not None:
        frame_rate(fps)
    attention_backend(attention)
    chosen = method or script.method or model_method(model)
    if chosen is not None:
        load_method(chosen, {**script.overrides, **(overrides or {})})
    options = {} if crf is None else {"crf": crf}
    if options and Path(output).suffix.lower() != ".mp4":
        raise UserError(f"crf = {crf} is for MP4 only and output is {str(output)!r}: leave it out")
    open_writer(output, fps or 16, **options).close()  # proves that it can be written and writes nothing
    if contact_sheet:
        # `--contact-sheet story.yaml` must not eat the script
        if Path(contact_sheet).suffix.lower() != ".png":
            raise UserError(f"contact sheet = {str(contact_sheet)!r} must be the name of a .png file")
        prepare_output_file(contact_sheet)

    prompts = tuple(dict.fromkeys(shot.prompt for shot in script.shots))
    pipe = load_pipeline(model, device, dtype, decoder, weights, text_encoder, prompts, compiled)
    if check_attention:
        verify(attention, pipe.transformer.device, pipe.transformer.dtype)
    beside = decodes_beside(pipe)
    seed = next((value for value in (seed, script.seed) if value is not None), 0)
    stream = pipe.stream(
        script,
        method=method,
        overrides=overrides,
        seed=seed,
        height=height,
        width=width,
        fps=fps,
        noise=noise,
        attention=attention,
        decode_pixels=not beside,
        image=image,
        video=video,
    )
    assert stream.timeline is not None
    if not quiet:
        print(format_timeline(stream.timeline))
    sheet = ContactSheet(stream.fps) if contact_sheet else None
    config = {"model": model, **asdict(stream.method), "dtype": str(pipe.transformer.dtype), "noise": noise}
    config |= {"decoder": decoder, "weights": weights, "compiled": compiled}
    config |= {name: str(given) for name, given in (("image", image), ("video", video)) if given is not None}
    with ExitStack() as stack:
        writer = stack.enter_context(open_writer(output, stream.fps, **options))
        manifest = stack.enter_context(
            Manifest(
                manifest_path(output),
                fps=stream.fps,
                video=Path(output).name,
                config=config,
                seed=seed,
                script=to_dict(script),
                timeline=[asdict(shot) for shot in stream.timeline.shots],
                device=str(pipe.transformer.device),
            )
        )
        if sheet is not None and contact_sheet is not None:
            stack.callback(sheet.save, contact_sheet)  # also after an error or Ctrl-C
        bar = stack.enter_context(ProgressBar(stream.fps, stream.timeline.frames, disable=quiet))
        for chunk in decode_ahead(stream) if beside else stream:
            writer.write(chunk.frames)
            manifest.add_chunk(
                frames=len(chunk.frames), prompt=chunk.prompt, timings=chunk.timings, events=chunk.events
            )
            if sheet is not None:
                sheet.add(chunk.frames, chunk.prompt)
            bar.update(len(chunk.frames), chunk.prompt)
    return Path(output)
