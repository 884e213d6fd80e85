"""What published models take, counted: `streamvid plan` of each on an H100 that need not be here.

python -m benchmarks.plans      # then: python -m benchmarks.readme
"""

from __future__ import annotations

import torch

from streamvid.ahead import decodes_beside_on
from streamvid.bench import write_record
from streamvid.costs import Configuration
from streamvid.io.manifest import environment
from streamvid.machine import card
from streamvid.methods import load_method
from streamvid.plan import make_plan
from streamvid.specs import WAN_SPECS

OUTPUT = "benchmarks/results/plans.json"
DEVICE = "h100"
PLAYED = (
    ("1.3B", "longlive", "exact"),
    ("1.3B", "longlive", "tiny"),
    ("1.3B", "self_forcing", "exact"),
    ("1.3B", "rolling_forcing", "exact"),
    ("1.3B", "reward_forcing", "exact"),
    ("1.3B", "deep_forcing", "exact"),
    ("14B", "krea", "exact"),
    ("5B", "longlive2_multishot", "exact"),
)


def main() -> None:
    plans = []
    for size, method, decoder in PLAYED:
        spec = WAN_SPECS[size]
        configuration = Configuration(
            spec,
            load_method(method),
            spec.height,
            spec.width,
            decoder=decoder,
            text_encoder="cpu",
            beside=decodes_beside_on(torch.device("cuda")),
        )
        plans.append(make_plan(configuration, card(DEVICE, torch.bfloat16)).to_dict())
    write_record({"command": "python -m benchmarks.plans", **environment(), "plans": plans}, OUTPUT)


if __name__ == "__main__":
    main()
