"""Settings that every test shares; those of the environment must stand before torch or transformers are imported."""

import os

from hypothesis import HealthCheck, settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
if not os.path.exists(
    "/dev/nvidia0"
):  # kernels run in Triton's interpreter; read when triton is first imported, by any test
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test downloads anything
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# a loaded machine must not fail a test for its speed
settings.register_profile("suite", deadline=None, suppress_health_check=list(HealthCheck))
settings.load_profile("suite")


def pytest_collection_modifyitems(items):
    """Trainings first: they are the longest files, and no core should wait for the last of them."""
    items.sort(key=lambda item: "training" not in item.path.parts)
