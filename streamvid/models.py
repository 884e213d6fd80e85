"""From the name of a model to a pipeline: the embedded one, a local folder, or a hub id."""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from streamvid.errors import UserError
from streamvid.methods import load_method
from streamvid.quantization import WEIGHTS, quantise
from streamvid.text import encode_prompts
from streamvid.world.probe import AttributeProbe

if TYPE_CHECKING:
    from streamvid.pipelines.pipeline_streamvid import StreamVidPipeline

DEFAULT_MODEL = "diorama"
TEXT_ENCODERS = ("device", "cpu", "free")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def embedded_models() -> dict[str, Path]:
    """Models shipped with the package: name to folder."""
    root = Path(str(resources.files("streamvid") / "embedded"))
    return {path.parent.name: path.parent for path in sorted(root.glob("*/model_index.json"))}


def resolve_model(name: str) -> str:
    """What `from_pretrained` takes: a folder, or a hub id (`owner/name`).

    Raises:
        UserError: neither an embedded model, nor a folder with a `model_index.json`, nor a hub id.
    """
    models = embedded_models()
    if name in models:
        return str(models[name])
    folder = Path(name)
    if folder.is_dir():
        if (folder / "model_index.json").is_file():
            return name
        raise UserError(
            f"model = {name!r} is a folder without model_index.json: make one with `streamvid convert`"
        )
    if folder.is_file():
        raise UserError(f"model = {name!r} is a single file: turn it into a folder with `streamvid convert`")
    parts = name.split("/")
    if len(parts) == 2 and all(part and not part.startswith(".") for part in parts):
        return name
    near = difflib.get_close_matches(name, models, 1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    known = ", ".join([*models, "a folder with model_index.json"])
    raise UserError(f"model = {name!r} is not known{hint}: give {known}, or a hub id")


def load_probe(model: str) -> AttributeProbe | None:
    """The probe shipped with a model of the embedded world; None for other models."""
    file = Path(resolve_model(model)) / "probe" / "probe.safetensors"
    return AttributeProbe.load(file) if file.is_file() else None


def choose_device(name: str = "auto") -> torch.device:
    """The device to run on; `auto` prefers CUDA, then MPS, then the CPU.

    Raises:
        UserError: it does not exist here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"device = {name!r} is not a device to run on: give cpu, cuda, cuda:0 or mps")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device = {name!r} asks for CUDA, which is not available here: use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"device = {name!r} does not exist: there are {torch.cuda.device_count()} CUDA devices"
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"device = {name!r} is not available here: use --device cpu")
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The number format to run in; `auto` is bfloat16 where the device multiplies it fast, else float32.

    Raises:
        UserError: not a known name.
    """
    if name != "auto":
        if name not in DTYPES:
            raise UserError(f"dtype = {name!r} is not known: choose one of auto, {', '.join(DTYPES)}")
        return DTYPES[name]
    if device.type == "cpu":
        return torch.bfloat16 if cpu_multiplies_bfloat16() else torch.float32
    return torch.bfloat16


def cpu_multiplies_bfloat16() -> bool:
    """Whether this CPU has bfloat16 products (AVX512-BF16 or AMX)."""
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in names)


