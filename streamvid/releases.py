"""Published models: what each was distilled for, so that it travels with the converted weights.

convert("out/krea", transformer="krea-realtime-video-14b.safetensors", release="krea", base="Wan2.1-T2V-14B-Diffusers")
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Release:
    """A published student.

    Attributes:
        files: what its checkpoint is called.
        method: preset it was distilled for.
        shift, steps, warp: timestep shift and levels of the distillation, mapped through the table or not.
        fps, height, width: of its videos.
    """

    files: str
    method: str
    shift: float = 5.0
    steps: tuple[float, ...] = (1000, 750, 500, 250)
    warp: bool = True
    fps: float = 16.0
    height: int = 480
    width: int = 832


RELEASES = {
    "self_forcing": Release("self_forcing_dmd.pt", "self_forcing"),
    "longlive": Release("longlive_base.pt with lora.pt", "longlive"),
    "rolling_forcing": Release("rolling_forcing_dmd.pt", "rolling_forcing", steps=(1000, 800, 600, 400, 200)),
    "reward_forcing": Release("rewardforcing.pt (flat)", "reward_forcing"),
    "causal_forcing": Release("chunkwise/*.pt", "self_forcing"),
    "causal_forcing_framewise": Release("framewise/*.pt", "causal_forcing_framewise"),
    "causal_forcing_1step": Release(
        "causal-forcing++/framewise-1step.pt", "causal_forcing_1step", steps=(1000,)
    ),
    "causal_forcing_2step": Release(
        "causal-forcing++/framewise-2step.pt", "causal_forcing_2step", steps=(1000, 500)
    ),
    "causvid": Release(
        "autoregressive_checkpoint/model.pt", "self_forcing", shift=8.0, steps=(1000, 757, 522), warp=False
    ),
    "krea": Release("krea-realtime-video-14b.safetensors", "krea", steps=(1000, 750, 500, 250, 0)),
    "longlive2": Release(
        "model_bf16.pt (5B)",
        "longlive2_multishot",
        steps=(999, 749.25, 499.5, 249.75),
        fps=24.0,
        height=704,
        width=1280,
    ),
}
