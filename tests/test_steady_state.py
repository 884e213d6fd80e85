"""The steady state of a stream: nothing as large as the window is allocated or copied, and the device is asked nothing."""

from itertools import islice

import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.naive import naive_blocks
from streamvid.methods import load_method
from streamvid.noise import SeededNoise

# a window much larger than a block: a layer's keys are more than all that a forward has of its own
WIDE = {"window": 60, "sink": 6}
QUESTIONS = (
    "_local_scalar_dense",
    "is_nonzero",
    "nonzero",
    "equal",
    "item",
)  # a GPU would have to be waited for


class Watch(TorchDispatchMode):
    """Operations that made or wrote something at least as large as a layer's keys, and questions to the device."""

    def __init__(self, cache):
        super().__init__()
        self.size = cache.keys[0].numel()
        self.memory = {t.untyped_storage().data_ptr() for t in (cache.keys, cache.values)}
        self.large: list[str] = []
        self.questions: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in QUESTIONS:
            self.questions.append(name)
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.numel() >= self.size:
                view = tensor.untyped_storage().data_ptr() in self.memory
                if not view or name.endswith("_"):
                    self.large.append(name)
        return result


@pytest.mark.parametrize("context_pass", ["joint", "separate"])
@pytest.mark.parametrize("method", ["longlive", "longlive_infinite"])
def test_blocks_neither_copy_the_window_nor_ask_the_device(method, context_pass):
    stream = tiny.pipeline().stream(
        "a red fox", method=method, overrides=WIDE, decode_pixels=False, context_pass=context_pass
    )
    list(islice(stream, 24))  # the window is full after 20
    with Watch(stream.cache) as watch:
        list(islice(stream, 3))
    assert watch.large == [] and watch.questions == []


def test_the_watch_sees_what_the_releases_do():
    pipe, method = tiny.pipeline(), load_method("longlive", WIDE)
    with torch.no_grad():
        prompt_kv = pipe.transformer.prompt_kv(pipe.encode_prompt("a red fox"))
    naive = naive_blocks(pipe, method, prompt_kv, SeededNoise([0], tiny.LATENT), 24)
    list(islice(naive, 22))
    cache = pipe.stream("a red fox", method=method, decode_pixels=False).cache
    with Watch(cache) as watch:
        next(naive)
    assert {"cat", "clone"} <= {*watch.large} and watch.questions
