"""`streamvid eval`: measure videos, generate and measure protocols, compare runs, exchange with VBench."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from streamvid.commands.common import parse_assignments
from streamvid.errors import UserError


def add(commands) -> None:
    command = commands.add_parser("eval", help="measure videos; generate and measure protocols; compare runs")
    actions = command.add_subparsers(required=True, metavar="ACTION")

    action = actions.add_parser("run", help="generate a protocol's videos and measure them, in one go")
    action.add_argument("protocol", help="name (see streamvid eval list) or a YAML file")
    action.add_argument("--model", help="embedded model, folder or hub id (default diorama)")
    action.add_argument("--method", help="preset (default: the protocol's, else the model's)")
    action.add_argument(
        "--set", action="append", default=[], metavar="OPTION=VALUE", help="override an option of the method"
    )
    action.add_argument(
        "--change",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="change a field of the protocol, e.g. generation.samples=2",
    )
    action.add_argument("--suite", help="file of prompts in place of the protocol's")
    action.add_argument("--limit", type=int, help="only the first so many videos")
    action.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps")
    action.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    _shared(action, "out/eval")
    action.set_defaults(run=run)

    action = actions.add_parser("score", help="measure videos that exist")
    action.add_argument("videos", nargs="+", help="video files, folders of them, folders of frames, or runs")
    action.add_argument(
        "--metrics",
        default="vbench.*,drift.*,long.*,interactive.*,timing.*",
        help="names and patterns, comma-separated; !NAME leaves one out",
    )
    action.add_argument("--protocol", help="the metrics of a protocol in place of --metrics")
    action.add_argument("--prompts", help='JSON {"file name": "prompt"}, as VBench takes it')
    _shared(action, "out/eval")
    action.set_defaults(run=score)

    action = actions.add_parser("compare", help="runs against a first one, prompt by prompt")
    action.add_argument("runs", nargs="+", help="folders of runs; the first is the baseline")
    action.add_argument("-o", "--output", help="folder for comparison.json and comparison.html")
    action.add_argument("--margin", type=float, help="also test equivalence within this margin")
    action.set_defaults(run=compare)

    action = actions.add_parser("report", help="write a run's report.html again")
    action.add_argument("run_folder", metavar="RUN")
    action.set_defaults(run=report)

    action = actions.add_parser("list", help="all metrics and protocols")
    action.set_defaults(run=list_all)

    action = actions.add_parser("doctor", help="which weights are here, which are missing and where they go")
    action.add_argument("--weights", help="folder of weights")
    action.set_defaults(run=doctor)

    action = actions.add_parser("export", help="a run's videos in folders that VBench's own tool reads")
    action.add_argument("run_folder", metavar="RUN")
    action.add_argument(
        "--format", default="vbench", help="vbench, vbench-long, custom, segments or leaderboard"
    )
    action.add_argument("-o", "--output", default="out/export")
    action.set_defaults(run=export)

    action = actions.add_parser("import", help="official result files beside a run's own numbers")
    action.add_argument("files", nargs="+", help="*_eval_results.json files, folders or a zip of them")
    action.add_argument("-o", "--output", default="out/imported", help="folder for results (%(default)s)")
    action.set_defaults(run=import_results)

    action = actions.add_parser("leaderboard", help="one page over all methods, as Markdown and HTML")
    action.add_argument("runs", nargs="*", help="folders of runs (or give --methods, or --table)")
    action.add_argument("--table", metavar="FILE", help="what streamvid.evaluation.method_table wrote")
    action.add_argument("--protocol", default="embedded", help="with --methods: what to run")
    action.add_argument("--methods", help="presets, comma-separated, or 'all': run what is not there yet")
    action.add_argument("--model")
    action.add_argument("--limit", type=int, help="only the first so many videos of each method")
    action.add_argument("--folder", default="out/leaderboard", help="with --methods: of the runs")
    action.add_argument("--processes", type=int, default=1)
    action.add_argument("-o", "--output", default="docs/leaderboard.md")
    action.set_defaults(run=leaderboard)

    action = actions.add_parser(
        "sensitivity", help="does each metric see its own failure, injected into renders?"
    )
    action.add_argument("--clips", type=int, default=200)
    action.add_argument("-o", "--output", default="docs/sensitivity.json")
    action.set_defaults(run=sensitivity)


def _shared(action, output: str) -> None:
    action.add_argument("-o", "--output", default=output, help="folder of the run (%(default)s)")
    action.add_argument("--weights", help="folder of backbones' weights (see streamvid eval doctor)")
    action.add_argument("--processes", type=int, default=1, help="that share the work")
    action.add_argument("--plan", action="store_true", help="only say what would be done")
    action.add_argument("--strict", action="store_true", help="exit code 1 if any video or metric failed")
    action.add_argument("--quiet", action="store_true")


def _launched(processes: int) -> int | None:
    """Run the command in several processes; None where this is one of them, or the only one."""
    if processes < 1:
        raise UserError(f"processes = {processes} must be at least 1")
    if processes == 1 or "LOCAL_RANK" in os.environ:
        return None
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *launcher, "-m", "streamvid.cli", *sys.argv[1:]]
    return subprocess.run(command, env={"OMP_NUM_THREADS": "1", **os.environ}).returncode


def run(options) -> int | None:
    code = _launched(options.processes)
    if code is not None:
        return code
    from streamvid.evaluation.evaluate import plan_table, run_protocol
    from streamvid.evaluation.protocol import jobs, load_protocol

    protocol = load_protocol(options.protocol, parse_assignments(options.change))
    if options.plan:
        videos = [job.video for job in jobs(protocol, Path(options.output), options.suite)][: options.limit]
        print(plan_table(videos, protocol.requests(), options.weights))
        return 0
    results = run_protocol(
        protocol,
        options.output,
        model=options.model,
        method=options.method,
        overrides=parse_assignments(options.set),
        suite=options.suite,
        limit=options.limit,
        weights=options.weights,
        device=options.device,
        dtype=options.dtype,
        quiet=options.quiet,
    )
    return _finish(results, options)


def score(options) -> int | None:
    code = _launched(options.processes)
    if code is not None:
        return code
    from streamvid.evaluation.evaluate import plan_table, score_videos
    from streamvid.evaluation.manifest import find_videos, read_prompts
    from streamvid.evaluation.protocol import load_protocol
    from streamvid.evaluation.registry import resolve

    protocol = load_protocol(options.protocol) if options.protocol else None
    requests = protocol.requests() if protocol else resolve(options.metrics.split(","))
    prompts = read_prompts(Path(options.prompts)) if options.prompts else None
    if options.plan:
        print(plan_table(find_videos(options.videos, [], prompts), requests, options.weights))
        return 0
    results = score_videos(
        options.videos,
        options.output,
        requests,
        prompts=prompts,
        primary=protocol.primary if protocol else (),
        weights=options.weights,
        quiet=options.quiet,
    )
    return _finish(results, options)


def _finish(results, options) -> int:
    if results is None:
        return 0
    from streamvid.evaluation.report import summary

    if not options.quiet:
        print(summary(results))
        print(f"wrote {Path(options.output) / 'report.html'}")
    if results["problems"]:
        print(f"{len(results['problems'])} problems:", *results["problems"][:20], sep="\n  ", file=sys.stderr)
    return 1 if options.strict and results["problems"] else 0


def compare(options) -> None:
    from streamvid.evaluation.comparison import compare_runs

    print(compare_runs(options.runs, options.output, options.margin))


def report(options) -> None:
    from streamvid.evaluation.report import write_report

    print(f"wrote {write_report(Path(options.run_folder))}")


def list_all(options) -> None:
    from streamvid.evaluation.protocol import load_protocol, protocol_names
    from streamvid.evaluation.registry import all_metrics

    for name, cls in all_metrics().items():
        arrow = {"up": "higher is better", "down": "lower is better", "": "neither"}[cls.better]
        sentence = " ".join((cls.__doc__ or "").split("\n\n")[0].split())
        print(f"{name}  [{cls.fidelity}; {arrow}]\n    {sentence}")
    print("\nprotocols:")
    for name in protocol_names():
        print(f"  {name:28} {load_protocol(name).about}")


def doctor(options) -> int:
    from streamvid.evaluation.backbones import Backbones
    from streamvid.evaluation.backbones import doctor as lines_of

    lines = lines_of(Backbones(options.weights))
    for name, there, text in lines:
        print(f"{'ok     ' if there else 'missing'} {name:15} {text}")
    return 0


def export(options) -> None:
    from streamvid.evaluation.exchange import export_run

    print(export_run(Path(options.run_folder), Path(options.output), options.format))


def import_results(options) -> None:
    from streamvid.evaluation.exchange import import_official
    from streamvid.evaluation.report import summary

    print(summary(import_official([Path(file) for file in options.files], Path(options.output))))


def leaderboard(options) -> int | None:
    from streamvid.evaluation.leaderboard import write_leaderboard

    print(f"wrote {write_leaderboard(options)}")
    return 0


def sensitivity(options) -> None:
    from streamvid.evaluation.sensitivity import measure_sensitivity, table

    print(table(measure_sensitivity(options.clips, Path(options.output))))
