"""Attention by tiles in bfloat16: near PyTorch's own, which serves where scores may be too large; when `auto` takes it."""

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from streamvid.kernels import tiled
from streamvid.kernels.attention import BACKENDS, attention_backend, chosen
from streamvid.kernels.libraries import reference, sdpa

from streamvid.errors import UserError

here = pytest.mark.skipif(tiled.tiled_missing() is not None, reason="no products in bfloat16 on this CPU")


def normal(*sizes: int, dim: int, heads: int = 2, batch: int = 1) -> list[torch.Tensor]:
    """Queries, keys and values."""
    return [tiny.normal(i, batch, size, heads, dim).bfloat16() for i, size in enumerate((*sizes, sizes[-1]))]


def root_mean_square_error(function, q, k, v) -> float:
    exact = reference(q.double(), k.double(), v.double())
    return float((function(q, k, v) - exact).square().mean().sqrt() / exact.square().mean().sqrt())


@here
@settings(max_examples=25)
@given(
    batch=st.integers(1, 2),
    queries=st.integers(1, 300),
    keys=st.integers(4, 3000),  # one key leaves sdpa nothing to round
    heads=st.integers(1, 3),
    dim=st.sampled_from([16, 24, 64, 80, 128]),
    spread=st.sampled_from([0.1, 1.0, 1.4, 4.0]),
)
def test_the_error_is_at_most_twice_that_of_sdpa(batch, queries, keys, heads, dim, spread):
    q, k, v = normal(queries, keys, dim=dim, heads=heads, batch=batch)
    ours, pytorchs = (root_mean_square_error(function, q * spread, k, v) for function in (tiled.tiled, sdpa))
    assert ours <= 2 * pytorchs + 2**-9


@here
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("spread", [0.1, 1.0, 1.3])
def test_over_several_tiles_the_error_is_that_of_rounding(dim, spread):
    q, k, v = normal(300, 4200, dim=dim)
    q *= spread
    assert not torch.equal(tiled.tiled(q, k, v), sdpa(q, k, v))  # it was not left to PyTorch
    errors = [root_mean_square_error(function, q, k, v) for function in (tiled.tiled, sdpa)]
    assert 0 < errors[0] < 2 * errors[1] < 0.006


@here
def test_the_smallest_scores_that_the_bound_allows_do_not_underflow():
    """Every query is opposite to every key: its largest score is as far below the bound as one can be."""
    _, _, v = normal(20, 500, dim=64)
    k = torch.full((1, 500, 2, 64), 1.9).bfloat16()
    q = -k[:, :20]
    assert 28 < float((q.float() * k[:, :20]).sum(-1).abs().amax() / 8) < tiled.LARGEST
    error = root_mean_square_error(tiled.tiled, q, k, v)
    assert 0 < error < 2 * root_mean_square_error(sdpa, q, k, v) + 2**-8


@here
@pytest.mark.parametrize("wrong", [4.0, float("nan")])
def test_a_head_with_larger_scores_is_left_to_pytorch_and_only_that(wrong):
    q, k, v = normal(40, 300, dim=128)
    q[:, :, 1] *= wrong
    got, expected = tiled.tiled(q, k, v), sdpa(q, k, v)
    assert torch.equal(got[:, :, 1].nan_to_num(9.0), expected[:, :, 1].nan_to_num(9.0))
    assert not torch.equal(got[:, :, 0], expected[:, :, 0]) and not got[:, :, 0].isnan().any()


@here
def test_auto_takes_it_for_large_problems_that_it_can_serve():
    large, small = normal(1024, 1024, dim=128), normal(192, 768, dim=128)
    assert chosen(*large) == "tiled" and chosen(*small) == "sdpa"
    assert torch.equal(attention_backend()(*large), tiled.tiled(*large))
    mask = torch.zeros(1024, dtype=torch.bfloat16)
    assert chosen(*large, mask) == "sdpa"
    assert chosen(*(x.float() for x in large)) == "sdpa"
    assert chosen(*(x.to("meta") for x in large)) == "sdpa"
    assert chosen(large[0].clone().requires_grad_(), *large[1:]) == "sdpa"


@here
def test_what_it_cannot_do_is_told():
    q, k, v = normal(5, 7, dim=16)
    attend = attention_backend("tiled")
    with pytest.raises(UserError, match="attention backend = tiled computes in bfloat16, not in float32"):
        attend(q.float(), k.float(), v.float())
    with pytest.raises(UserError, match="attention backend = tiled cannot attend with a mask or bias"):
        attend(q, k, v, torch.zeros(7))
    with pytest.raises(UserError, match="attention backend = tiled has no gradient"):
        attend(q.requires_grad_(), k, v)


def test_a_processor_without_products_in_bfloat16_is_told(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    with pytest.raises(UserError, match="attention backend = tiled needs a CPU with products in bfloat16"):
        attention_backend("tiled")
    assert BACKENDS["tiled"].pays(*normal(1024, 1024, dim=128))
    assert chosen(*normal(1024, 1024, dim=128)) == "sdpa"