def load_pipeline(
    model: str = DEFAULT_MODEL,
    device: str = "auto",
    dtype: str = "auto",
    decoder: str = "exact",
    weights: str = "native",
    text_encoder: str = "device",
    prompts: Sequence[str] = (),
    compiled: bool = False,
) -> StreamVidPipeline:
    """Load a model's pipeline.

    Args:
        model: an embedded model, a folder, or a hub id.
        device, dtype: `auto` chooses (`choose_device`, `choose_dtype`).
        decoder: `exact` (the VAE's), `tiny` (the model's folder `tiny_decoder`), or the path of another tiny decoder.
        weights: of the transformer's blocks, `native` or one of `streamvid.quantization.WEIGHTS`.
        text_encoder: where it lies: on the `device`; on the `cpu` beside a GPU; or `free`: it encodes `prompts` and makes
            room before anything else is loaded, and no other prompts can be streamed.
        compiled: the transformer's blocks, by `torch.compile`, when they are first called.
    """
    from streamvid.checkpoints import load_tokenizer, load_transformer, load_vae
    from streamvid.decoding import channels_last
    from streamvid.pipelines.pipeline_streamvid import StreamVidPipeline
    from streamvid.tiny_decoder import load_tiny_decoder

    source, target = resolve_model(model), choose_device(device)
    number = choose_dtype(dtype, target)
    if weights not in WEIGHTS:
        raise UserError(f"weights = {weights!r} is not known: choose one of {', '.join(WEIGHTS)}")
    if text_encoder not in TEXT_ENCODERS or (text_encoder == "cpu" and target.type == "cpu"):
        raise UserError(
            f"text_encoder = {text_encoder!r} is not possible on {target}: choose one of {', '.join(TEXT_ENCODERS)}, "
            "cpu only beside a GPU"
        )
    try:
        with _quiet_libraries():
            folder = Path(source) if Path(source).is_dir() else Path(StreamVidPipeline.download(source))
            encoder, embeddings = _text_encoder(folder, number), {}
            if text_encoder == "free":
                length = json.loads((folder / "transformer" / "config.json").read_text()).get("text_len", 512)
                tokenizer, encoder = load_tokenizer(folder), encoder.to(target)
                embeddings = {text: encode_prompts(tokenizer, encoder, [text], length)[0] for text in prompts}
                encoder = None
            # not by `from_pretrained`, which goes on with random weights where tensors are missing
            parts = {
                "transformer": load_transformer(folder, dtype=number),
                "vae": channels_last(load_vae(folder, dtype=number)),
                "text_encoder": encoder,
            }
            place = folder / "tiny_decoder" if decoder == "tiny" else decoder
            tiny = None if decoder == "exact" else load_tiny_decoder(place, number)
            pipe = StreamVidPipeline.from_pretrained(folder, dtype=number, tiny_decoder=tiny, **parts)
            check_parts(pipe)
            pipe.prompt_cache.limit = max(pipe.prompt_cache.limit, len(embeddings))
            for text, embedding in embeddings.items():
                pipe.prompt_cache.put(text, embedding)
            if text_encoder == "cpu":
                for part in filter(None, (pipe.transformer, pipe.vae, pipe.tiny_decoder)):
                    part.to(target)
            else:
                pipe.to(target)
            quantise(pipe.transformer, weights)
            if compiled:
                pipe.transformer.compile_repeated_blocks()
            return pipe
    except UserError:
        raise
    except Exception as error:  # whatever the libraries raise for a broken or missing model
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"model = {model!r} cannot be loaded ({type(error).__name__}: {reason}): "
            "check its name and its files, or download it again"
        ) from error


def _text_encoder(folder: Path, dtype: torch.dtype) -> Any:
    """The text encoder of a model's folder; not one whose tensors are missing."""
    from transformers import UMT5EncoderModel

    encoder, report = UMT5EncoderModel.from_pretrained(
        folder / "text_encoder", dtype=dtype, output_loading_info=True
    )
    if report["missing_keys"]:
        raise UserError(
            f"{folder / 'text_encoder'} lacks {len(report['missing_keys'])} tensors "
            f"({min(report['missing_keys'])}, ...): download it again"
        )
    return encoder


def check_parts(pipe: StreamVidPipeline) -> None:
    """Parts of different models do not make a pipeline.

    Raises:
        UserError: a part is of another kind, or of sizes that do not fit the others.
    """
    from streamvid.schedule import FewStepFlowScheduler

    if not isinstance(pipe.scheduler, FewStepFlowScheduler):
        raise UserError(
            f"scheduler is a {type(pipe.scheduler).__name__} and not a FewStepFlowScheduler, so this is no few-step "
            "student: make a model folder of one with `streamvid convert`"
        )
    config = pipe.transformer.config
    text_width = None if pipe.text_encoder is None else pipe.text_encoder.config.d_model
    for given, expected, what, fix in (
        (pipe.vae.config.z_dim, config.in_channels, "vae has {} latent channels", "vae"),
        (config.out_channels, config.in_channels, "transformer has {} output channels", "transformer"),
        (text_width, config.text_dim, "text_encoder has a width of {}", "text encoder"),
    ):
        if given not in (None, expected):
            raise UserError(
                f"{what.format(given)}, the transformer expects {expected}: give the {fix} of the same model"
            )
    load_method(pipe.config.method)


def model_method(model: str) -> str | None:
    """The method a model was made for, without loading it; None where its index is not on this machine."""
    index = Path(resolve_model(model)) / "model_index.json"
    try:
        return json.loads(index.read_text())["method"]
    except (OSError, ValueError, KeyError):  # loading will tell
        return None


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """No progress bars and no reports from diffusers and transformers: what matters becomes an error of ours."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    libraries = (diffusers_logging, transformers_logging)
    levels = [library.get_verbosity() for library in libraries]
    try:
        for library in libraries:
            library.set_verbosity(logging.CRITICAL)
        yield
    finally:
        for library, level in zip(libraries, levels, strict=True):
            library.set_verbosity(level)


def describe_model(name: str) -> dict[str, Any]:
    """Facts of an embedded model: sizes, method, and what its card says in numbers."""
    folder = embedded_models()[name]
    index = json.loads((folder / "model_index.json").read_text())
    files = folder.rglob("*.safetensors")
    return {
        "name": name,
        "bytes": sum(path.stat().st_size for path in files),
        "size": f"{index['width']}x{index['height']} at {index['fps']:g} fps",
        "method": index["method"],
    }
