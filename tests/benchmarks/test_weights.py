"""The forward at 1.3B shapes: products by the book, and no more memory than one layer's activations."""

import json
import subprocess
import sys

import torch

from benchmarks.weights import counted, speed

CPU = torch.device("cpu")
# In a process of its own: what another test has freed and the allocator kept would hide or add to what a forward takes. Not
# smaller: a library's own copy of a weight, and what an allocator rounds up (10 MB, run by run), are little beside 218 MB.
MEASURE = """
import json, torch
from benchmarks.weights import memory
torch.set_num_threads(1)
print(json.dumps(memory(2, 640, 384, torch.device("cpu"))))
"""


def test_counted_products_and_activations():
    flop, layer = counted(2, 416, 240)
    tokens, keys, width, ffn = 1170, 4680, 1536, 8960
    expected = 2 * tokens * (6 * width**2 + 2 * width * ffn) + 4 * tokens * (keys + 512) * width
    assert abs(flop / (2 * expected) - 1) < 0.005
    # norms 3, query, key, value and their norms 5, attention 1, projection 1; with text 4; the feed-forward's two ends
    assert 20 < layer / (tokens * width * 2) < 30


def test_a_forward_holds_no_more_than_one_layers_activations():
    found = json.loads(subprocess.check_output([sys.executable, "-c", MEASURE], text=True))
    assert found["bar_reached"], found
    assert found["above_them_mb"] > 10  # something was measured


def test_formats_are_compared_in_turns():
    found = speed(1, 64, 48, CPU, rounds=1, side=64)
    formats = found["formats"]
    assert set(formats) == {"native", "int8", "int8_dynamic", "fp8", "fp8_dynamic"}
    assert formats["native"]["times_as_fast_as_native"] == 1.0 and formats["native"]["gflops"] > 0
    for row in formats.values():
        assert "cannot" in row or row["seconds"] > 0
