"""Parameters sharded over processes: FSDP2 by accelerate."""

from __future__ import annotations

from typing import Any

from torch import nn

from streamvid.errors import UserError

SHARDINGS = ("ddp", "fsdp2")


def sharding_plugin(sharding: str) -> Any:
    """None for `ddp`, which keeps whole copies; else accelerate's plugin, one shard group per transformer block."""
    if sharding not in SHARDINGS:
        raise UserError(f"sharding = {sharding!r} is not known: choose one of {', '.join(SHARDINGS)}")
    if sharding == "ddp":
        return None
    from accelerate import FullyShardedDataParallelPlugin

    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["CausalWanBlock", "UMT5Block"],
        state_dict_type="SHARDED_STATE_DICT",
    )


def make_contiguous(model: nn.Module) -> None:
    """FSDP shards no weights in channels-last order, in which a VAE is loaded."""
    for parameter in model.parameters():
        parameter.data = parameter.data.contiguous()
