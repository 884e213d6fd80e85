"""What docs/evaluation.md says of stored measurements; `benchmarks.readme` writes it there."""

from __future__ import annotations

import json
from pathlib import Path

from streamvid.evaluation import sensitivity

ROOT = Path(__file__).parent.parent
SENSITIVITY = ROOT / "docs/sensitivity.json"
SPEED = ROOT / "benchmarks/results/evaluation_speed.json"
RESUME = ROOT / "benchmarks/results/evaluation_resume.json"


def sensitivity_lines() -> str:
    """Whether metrics see their own failures, as measured by `streamvid eval sensitivity`."""
    if not SENSITIVITY.is_file():
        return "Not measured yet: `streamvid eval sensitivity --clips 200 -o docs/sensitivity.json`."
    result = json.loads(SENSITIVITY.read_text())
    worst = min(result["own"].values())
    return "\n".join(
        [
            f"{result['clips']} renders of the embedded world ({result['about']}), each with every failure injected in turn "
            f"(`{result['command']}`). Area under the ROC curve: the chance that a clip with the failure scores worse than "
            f"one without any, 0.5 for a metric that does not care; a metric's own failure in bold, the lowest {worst:.3f}. "
            f"`{sensitivity.DEAR}`, which is slow, sees its own failure on every clip and one of the others in turns.",
            "",
            sensitivity.table(result),
            "",
            f"Other failures that a metric reacts to (area {sensitivity.REACTS} or more), all of them:",
            "",
            sensitivity.reactions(result),
            "",
            "Share of alarms at a threshold that one clean clip in twenty exceeds:",
            "",
            sensitivity.table(result, "alarms"),
        ]
    )


def speed_lines() -> str:
    """Speed, memory and resumption, as measured by `benchmarks.evaluation_speed` and `benchmarks.evaluation_resume`."""
    lines = ["Not measured yet: `python -m benchmarks.evaluation_speed`."]
    if SPEED.is_file():
        told = json.loads(SPEED.read_text())
        height, width = told["size"]
        lines = [
            f"{told['metrics']} weight-free metrics on {told['frames']} frames of {width} x {height}: "
            f"{told['frames_per_second']} frames/s on {told['cores']} cores, peak memory {told['peak_memory_mb']} MB "
            f"(`{told['command']}`)."
        ]
    if RESUME.is_file():
        told = json.loads(RESUME.read_text())
        lines.append(
            f"Protocol `{told['protocol']}`, {told['videos']} scripts, every process SIGKILLed after "
            f"{', '.join(map(str, told['kills_after_videos']))} videos (`{told['command']}`): of {told['files_kept']} files "
            f"and {told['values_kept']} values that were there, {told['files_touched']} were touched and "
            f"{told['values_computed_twice']} computed again."
        )
    return "\n\n".join(lines)
