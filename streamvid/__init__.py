"""streamvid: streaming autoregressive video diffusion with frame sinks.

    from streamvid import load_pipeline

    pipe = load_pipeline("diorama")
    for chunk in pipe.stream("a small red cube bounces [5s] | it snows [5s]"):
        show(chunk.frames)

Importing the package is cheap; its classes are loaded on first use.
"""

from importlib import import_module

__version__ = "0.1.0"

_EXPORTS = {
    "CausalWanTransformer3DModel": "streamvid.transformer",
    "FewStepFlowScheduler": "streamvid.schedule",
    "StreamVidPipeline": "streamvid.pipelines.pipeline_streamvid",
    "load_pipeline": "streamvid.models",
    "load_script": "streamvid.script",
    "UserError": "streamvid.errors",
}


def __getattr__(name: str):
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'streamvid' has no attribute {name!r}")
