"""`streamvid info`: versions, devices, backends, models, and what the embedded model knows."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from streamvid import __version__
from streamvid.errors import UserError
from streamvid.kernels.attention import BACKENDS, unavailable
from streamvid.methods import load_method, method_names
from streamvid.models import choose_device, choose_dtype, describe_model, embedded_models

LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "xformers", "imageio", "gradio", "omegaconf")


def overview() -> str:
    """Everything a bug report needs."""
    lines = [f"streamvid {__version__}, Python {platform.python_version()}, {platform.platform()}"]
    lines.append("libraries: " + ", ".join(f"{name} {_version(name)}" for name in LIBRARIES))
    device = choose_device()
    lines.append(
        f"device: {device} ({_device_name(device)}), dtype {str(choose_dtype('auto', device)).split('.')[-1]}"
    )
    lines.append(f"threads: {torch.get_num_threads()}")
    here = [name for name in BACKENDS if not unavailable(name)]
    elsewhere = [name for name in BACKENDS if name not in here]
    lines.append(f"attention backends: {', '.join(here)} (not here: {', '.join(elsewhere) or 'none'})")
    lines.append(f"methods: {', '.join(method_names())}")
    for name in embedded_models():
        facts = describe_model(name)
        lines.append(
            f"model {name}: {facts['size']}, {facts['bytes'] / 1e6:.1f} MB, method {facts['method']} "
            f"(streamvid info {name})"
        )
    return "\n".join(lines)


def model_details(name: str) -> str:
    """What an embedded model is and which words it knows."""
    if name not in embedded_models():
        known = ", ".join(embedded_models())
        fix = f"choose one of {known}" if known else "this installation has none"
        raise UserError(f"model = {name!r} is not an embedded model: {fix}")
    from streamvid.world.prompts import VOCABULARY
    from streamvid.world.scene import ATTRIBUTES

    facts = describe_model(name)
    method = load_method(facts["method"])
    lines = [
        f"{name}: {facts['size']}, {facts['bytes'] / 1e6:.1f} MB of weights",
        f"method {method.name}: window {method.window}, sink {method.sink}, {method.frames_per_block} frames per block",
        "it shows one subject in a landscape; a prompt names:",
    ]
    lines += [f"  {attribute}: {', '.join(values)}" for attribute, values in ATTRIBUTES.items()]
    lines.append(f"words it knows ({len(VOCABULARY)}): {' '.join(VOCABULARY)}")
    return "\n".join(lines)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()
