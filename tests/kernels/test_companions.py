"""Fused companions of attention against their twins in float64, on the GPU or in Triton's interpreter."""

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from streamvid.kernels import companions
from streamvid.kernels.check import ROUNDING
from streamvid.kernels.companions import PLAIN, Companions, Meetings
from streamvid.kernels.problems import Sizes, arguments, companion_errors, results

from streamvid.rope import Rotation, rotate, rotation
from streamvid.transformer import FullAttention

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = pytest.mark.parametrize("name", Companions._fields)
SIZES = st.builds(
    Sizes,
    batch=st.integers(1, 2),
    frames=st.integers(1, 4),
    tokens=st.integers(1, 9),
    heads=st.integers(1, 3),
    dim=st.sampled_from([16, 20, 36, 64, 128]),
    layers=st.integers(1, 2),
)


@NAMES
@settings(max_examples=4)
@given(SIZES)
def test_float32_is_within_1e_5_of_float64(name, sizes):
    error, _ = companion_errors(name, sizes, DEVICE, torch.float32)
    assert error < 1e-5


@NAMES
@settings(max_examples=4)
@given(SIZES, st.sampled_from([torch.bfloat16, torch.float16]))
def test_half_precision_is_within_twice_the_error_of_the_twin(name, sizes, dtype):
    error, of_twin = companion_errors(name, sizes, DEVICE, dtype)
    assert error <= max(2 * of_twin, ROUNDING[dtype])


@NAMES
def test_every_number_is_written_that_the_twin_writes(name):
    """The comparison above would not see a kernel that does nothing to a buffer that its twin leaves alone."""
    given = arguments(name, Sizes(), DEVICE, torch.float32)
    before = results(lambda *same: None, given)
    twin, fused = (results(f, given) for f in (getattr(PLAIN, name), companions.kernel(name)))
    changed = [not torch.equal(a, b) for a, b in zip(before, twin[len(twin) - len(before) :], strict=True)]
    assert [
        not torch.equal(a, b) for a, b in zip(before, fused[len(fused) - len(before) :], strict=True)
    ] == changed
    assert any(changed) == (name in ("norm_rotate_write", "fuse_sink"))


# --- the twins themselves ---------------------------------------------------------------------------------------------


def test_a_row_is_normalised_then_modulated_by_its_frame():
    x, shift, scale = tiny.normal(0, 1, 4, 6), tiny.normal(1, 1, 2, 6), tiny.normal(2, 1, 2, 6)
    normed = (x - x.mean(-1, keepdim=True)) / x.std(-1, unbiased=False, keepdim=True)
    got = PLAIN.modulated_norm(x, shift, scale, 0.0)
    torch.testing.assert_close(got[0, 3], normed[0, 3] * (1 + scale[0, 1]) + shift[0, 1])
    assert torch.equal(PLAIN.gated_sum(x, x, shift)[0, 0], x[0, 0] + x[0, 0] * shift[0, 0])


def test_heads_may_turn_differently():
    sizes = Sizes(dim=16)
    given = list(arguments("norm_rotate_write", sizes, DEVICE, torch.float32))
    angle = torch.randn(sizes.frames * sizes.tokens, sizes.heads, 8, device=DEVICE)
    given[5] = (Rotation(angle.cos(), angle.sin()), Rotation(angle.sin(), angle.cos()))
    twin, fused = (
        results(f, tuple(given)) for f in (PLAIN.norm_rotate_write, companions.kernel("norm_rotate_write"))
    )
    for a, b in zip(twin, fused, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_a_sink_frame_is_averaged_with_what_it_meets_in_order():
    """Closed form: keys of ones that were turned, decays 1/2 and 1/4; the second frame meets nothing and is only shown."""
    tokens, dim = 3, 12
    ones = torch.ones(1, 1, tokens, 1, dim)
    gone = rotation([5.0, 9.0], 1, tokens, dim)
    evicted_k = torch.cat([rotate(8 * ones, Rotation(*(x[:tokens] for x in gone))), 0 * ones], 2)
    evicted = evicted_k, torch.cat([4 * ones, 2 * ones], 2)
    average = tuple(torch.zeros(1, 1, 2 * tokens, 1, dim) for _ in range(2))
    mixed, stored = (tuple(torch.full_like(x, 7.0) for x in average) for _ in range(2))
    meetings = Meetings(
        evicted,
        mixed,
        (0, 2, 2),
        (0, 1),
        torch.tensor([[[0.5, 0.5]], [[0.25, 0.75]]]),
        Rotation(gone.cos, -gone.sin),
    )
    at = rotation([1.0, 2.0], 1, tokens, dim)
    PLAIN.fuse_sink(average, meetings, stored, at, (True, True))
    torch.testing.assert_close(mixed[0][:, :, :tokens], ones)  # (0 + 8) / 2, a quarter of it
    torch.testing.assert_close(mixed[1][:, :, :tokens], 2.0 * ones)  # 4 / 2 / 4 + 2 * 3 / 4
    assert not mixed[0][:, :, tokens:].any() and not stored[1][:, :, tokens:].any()
    torch.testing.assert_close(stored[0][:, :, :tokens], rotate(ones, Rotation(*(x[:tokens] for x in at))))


# --- the choice -------------------------------------------------------------------------------------------------------


def test_who_takes_the_kernels(monkeypatch):
    assert companions.companions("auto", "cpu") is PLAIN
    assert companions.companions("reference", "cuda") is PLAIN
    assert companions.companions("triton", "cpu").gated_sum is not PLAIN.gated_sum
    monkeypatch.setattr(companions, "_disabled", {"gated_sum": "is disabled"})
    taken = companions.companions("triton", "cpu")
    assert taken.gated_sum is PLAIN.gated_sum and taken.modulated_norm is not PLAIN.modulated_norm


def test_where_a_gradient_is_wanted_the_twin_serves():
    x = tiny.normal(0, 1, 4, 8).requires_grad_()
    fused = companions.companions("triton", DEVICE)
    fused.gated_sum(x.to(DEVICE), x.to(DEVICE), x[:, :2].to(DEVICE)).sum().backward()
    assert x.grad is not None and x.grad.any()


@torch.no_grad()
def test_a_forward_through_the_kernels_is_the_forward():
    model = tiny.shared_transformer()
    given = tiny.clip(0, 3, 2), torch.tensor([1000.0, 333.3]), tiny.text(1, 2)
    plain = model(*given).sample
    context = FullAttention(3, *tiny.GRID, 12, "cpu")
    context.companions = companions.companions("triton", "cpu")
    torch.testing.assert_close(model(*given, context=context).sample, plain, atol=2e-5, rtol=1e-5)
    context.companions = context.companions._replace(gated_sum=lambda x, y, gate: x)
    assert (model(*given, context=context).sample - plain).abs().amax() > 1e-2  # they are what runs
