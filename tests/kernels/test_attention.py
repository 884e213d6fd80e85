"""Attention backends: all compute the reference, and the reference is softmax attention."""

import math
import sys
import types

import pytest
import tiny
import torch
from streamvid.kernels import attention, libraries
from streamvid.kernels.attention import AUTO, BACKENDS, attention_backend, chosen, reference, unavailable

from streamvid.errors import UserError

Q, K, V = tiny.normal(0, 2, 5, 3, 8), tiny.normal(1, 2, 7, 3, 8), tiny.normal(2, 2, 7, 3, 8)
# tiled takes neither float32 nor masks: test_tiled.py
HERE = [name for name in BACKENDS if not unavailable(name) and name != "tiled"]
ELSEWHERE = [name for name in BACKENDS if unavailable(name)]
KEYS_ALIVE = torch.tensor([True, False, True, True, False, True, False])
MASKS = {
    "none": None,
    "keys": KEYS_ALIVE,
    "queries and keys": torch.ones(5, 7).tril(2).bool(),
    "per head": torch.arange(3 * 5 * 7).view(3, 5, 7) % 3 > 0,
    "added": tiny.normal(3, 7),
}


def test_reference_is_softmax_attention():
    output = reference(Q, K, V, KEYS_ALIVE)
    for batch, query, head in [(0, 0, 0), (1, 4, 2)]:
        weights = [
            math.exp(float(Q[batch, query, head] @ K[batch, key, head]) / math.sqrt(8))
            * bool(KEYS_ALIVE[key])
            for key in range(7)
        ]
        expected = sum(w * V[batch, key, head] for key, w in enumerate(weights)) / sum(weights)
        torch.testing.assert_close(output[batch, query, head], expected)


@pytest.mark.parametrize("backend", HERE)
def test_an_added_logarithm_counts_a_key_so_many_times(backend):
    attention = attention_backend(backend)
    bias = torch.tensor([0, math.log(3), 0, -math.inf, 0, 0, math.log(2)])
    repeated = torch.tensor([0, 1, 1, 1, 2, 4, 5, 6, 6])
    torch.testing.assert_close(attention(Q, K, V, bias), attention(Q, K[:, repeated], V[:, repeated]))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("backend", ["auto", *HERE])
def test_backends_compute_the_reference(backend, mask):
    if backend == "triton" and mask in ("queries and keys", "per head"):
        with pytest.raises(
            UserError, match="cannot attend with a mask that differs between queries or heads"
        ):
            attention_backend(backend)(Q, K, V, MASKS[mask])
        return
    output = attention_backend(backend)(Q, K, V, MASKS[mask])
    assert output.shape == Q.shape
    torch.testing.assert_close(output, reference(Q, K, V, MASKS[mask]))


@pytest.mark.parametrize("backend", HERE)
def test_masked_keys_are_as_good_as_absent(backend):
    attention = attention_backend(backend)
    torch.testing.assert_close(
        attention(Q, K, V, KEYS_ALIVE), attention(Q, K[:, KEYS_ALIVE], V[:, KEYS_ALIVE])
    )


@pytest.mark.parametrize("backend", HERE)
def test_the_order_of_keys_does_not_matter(backend):
    attention, order = attention_backend(backend), torch.randperm(7)
    torch.testing.assert_close(attention(Q, K[:, order], V[:, order]), attention(Q, K, V))


def test_half_precision_stays_half_precision():
    q, k, v = Q.bfloat16(), K.bfloat16(), V.bfloat16()
    exact = reference(Q, K, V)
    for backend in HERE:
        output = attention_backend(backend)(q, k, v)
        assert output.dtype == torch.bfloat16
        torch.testing.assert_close(output.float(), exact, atol=0.03, rtol=0)


def test_an_unknown_backend_is_named():
    with pytest.raises(
        UserError, match="attention backend = 'flash9' is not known: choose one of auto, sdpa, tiled, flex"
    ):
        attention_backend("flash9")


@pytest.mark.parametrize("backend", ELSEWHERE)
def test_a_backend_that_is_not_here_says_what_to_install(backend):
    with pytest.raises(UserError, match=f"attention backend = {backend} needs .*(pip install|choose) [a-z]+"):
        attention_backend(backend)


