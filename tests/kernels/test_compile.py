"""Every kernel compiles to machine code for a GPU that is not here (sm_90)."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

SCRIPT = """
import triton
from streamvid.kernels import companions_triton, windowed_triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

def compiled(module, name, constants, **pointers):
    kernel = getattr(module, name)
    names = kernel.arg_names
    tensors = names[: names.index(next(n for n in names if n.startswith("stride")))]
    numbers = {n: "fp32" for n in ("eps", "log2_scale")}
    signature = {n: "*" + pointers.get(n, "bf16") if n in tensors else numbers.get(n, "i32") for n in names}
    signature |= {n: "constexpr" for n in constants}
    source = ASTSource(kernel, signature, {(names.index(n),): v for n, v in constants.items()})
    asm = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "num_stages": 2}).asm
    print(name, asm["ptx"].count("mma"), "cubin" in asm)

angles = {n: "fp32" for n in ("cos", "sin", "q_cos", "q_sin", "k_cos", "k_sin", "back_cos", "back_sin")}
scales = {n: "fp32" for n in ("lse", "before", "bias", "gain", "k_scale", "v_scale", "wanted", "importance", "shares")}
whole = {n: "i32" for n in ("runs", "slots", "starts", "evicted", "placed")}
for stored, on in [("bf16", False), ("fp8e4nv", True)]:
    options = {n: on for n in ("SCALED", "ROTATED")}
    tile = dict(D=64, BLOCK_D=64, HEADS=12, BLOCK_S=32)
    more = dict(BLOCK_L=64, BIASED=on, GAINED=on, CONTINUED=on, EMULATE=False)
    types = {**angles, **scales, **whole, "k": stored, "v": stored}
    compiled(windowed_triton, "window_kernel", {**tile, **options, **more}, **types)
    compiled(windowed_triton, "importance_kernel", {**tile, **options}, **types)
rows = dict(C=1536, ROWS=1, WIDTH=2048, EMULATE=False)
averages = {n: "fp32" for n in ("average_k", "average_v", "mixed_k", "mixed_v")}
for name, more in [
    ("modulated_norm", {}), ("gated_sum", {}), ("norm_rotate_write", {"D": 128}), ("fuse_sink", {"D": 128, "MIXED": True}),
]:
    compiled(companions_triton, name + "_kernel", {**rows, **more}, **angles, **scales, **whole, **averages)
"""


def test_the_kernels_compile_for_a_gpu_that_is_not_here(tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == 8 and all(cubin == "True" for *_, cubin in lines)
    products = [int(count) for name, count, _ in lines if name == "window_kernel"]
    assert len(products) == 2 and all(count > 0 for count in products)  # tensor cores
