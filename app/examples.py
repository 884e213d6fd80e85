"""One-click examples for the embedded model: prompts to start with, and scripts of whole little films."""

EXAMPLES = [
    {"name": "Dawn on the ice", "prompt": "A large red cube floats on the ice at dawn", "seed": 3},
    {"name": "Bouncing star", "prompt": "A large yellow star bounces on the sand by day", "seed": 7},
    {
        "name": "Rolling home",
        "prompt": "A large orange ball rolls to the right on a meadow at sunset",
        "seed": 11,
    },
    {
        "name": "Heart in the snow",
        "prompt": "A large pink heart floats on the ice at night while it is snowing",
        "seed": 5,
    },
    {
        "name": "Four seasons",
        "script": " | ".join(
            (
                "A large green cone floats on a meadow by day [5s]",
                "A large green cone floats on a meadow at sunset in the rain [5s]",
                "A large orange cone floats on the sand at dawn [5s]",
                "A large white cone floats on the ice at night while it is snowing [5s]",
            )
        ),
        "seed": 2,
    },
]