@pytest.fixture
def installed(monkeypatch):
    """Pretends that a library is there: `installed(module, function=...)`; its calls are kept."""

    def install(name: str, **functions):
        module = types.ModuleType(name)
        for key, function in functions.items():
            setattr(module, key, function)
        parts = name.split(".")
        for depth in range(1, len(parts)):
            monkeypatch.setitem(sys.modules, ".".join(parts[:depth]), types.ModuleType(parts[depth - 1]))
        monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(libraries, "found", lambda module: module == name)

    return install


@pytest.mark.parametrize(
    ("capability", "generation", "module"),
    [((8, 0), 2, "flash_attn"), ((9, 0), 3, "flash_attn_interface"), ((10, 0), 4, "flash_attn.cute")],
)
def test_flash_takes_the_generation_of_the_device(installed, monkeypatch, capability, generation, module):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    installed(module, flash_attn_func=lambda q, k, v: (reference(q, k, v), None))
    assert libraries.flash_generation() == generation and libraries.flash_missing() is None
    torch.testing.assert_close(libraries.flash(Q, K, V), reference(Q, K, V))
    other = (8, 0) if generation > 2 else (7, 5)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: other)
    assert "pip install flash-attn" in str(libraries.flash_missing())


def test_sage_is_told_the_layout(installed):
    def sageattn(q, k, v, tensor_layout, is_causal):
        assert tensor_layout == "NHD" and not is_causal
        return reference(q, k, v)

    installed("sageattention", sageattn=sageattn)
    assert libraries.sage_missing() is None
    torch.testing.assert_close(libraries.sage(Q, K, V), reference(Q, K, V))


@pytest.mark.parametrize("mask", MASKS)
def test_xformers_gets_the_mask_as_aligned_rows(installed, mask):
    def attend(q, k, v, attn_bias):
        assert attn_bias is None or (attn_bias.shape == (2, 3, 5, 7) and attn_bias.stride(-2) % 8 == 0)
        return reference(q, k, v, attn_bias)

    installed("xformers.ops", memory_efficient_attention=attend)
    assert libraries.xformers_missing() is None
    torch.testing.assert_close(libraries.xformers(Q, K, V, MASKS[mask]), reference(Q, K, V, MASKS[mask]))


@pytest.mark.parametrize(
    ("backend", "dtype", "mask", "told"),
    [
        ("flash", torch.bfloat16, KEYS_ALIVE, "cannot attend with a mask or bias"),
        ("sage", torch.bfloat16, KEYS_ALIVE, "cannot attend with a mask or bias"),
        ("flash", torch.bfloat16, None, "runs on CUDA and the tensors are on cpu"),
        ("xformers", torch.bfloat16, None, "runs on CUDA and the tensors are on cpu"),
    ],
)
def test_a_forced_backend_refuses_what_it_cannot_do(monkeypatch, backend, dtype, mask, told):
    monkeypatch.setitem(BACKENDS, backend, BACKENDS[backend]._replace(missing=lambda: None))
    with pytest.raises(UserError, match=f"attention backend = {backend} {told}: choose another, or auto"):
        attention_backend(backend)(*(x.to(dtype) for x in (Q, K, V)), mask)


def test_auto_takes_the_next_one_that_can(monkeypatch):
    def backend(refuses=None):
        return attention.Backend(lambda q, k, v, mask=None: q, refuses=lambda *arguments: refuses)

    monkeypatch.setitem(AUTO, "cpu", ("one", "two", "reference"))
    monkeypatch.setitem(BACKENDS, "one", backend())
    monkeypatch.setitem(BACKENDS, "two", backend())
    assert chosen(Q, K, V) == "one"
    monkeypatch.setitem(BACKENDS, "one", backend("cannot"))
    assert chosen(Q, K, V) == "two" and attention_backend()(Q, K, V) is Q
    monkeypatch.setattr(attention, "_disabled", {"two": "was wrong"})
    assert chosen(Q, K, V) == "reference"
    monkeypatch.setattr(attention, "_disabled", {"two": "was wrong", "reference": "was wrong"})
    with pytest.raises(UserError, match="auto has none left"):
        attention_backend()(Q, K, V)


def test_a_disabled_backend_tells_why(monkeypatch):
    monkeypatch.setattr(attention, "_disabled", {})
    attention.disable("flex", "is disabled: it was wrong")
    with pytest.raises(UserError, match="attention backend = flex is disabled: it was wrong"):
        attention_backend("flex")
