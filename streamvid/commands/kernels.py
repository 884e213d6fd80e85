"""`streamvid kernels check`."""

from __future__ import annotations


def add(commands) -> None:
    command = commands.add_parser("kernels", help="attention backends and fused kernels on this machine")
    actions = command.add_subparsers(required=True, metavar="ACTION")
    check = actions.add_parser(
        "check", help="compare every backend and kernel with plain PyTorch here, and time it"
    )
    check.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps")
    check.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    check.set_defaults(run=run)


def run(options) -> int:
    from streamvid.kernels.check import check_all, report
    from streamvid.models import choose_device, choose_dtype

    device = choose_device(options.device)
    dtype = choose_dtype(options.dtype, device)
    results = list(check_all(device, dtype))
    print(report(results, device, dtype))
    return 1 if any(result.verdict == "wrong" for result in results) else 0
