"""A process of test_sharding.py: gradients of its micro-batch by a sharded stage, averaged over all processes.

torchrun --nproc_per_node=2 tests/training/sharded_worker.py MODEL PROMPTS OUTPUT
"""

import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from streamvid.training.self_forcing import SelfForcingStage
from streamvid.training.sharding import make_contiguous
from streamvid.transformer import CausalWanBlock


def build(model: str, prompts: str) -> SelfForcingStage:
    options = {"folder": model, "overrides": {"window": 9}}
    return SelfForcingStage(options, prompts, rollout={"frames": 12, "supervised": 12}).train()


def gradients(stage: SelfForcingStage, phase: str, number: int) -> dict[str, torch.Tensor]:
    """Of micro-batch `number`, over all processes where the stage is sharded."""
    for name, part in stage.parts().items():
        part.requires_grad_(name == phase)
    torch.manual_seed(number)
    batch = stage.phase_batch(phase, 0, 0, number)
    torch.manual_seed(number)
    stage(batch)[0].backward()
    found = {}
    for name, parameter in stage.parts()[phase].named_parameters():
        gradient = parameter.grad
        found[name] = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
    stage.zero_grad()
    return found


def main() -> None:
    model, prompts, output = sys.argv[1:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, count = dist.get_rank(), dist.get_world_size()
    stage = build(model, prompts)
    make_contiguous(stage)
    mesh = init_device_mesh("cpu", (count,))
    for module in stage.modules():
        if isinstance(module, CausalWanBlock):
            fully_shard(module, mesh=mesh)
    fully_shard(stage, mesh=mesh)
    whole = sum(p.numel() for p in stage.transformer.parameters())
    own = sum(p.to_local().numel() for p in stage.transformer.parameters())
    found = {phase: gradients(stage, phase, rank) for phase in ("generator", "critic")}
    if rank == 0:
        torch.save({"gradients": found, "share": own / whole}, output)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
