"""FSDP2: the rollouts and losses of a sharded stage are those of a whole one (gloo; no GPU is needed)."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from streamvid.errors import UserError
from streamvid.training.run import train
from streamvid.training.self_forcing import SelfForcingStage
from streamvid.training.sharding import make_contiguous, sharding_plugin
from streamvid.transformer import CausalWanBlock

WORKER = Path(__file__).parent / "sharded_worker.py"


def gradients(stage: SelfForcingStage, phase: str, half: bool) -> dict[str, torch.Tensor]:
    for name, part in stage.parts().items():
        part.requires_grad_(name == phase)
    torch.manual_seed(0)
    batch = stage.phase_batch(phase, 0, 0, 0)
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16, enabled=half, cache_enabled=False):
        loss, _ = stage(batch)
    loss.backward()
    found = {}
    for name, parameter in stage.parts()[phase].named_parameters():
        gradient = parameter.grad
        found[name] = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
    stage.zero_grad()
    return found


@pytest.mark.parametrize("half", [False, True])
def test_a_sharded_stage_has_the_gradients_of_a_whole_one(half, model_folder, prompt_file, tmp_path):
    """In half precision with frozen parts kept in it, as the published recipes have it."""

    def build() -> SelfForcingStage:
        frozen = "bfloat16" if half else "float32"
        model = {"folder": model_folder, "overrides": {"window": 9}, "frozen_dtype": frozen}
        return SelfForcingStage(model, prompt_file, rollout={"frames": 12, "supervised": 12}).train()

    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        whole, sharded = build(), build()
        make_contiguous(sharded)
        mesh = init_device_mesh("cpu", (1,))
        for module in sharded.modules():
            if isinstance(module, CausalWanBlock):
                fully_shard(module, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        for phase in ("generator", "critic"):
            expected, found = (gradients(stage, phase, half) for stage in (whole, sharded))
            for name, gradient in expected.items():
                assert found[name] is not None, name
                apart = (found[name] - gradient).norm()
                assert apart <= (0.02 if half else 1e-5) * gradient.norm() + 1e-9, name
    finally:
        dist.destroy_process_group()


def test_two_sharded_processes_have_the_mean_gradients_of_one(model_folder, prompt_file, tmp_path):
    """Each of two gloo processes holds half of the weights and rolls out its own clips."""
    spec = importlib.util.spec_from_file_location("sharded_worker", WORKER)
    worker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(worker)
    output = tmp_path / "gradients.pt"
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(WORKER),
    ]
    told = subprocess.run(
        [*launch, model_folder, prompt_file, str(output)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert told.returncode == 0, told.stderr[-2000:]
    found = torch.load(output, weights_only=True)
    assert 0.4 < found["share"] < 0.6
    stage = worker.build(model_folder, prompt_file)
    for phase in ("generator", "critic"):
        halves = [worker.gradients(stage, phase, number) for number in (0, 1)]
        for name, first in halves[0].items():
            expected = (first + halves[1][name]) / 2
            apart = (found["gradients"][phase][name] - expected).norm()
            assert apart <= 1e-4 * expected.norm() + 1e-8, name


def test_sharding_that_cannot_be_is_told(model_folder, prompt_file, tmp_path):
    assert sharding_plugin("ddp") is None and sharding_plugin("fsdp2").fsdp_version == 2
    with pytest.raises(UserError, match="sharding = 'fox' is not known: choose one of ddp, fsdp2"):
        sharding_plugin("fox")
    config = Path(__file__).resolve().parents[2] / "configs" / "train" / "smoke_self_forcing.yaml"
    place = [
        f"stage.model.folder={model_folder}",
        f"stage.prompts={prompt_file}",
        f"trainer.output={tmp_path}",
    ]
    with pytest.raises(UserError, match=r"sharding = fsdp2 needs several GPUs: set trainer\.sharding=ddp"):
        train(config, [*place, "trainer.sharding=fsdp2"])
