"""Does a protocol that is killed go on where it was? `python -m benchmarks.evaluation_resume`.

`streamvid eval run` is started, all of its processes are SIGKILLed in the middle of a video, and it is started again,
several times. What was there at a kill (finished videos, stored values) must be there at the end, untouched, and nothing of
it made or computed twice.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from streamvid.io.files import replace_atomically

PATIENCE = 3600  # seconds in which the next kill must be due


def finished_videos(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Inode, time and size of every finished video and of what describes it."""
    found = {}
    for path in sorted((folder / "videos").glob("p*")):
        state = path.stat()
        found[path.name] = (state.st_ino, state.st_mtime_ns, state.st_size)
    return found


def stored_lines(folder: Path) -> list[str]:
    """Whole lines of values in the shards."""
    lines = [
        line for file in (folder / "shards").glob("*.jsonl") for line in file.read_text().splitlines(True)
    ]
    return [line for line in lines if line.endswith("\n") and '"key"' in line]


def measured_videos(folder: Path) -> int:
    return len({json.loads(line)["video"] for line in stored_lines(folder)})


def kill_tree(process: subprocess.Popen) -> None:
    """SIGKILL to a process and all that it started, ffmpeg too."""
    with psutil.Process(process.pid).oneshot():
        tree = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    for child in tree:
        try:
            child.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait()
    psutil.wait_procs(tree, timeout=60)


def kill_amid(command: Sequence[str], folder: Path, after: int) -> None:
    """Start, and kill as soon as `after` videos are measured and another one is being made."""
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + PATIENCE
    while measured_videos(folder) < after or not list((folder / "videos").glob(".*.partial.mp4")):
        if process.poll() is not None:
            raise SystemExit(f"the run ended with code {process.returncode} before {after} videos and a kill")
        if time.monotonic() > deadline:
            kill_tree(process)
            raise SystemExit(f"after {PATIENCE} s no {after} videos are measured")
        time.sleep(0.1)
    kill_tree(process)


def survive(arguments: Sequence[str], folder: Path, kills: Sequence[int]) -> dict[str, Any]:
    """Run `streamvid eval run` with these arguments, killed after so many videos each time, to its end."""
    command = [sys.executable, "-m", "streamvid.cli", "eval", "run", *arguments, "-o", str(folder), "--quiet"]
    began = time.monotonic()
    files: dict[str, tuple[int, int, int]] = {}
    lines: set[str] = set()
    for after in kills:
        kill_amid(command, folder, after)
        files |= finished_videos(folder)
        lines |= set(stored_lines(folder))
    subprocess.run(command, env={"OMP_NUM_THREADS": "1", **os.environ}, check=True)
    now, told = finished_videos(folder), stored_lines(folder)
    results = json.loads((folder / "results.json").read_text())
    keys = Counter(json.loads(line)["key"] for line in told)
    return {
        "videos": results["videos"],
        "problems": len(results["problems"]),
        "kills_after_videos": list(kills),
        "files_kept": len(files),
        "files_touched": sum(now.get(name) != state for name, state in files.items()),
        "values_kept": len(lines),
        "values_lost": len(lines - set(told)),
        "values_computed_twice": sum(count > 1 for count in keys.values()),
        "left_behind": len(list((folder / "videos").glob(".*"))),
        "seconds": round(time.monotonic() - began, 1),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--protocol", default="embedded")
    parser.add_argument("--kills", type=int, nargs="+", default=[5, 20, 35], help="after so many videos")
    parser.add_argument("--folder", type=Path, default=Path("out/evaluation_resume"), help="of the run; new")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/evaluation_resume.json"))
    options, more = parser.parse_known_args(arguments)
    if options.folder.exists():
        parser.error(f"folder = {options.folder} is there: give a new one")
    result = {
        "command": f"python -m benchmarks.evaluation_resume {' '.join(more)}".rstrip(),
        "protocol": options.protocol,
        "options": more,
        **survive([options.protocol, *more], options.folder, options.kills),
        "cores": os.cpu_count(),
    }
    with replace_atomically(options.output) as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
