"""Attention backends: all compute the reference, and the reference is softmax attention."""

import math

import pytest
import tiny
import torch
from streamvid.kernels.attention import BACKENDS, attention_backend, reference

from streamvid.errors import UserError

Q, K, V = tiny.normal(0, 2, 5, 3, 8), tiny.normal(1, 2, 7, 3, 8), tiny.normal(2, 2, 7, 3, 8)
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


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_added_logarithm_counts_a_key_so_many_times(backend):
    attention = attention_backend(backend)
    bias = torch.tensor([0, math.log(3), 0, -math.inf, 0, 0, math.log(2)])
    repeated = torch.tensor([0, 1, 1, 1, 2, 4, 5, 6, 6])
    torch.testing.assert_close(attention(Q, K, V, bias), attention(Q, K[:, repeated], V[:, repeated]))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_backends_compute_the_reference(backend, mask):
    output = attention_backend(backend)(Q, K, V, MASKS[mask])
    assert output.shape == Q.shape
    torch.testing.assert_close(output, reference(Q, K, V, MASKS[mask]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_keys_are_as_good_as_absent(backend):
    attention = attention_backend(backend)
    torch.testing.assert_close(
        attention(Q, K, V, KEYS_ALIVE), attention(Q, K[:, KEYS_ALIVE], V[:, KEYS_ALIVE])
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_order_of_keys_does_not_matter(backend):
    attention, order = attention_backend(backend), torch.randperm(7)
    torch.testing.assert_close(attention(Q, K[:, order], V[:, order]), attention(Q, K, V))


def test_half_precision_stays_half_precision():
    q, k, v = Q.bfloat16(), K.bfloat16(), V.bfloat16()
    exact = reference(Q, K, V)
    for backend in BACKENDS:
        output = attention_backend(backend)(q, k, v)
        assert output.dtype == torch.bfloat16
        torch.testing.assert_close(output.float(), exact, atol=0.03, rtol=0)


def test_an_unknown_backend_is_named():
    with pytest.raises(
        UserError, match="attention backend = 'flash9' is not known: choose one of auto, sdpa, ref"
    ):
        attention_backend("flash9")
