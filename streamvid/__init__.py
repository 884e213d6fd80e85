"""streamvid: streaming autoregressive video diffusion with frame sinks."""

__version__ = "0.1.0"
