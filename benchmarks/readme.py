"""Write the numbers of stored results into README.md and the pages of docs/ that have marks for them.

`python -m benchmarks.readme` writes, with `--check` it only compares.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks import diorama_pages, evaluation_pages, kv_dtype
from benchmarks.claims import claims_table, leaders_table, own_table
from streamvid.evaluation import findings, method_table
from streamvid.evaluation.adherence import table
from streamvid.evaluation.stored import of_other_weights

ROOT = Path(__file__).parent.parent
SPEED = ROOT / "benchmarks/results/end_to_end.json"
LONG = ROOT / "benchmarks/results/long_stream.json"  # two hours of video
PARTS = ROOT / "benchmarks/results/parts.json"
PLANS = ROOT / "benchmarks/results/plans.json"
WEIGHTS = ROOT / "benchmarks/results/weights.json"
ADHERENCE = ROOT / "docs/diorama_adherence.json"
METHODS = ROOT / "docs/method_table.json"
STORAGE = ROOT / "benchmarks/results/kv_dtype.json"
FINDINGS = ROOT / "docs/findings.json"
STUDIO = ROOT / "docs/studio_live.json"


def table_lines(titles: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """A table in Markdown."""
    lines = [titles, ["---"] * len(titles), *rows]
    return [f"| {' | '.join(map(str, line))} |" for line in lines]


def speed_lines() -> str:
    """Speed of the embedded model, as measured by `benchmarks.end_to_end`."""
    result = json.loads(SPEED.read_text())
    longest = json.loads(LONG.read_text())
    disk, first = result["to_disk"], result["first_frame"]
    machine = result["machine"]
    rows = [
        ("pixels on disk", f"{disk['fps']} frames/s, {disk['real_time_factor']}x real time"),
        (
            "first frame",
            f"{first['after_load_s']} s after loading, {first['from_process_start_s']} s from process start",
        ),
        ("block of 12 frames", f"p50 {disk['block_p50_ms']} ms, p95 {disk['block_p95_ms']} ms"),
        *[
            (
                f"block {row['long_stream']['blocks']} against block 50{note}",
                f"time x {row['long_stream']['time_ratio']}, memory x {row['long_stream']['memory_ratio']}",
            )
            for row, note in ((result, ""), (longest, f" (`{longest['command']}`)"))
        ],
        ("peak memory", f"{result['peak_memory_mb']:.0f} MB"),
    ]
    if "prompt_to_pixel" in result:
        wait = result["prompt_to_pixel"]
        rows.append(("prompt to pixel", f"p50 {wait['p50_ms']} ms, p95 {wait['p95_ms']} ms"))
    lines = [
        f"diorama, {machine['cores']} cores of {machine['processor']}, no GPU (`{result['command']}`; {result['warm_up']}; "
        f"load average before: {result['load_average_before']}):",
        "",
        *table_lines(["", ""], rows),
    ]
    return "\n".join(lines)


def roofline_lines() -> str:
    """What the embedded model reaches of the hardware's rates, and what the plan had said, from the same record."""
    result = json.loads(SPEED.read_text())
    if "roofline" not in result:
        return "Not measured yet by this version of the command."
    roof, plan = result["roofline"], result["plan"]
    rows = [
        (
            stage,
            f"{1000 * row['seconds_per_block']:.1f} ms",
            f"{row['gflop_per_block']:.1f} GFLOP",
            f"{row['traffic_mb_per_block']:.0f} MB",
            f"{row['share_of_products']:.2f}",
            f"{row['share_of_bandwidth']:.2f}",
        )
        for stage, row in roof.items()
        if isinstance(row, dict)
    ]
    predicted = plan["predicted"]
    return "\n".join(
        [
            f"diorama (`{result['command']}`), beside {roof['product_gflops']:.0f} GFLOP/s of a large product and "
            f"{roof['bandwidth_gb_per_s']:.1f} GB/s of a copy, measured in the same run:",
            "",
            *table_lines(
                ["a block", "time", "products", "traffic", "share of products", "share of bandwidth"], rows
            ),
            "",
            f"`streamvid plan` had said {predicted['peak_memory_mb']:.0f} MB and {predicted['fps']:.0f} frames/s; it took "
            f"{result['peak_memory_mb']:.0f} MB ({plan['memory_ratio']}x) and {plan['fps_ratio']}x the rate.",
        ]
    )


