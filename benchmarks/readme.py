"""Write the numbers of stored results into README.md and, of docs/, diorama.md, methods.md and evaluation.md.

`python -m benchmarks.readme` writes, with `--check` it only compares.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from benchmarks import evaluation_pages
from benchmarks.claims import claims_table, leaders_table
from streamvid.evaluation import method_table
from streamvid.evaluation.adherence import table

ROOT = Path(__file__).parent.parent
SPEED = ROOT / "benchmarks/results/end_to_end.json"
ADHERENCE = ROOT / "docs/diorama_adherence.json"
METHODS = ROOT / "docs/method_table.json"


def speed_lines() -> str:
    """Speed of the embedded model, as measured by `benchmarks.end_to_end`."""
    result = json.loads(SPEED.read_text())
    disk, first, long = result["to_disk"], result["first_frame"], result["long_stream"]
    machine = result["machine"]
    rows = [
        ("pixels on disk", f"{disk['fps']} frames/s, {disk['real_time_factor']}x real time"),
        (
            "first frame",
            f"{first['after_load_s']} s after loading, {first['from_process_start_s']} s from process start",
        ),
        ("block of 12 frames", f"p50 {disk['block_p50_ms']} ms, p95 {disk['block_p95_ms']} ms"),
        (
            f"block {long['blocks']} against block 50",
            f"time x {long['time_ratio']}, memory x {long['memory_ratio']}",
        ),
        ("peak memory", f"{result['peak_memory_mb']:.0f} MB"),
    ]
    lines = [
        f"diorama, {machine['cores']} cores of {machine['processor']}, no GPU (`{result['command']}`; {result['warm_up']}; "
        f"load average before: {result['load_average_before']}):",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in rows),
    ]
    return "\n".join(lines)


def quality_lines() -> str:
    """Adherence of the embedded model, as measured by `streamvid.evaluation.adherence`."""
    result = json.loads(ADHERENCE.read_text())
    switch, vae = result["switch"], result["vae"]
    return "\n".join(
        [
            f"Share of attributes the probe finds right, {result['prompts']} held-out prompts, seeds {result['seeds']}, "
            f"4 steps (`python -m streamvid.evaluation.adherence --prompts {result['prompts']} --seeds "
            f"{' '.join(map(str, result['seeds']))} --output docs/diorama_adherence.json`). `vae`: renders sent "
            "through the VAE, the ceiling; `start`: seconds 3 to 5; `minute`: the last 4 s of 60; `switch`: 2.5 to 4.5 s "
            "after a change of prompt.",
            "",
            table(result),
            "",
            f"After a switch, changed attributes are right in {switch['changed']['accuracy']:.3f} of "
            f"{switch['changed']['count']} cases, kept ones in {switch['kept']['accuracy']:.3f}. "
            f"{_soon(switch)}VAE: {vae['psnr']} dB over 81 frames.",
            *(["", f"Note: {result['note']}."] if "note" in result else []),
        ]
    )


def _soon(switch: dict) -> str:
    """What the earlier window after a switch shows, where it was measured."""
    if "soon" not in switch:
        return ""
    changed, kept = (switch["soon"][name]["accuracy"] for name in ("changed", "kept"))
    return f"From 1.5 to 3.5 s after it: {changed:.3f} and {kept:.3f}. "


def method_lines() -> str:
    """All methods on the embedded model, as measured by `streamvid.evaluation.method_table`."""
    if not METHODS.is_file():
        return "No table is stored yet: `python -m streamvid.evaluation.method_table --output docs/method_table.json`."
    result = json.loads(METHODS.read_text())
    videos = result["prompts"] * len(result["seeds"])
    unit = "prompts" if all("by_prompt" in row for row in result["methods"]) else "videos"
    return "\n".join(
        [
            f"{result['model']}, {result['prompts']} held-out prompts, seeds {result['seeds']}: {videos} videos of 60 s per "
            f"method, the prompt changes at 10 s; means and 95% intervals over {unit} "
            "(`python -m streamvid.evaluation.method_table --prompts "
            f"{result['prompts']} --seeds {' '.join(map(str, result['seeds']))} --output docs/method_table.json`):",
            "",
            method_table.table(result),
            "",
            "What was published of a method, and what this table says of it (`benchmarks/claims.py`; the interval of a "
            "difference holds 0 where none is seen). The embedded model is small, was trained on rendered worlds and is "
            "judged by its probe: where a claim does not hold here, it does not hold at this scale.",
            "",
            claims_table(result),
            "",
            "Who leads, where more or less is better:",
            "",
            leaders_table(result),
        ]
    )


def fill(path: Path, name: str, content: str) -> str:
    """The file's text with the block called `name` replaced."""
    pattern = re.compile(rf"(<!-- {name}:start -->\n).*?(<!-- {name}:end -->)", re.DOTALL)
    return pattern.sub(lambda match: f"{match[1]}{content}\n{match[2]}", path.read_text())


def main() -> int:
    targets = [
        (ROOT / "README.md", "numbers", speed_lines()),
        (ROOT / "docs/diorama.md", "quality", quality_lines()),
        (ROOT / "docs/methods.md", "methods", method_lines()),
        (ROOT / "docs/evaluation.md", "sensitivity", evaluation_pages.sensitivity_lines()),
        (ROOT / "docs/evaluation.md", "speed", evaluation_pages.speed_lines()),
    ]
    stale = [path for path, name, content in targets if fill(path, name, content) != path.read_text()]
    if "--check" in sys.argv:
        for path in stale:
            print(f"{path.name} is not what the stored results say: run python -m benchmarks.readme")
        return 1 if stale else 0
    for path, name, content in targets:
        path.write_text(fill(path, name, content))
    return 0


if __name__ == "__main__":
    sys.exit(main())
