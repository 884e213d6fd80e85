"""Are smaller weights faster here? One transformer at 1.3B shapes with few layers, in bfloat16, INT8 and FP8 (torchao).

    python -m benchmarks.weights --layers 2 --frames 3 --output benchmarks/results/weights.json

Beside it the rate of a large bfloat16 matrix product in the same run, to which the rate of the forward is compared. A format
that torchao cannot run here is in the result with the reason.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from streamvid.io.manifest import environment
from streamvid.transformer import CausalWanTransformer3DModel

FORMATS = {
    "bfloat16": None,
    "int8_weights": "Int8WeightOnlyConfig",
    "int8": "Int8DynamicActivationInt8WeightConfig",
    "fp8_weights": "Float8WeightOnlyConfig",
    "fp8": "Float8DynamicActivationFloat8WeightConfig",
}


def seconds(run, repeats: int) -> float:
    """The fastest of some runs after one to warm up."""
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return min(times[1:])


def forward_flop(model, tokens: int, text: int) -> float:
    """Multiplications and additions of a forward: linear layers, self- and cross-attention."""
    config = model.config
    dim = config.num_attention_heads * config.attention_head_dim
    linear = (
        2 * tokens * (6 * dim**2 + 2 * dim * config.ffn_dim)
    )  # keys and values of the text are not part of it
    return config.num_layers * (linear + 4 * tokens * (tokens + text) * dim)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--frames", type=int, default=3)
    parser.add_argument("--height", type=int, default=60, help="latent rows")
    parser.add_argument("--width", type=int, default=104, help="latent columns")
    parser.add_argument("--matrix", type=int, default=4096, help="side of the large matrix product")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    square = torch.randn(given.matrix, given.matrix, device=device).bfloat16()
    product = 2 * given.matrix**3 / seconds(lambda: square @ square, given.repeats) / 1e9
    result: dict = {"settings": {k: str(v) for k, v in vars(given).items()}, "matrix_gflops": product}
    for name, config in FORMATS.items():
        torch.manual_seed(0)
        model = CausalWanTransformer3DModel(num_layers=given.layers).bfloat16().to(device).eval()
        rows, columns = model.token_grid(given.height, given.width)
        x = torch.randn(1, 16, given.frames, given.height, given.width, device=device).bfloat16()
        prompt = model.prompt_kv(torch.randn(1, 512, 4096, device=device).bfloat16())
        timestep = torch.full((1, given.frames), 500.0, device=device)
        try:
            if config is not None:
                import torchao.quantization as quantization

                quantization.quantize_(model.blocks, getattr(quantization, config)())
            spent = seconds(lambda m=model, p=prompt, t=timestep, x=x: m(x, t, prompt_kv=p), given.repeats)
        except Exception as error:  # whatever torchao says is the result
            result[name] = {"cannot": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
            continue
        rate = forward_flop(model, given.frames * rows * columns, 512) / spent / 1e9
        result[name] = {"seconds": spent, "gflops": rate, "share_of_matrix": rate / product}
    result["environment"] = environment()
    text = json.dumps(result, indent=2)
    print(text)
    if given.output:
        given.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
