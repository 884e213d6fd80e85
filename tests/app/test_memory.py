"""What streams leave behind."""

import subprocess
import sys

import pytest

PROGRAM = """
import threading, psutil
from streamvid.app import memory
resident = lambda: psutil.Process().memory_info().rss / 2**20

def fill():  # many blocks in a thread's own part of the C library's memory
    blocks = [b"x" * 60_000 for _ in range(4000)]
    kept.append(blocks[-1])

kept = []
before = resident()
for _ in range(4):
    thread = threading.Thread(target=fill)
    thread.start()
    thread.join()
held = resident()
memory.give_back()
print(before, held, resident())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's behaviour")
def test_freed_blocks_go_back_to_the_system():
    answer = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    before, held, after = map(float, answer.stdout.split())
    assert held - before > 100  # the C library keeps them
    assert after - before < 30
