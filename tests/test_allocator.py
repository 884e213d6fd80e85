"""Freed memory that the process keeps, counted in page faults."""

import os
import subprocess
import sys

import pytest

from streamvid.allocator import CHOSEN_BY_USER

FAULTS = """
import resource
import torch
from streamvid.decoding import decode_to_bytes, decoder_state
from streamvid.models import load_pipeline
{prepare}
torch.set_num_threads(1)
vae = load_pipeline("diorama").vae
latents, state = torch.zeros(1, 16, 3, 16, 16), decoder_state(vae)
for block in range(12):
    if block == 4:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    decode_to_bytes(vae, latents, state)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def mostly_kept(prepare: str, plain: int) -> bool:
    """Whether page faults fall below 0.4 of `plain`. Up to three runs: now and then a heap grows late, which keeping
    does not prevent."""
    return any(page_faults(prepare) < 0.4 * plain for _ in range(3))


def page_faults(prepare: str, **environment: str) -> int:
    inherited = {name: value for name, value in os.environ.items() if name not in CHOSEN_BY_USER}
    command = [sys.executable, "-c", FAULTS.format(prepare=prepare)]
    run = subprocess.run(
        command, env={**inherited, **environment}, capture_output=True, text=True, check=True
    )
    return int(run.stdout.split()[-1])


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_freed_memory_is_kept_by_every_command():
    assert mostly_kept("from streamvid.cli import main; main(['methods'])", page_faults(""))


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_what_the_environment_says_holds():
    prepare = "from streamvid.allocator import keep_freed_memory; print({}keep_freed_memory())"
    plain = page_faults(prepare.format("not "), MALLOC_TRIM_THRESHOLD_="131072")
    assert mostly_kept(prepare.format(""), plain)