def parts_lines() -> str:
    """Decoding and denoising against their baselines, as measured by `benchmarks.parts`."""
    result = json.loads(PARTS.read_text())
    decoding, denoising = result["decoding_ms_per_block"], result["denoising_ms_per_block"]
    rows = [
        ("a plain `vae.decode`", decoding["plain"], ""),
        ("the stream's decoding", decoding["exact"], decoding["exact_faster_than_plain"]),
        ("the naive loop's denoising", denoising["naive"], ""),
        (
            "the stream's, context passes separate",
            denoising["separate"],
            denoising["separate_faster_than_naive"],
        ),
        ("the stream's, context passes joint", denoising["stream"], denoising["stream_faster_than_naive"]),
        (
            "the same without `torch.inference_mode`",
            denoising["no_inference_mode"],
            denoising["no_inference_mode_faster_than_naive"],
        ),
    ]
    profile = result["profile_ms_per_block"]
    told = [(name, f"{ms:.0f} ms", f"{times:.2f}x" if times else "") for name, ms, times in rows]
    return "\n".join(
        [
            f"CPU time of one thread, in turns (`{result['command']}`; load average {result['machine']['load_average']}):",
            "",
            *table_lines(["a block", "time", "as fast as the baseline"], told),
            "",
            f"Of the stream's denoising PyTorch's profiler gives {profile['products']} ms to products, "
            f"{profile['attention']} ms to attention and {profile['other']} ms to all else, in "
            f"{profile['operations']:.0f} operations a block (those within others counted too).",
        ]
    )


def plan_lines() -> str:
    """What published models take, as counted by `benchmarks.plans`."""
    result = json.loads(PLANS.read_text())
    rows = []
    for plan in result["plans"]:
        size, work = plan["bytes"], plan["flop_per_block"]
        held = (
            size["transformer"] + size["decoder"],
            size["keys and values of the window"],
            size["memory of the decoder"],
            size["activations"],
            size["a copy of the window at a prompt switch"],
            plan["peak_bytes"],
        )
        rows.append(
            [
                f"{plan['model']}, {plan['method']}, {plan['decoder']}",
                *(f"{value / 1e9:.2f}" for value in held),
                f"{work['denoise'] / 1e12:.0f} + {work['decode'] / 1e12:.0f}",
                f"{plan['estimated_frames_per_second']:.0f}",
            ]
        )
    titles = [
        "GB; model, method, decoder",
        "weights",
        "window",
        "decoder's memory",
        "activations",
        "at a switch",
        "peak",
        "TFLOP per block",
        "H100, estimated fps",
    ]
    return "\n".join(
        [f"Counted by `{result['command']}`, text encoder on the CPU:", "", *table_lines(titles, rows)]
    )


def weight_lines() -> str:
    """Formats of weights on a CPU and the two bars of the forward, as measured by `benchmarks.weights`."""
    result = json.loads(WEIGHTS.read_text())
    speed, memory = result["speed"], result["memory"]
    rows = [
        [name, row["cannot"]]
        if "cannot" in row
        else [name, f"{row['seconds']} s, {row['times_as_fast_as_native']}x", f"{row['share_of_matrix']:.2f}"]
        for name, row in speed["formats"].items()
    ]
    rows = [[*row, ""][:3] for row in rows]
    machine = result["machine"]
    parts = [
        f"By itself, {name} reaches {rate} GFLOP/s." for name, rate in speed.get("gflops_of", {}).items()
    ]
    return "\n".join(
        [
            f"One thread of {machine['processor']} (`{result['command']}`; load average {machine['load_average']}), a large "
            f"bfloat16 product {speed['matrix_gflops']} GFLOP/s:",
            "",
            *table_lines(["weights", "forward", "share of the product"], rows),
            "",
            *parts,
            f"Above weights and caches the forward held {memory['above_them_mb']} MB; one layer puts out "
            f"{memory['one_layers_activations_mb']} MB.",
        ]
    )


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
            *of_other_weights(result, result["model"]),
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
            *of_other_weights(result, result["model"]),
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
            *_own_lines(result),
        ]
    )


