"""Costs counted on the meta device against closed forms."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from streamvid.meter import Meter, size_of


def meta(*shape: int, dtype=torch.float32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def test_a_linear_layer():
    with torch.device("meta"):
        layer = nn.Linear(8, 32)
    x = meta(5, 8)
    with Meter() as meter:
        y = layer(x)
    assert meter.flop == 2 * 5 * 8 * 32
    assert meter.bytes == size_of([layer.weight, layer.bias, x, y])  # each read or written once
    assert meter.live == meter.peak == size_of([y])  # what was there before does not count


def test_attention_is_fused_and_its_scores_are_never_written():
    q, k = meta(2, 3, 64, 16), meta(2, 3, 4096, 16)
    with Meter() as meter:
        out = F.scaled_dot_product_attention(q, k, k)
    assert out.shape == q.shape
    assert meter.flop == 4 * 2 * 3 * 64 * 4096 * 16
    assert meter.peak < size_of([q]) * 2 < 2 * 3 * 64 * 4096 * 4


def test_memory_that_is_freed_is_counted_once():
    x = meta(1000)
    with Meter() as meter:
        for _ in range(5):
            y = x + 1
        z = y * 2
        del y
    assert (meter.live, meter.peak) == (4000, 8000)
    assert len(meter.calls) == 6
    del z
    assert meter.live == 0


def test_views_cost_nothing_and_writing_in_place_takes_no_memory():
    x = meta(10, 10)
    with Meter() as meter:
        x[2:].transpose(0, 1).flatten(0, 1)[:3]
        before = len(meter.calls)
        x[2:4].copy_(x[6:8])
    assert before == 1  # flatten of a transposed view copies
    assert meter.calls[-1].bytes == 3 * 80 and meter.live == 0  # given twice as an argument, once as a result


def test_layers_that_are_alike_need_not_all_be_run():
    with torch.device("meta"):
        layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
    with Meter() as every:
        x = meta(2, 4)
        for layer in layers:
            x = layer(x)
    with Meter() as one:
        x = meta(2, 4)
        one.times = 3
        layers[0](x)
    assert (one.flop, one.bytes) == (every.flop, every.bytes)


def test_a_call_takes_as_long_as_the_slower_of_products_and_traffic():
    with Meter() as meter:
        meta(4, 4) @ meta(4, 4)
    calls = [call for call in meter.calls if call.flop]
    assert [call.flop for call in calls] == [128]
    assert meter.seconds(flop_rate=1.0, byte_rate=1e12) == pytest.approx(128)
    assert meter.seconds(flop_rate=1e12, byte_rate=2.0) == pytest.approx(meter.bytes / 2)
    more = meter.seconds(1.0, 1e12, call_seconds=10)
    assert more == pytest.approx(128 + 10 * len(meter.calls))


def test_numbers_on_the_cpu_count_where_the_cpu_is_the_device():
    for host, expected in ((True, 400), (False, 0)):
        with Meter(host) as meter:
            kept = torch.zeros(100)
        assert meter.live == expected
        del kept