def _own_lines(result: dict) -> list[str]:
    """Compositions of our own against all others, where some were measured."""
    own = own_table(result)
    if not own:
        return []
    return [
        "",
        "Compositions of our own. One beats a method if it is worse than it in no column of start, after, changed, kept, "
        "end, drift and motion (how near to 1), and better in one of them, or as good in all with fewer bytes of keys and "
        "values. Better and worse: the 95% interval of the difference by prompt does not hold 0. Repetition does not "
        "count: it is least where a video leaves its prompt or drifts, and rendered worlds repeat too.",
        "",
        own,
    ]


def findings_lines() -> str:
    """The field's questions, as answered by `streamvid.evaluation.findings`."""
    return "\n".join(findings.page_lines(json.loads(FINDINGS.read_text()))).rstrip()


def studio_lines() -> str:
    """The page in Chromium against its bounds, as measured by `streamvid.app.check_live`."""
    result = json.loads(STUDIO.read_text())
    rows = [
        (
            bound["words"],
            f"{bound['value']:.3g} {bound['unit']}".strip(),
            f"at most {bound['most']:.3g}"
            if bound["least"] <= 0
            else f"{bound['least']:.3g} to {bound['most']:.3g}",
        )
        for bound in result["bounds"]
    ]
    return "\n".join(
        [
            f"Server and browser on the same {result['machine']['cores']} cores, no GPU (`{result['command']}`; load "
            f"average before: {result['load_average_before']}): "
            f"{'all within bounds' if result['passed'] else 'NOT within bounds'}.",
            "",
            *table_lines(["", "measured", "bound"], rows),
            "",
            f"The HUD then said {result['hud_fps']} fps shown, {result['hud_speed']} x real time, chunk p50 "
            f"{result['hud_p50']} and p95 {result['hud_p95']}, {result['hud_kv']} of keys and values; from the Enter key to "
            f"the first new pixel it took {result['prompt_to_pixel_s']:.2f} s.",
        ]
    )


def storage_lines() -> str:
    """What smaller keys and values cost, as measured by `benchmarks.kv_dtype`."""
    result = json.loads(STORAGE.read_text())
    return "\n".join(
        [
            f"{result['model']}, `{result['method']}`, {result['prompts']} prompts (`{result['command']} --output "
            f"{STORAGE.relative_to(ROOT)}`):",
            "",
            *of_other_weights(result, result["model"]),
            kv_dtype.table(result),
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
        (ROOT / "streamvid/embedded/diorama/README.md", "quality", quality_lines()),
        (ROOT / "docs/diorama.md", "bars", diorama_pages.bars_lines()),
        (ROOT / "docs/diorama.md", "motion", diorama_pages.motion_lines()),
        (ROOT / "docs/diorama.md", "diversity", diorama_pages.diversity_lines()),
        (ROOT / "docs/diorama.md", "stages", diorama_pages.stage_lines()),
        (ROOT / "docs/methods.md", "methods", method_lines()),
        (ROOT / "docs/methods.md", "storage", storage_lines()),
        (ROOT / "docs/findings.md", "findings", findings_lines()),
        (ROOT / "docs/evaluation.md", "sensitivity", evaluation_pages.sensitivity_lines()),
        (ROOT / "docs/evaluation.md", "speed", evaluation_pages.speed_lines()),
        (ROOT / "docs/speed.md", "roofline", roofline_lines()),
        (ROOT / "docs/speed.md", "parts", parts_lines()),
        (ROOT / "docs/speed.md", "plans", plan_lines()),
        (ROOT / "docs/speed.md", "weights", weight_lines()),
        (ROOT / "docs/studio.md", "live", studio_lines()),
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
