"""Noise that names the scenery: patterns, quantiles, normality, and the head that asks for it."""

import math

import pytest
import torch

from streamvid.training.noise_coupling import (
    COUPLED_PLACES,
    PLACES,
    SceneryHead,
    couple_noise,
    coupled_scenery,
    coupling_directions,
)
from streamvid.world.scene import SCENERY

K = len(COUPLED_PLACES)


def projections(noise: torch.Tensor) -> torch.Tensor:
    """Of the first block's noise on the directions of the coupling, `[B, S, K]`."""
    directions = coupling_directions(noise.shape[2], *noise.shape[-2:])
    return torch.einsum("bscfhw,kcfhw->bsk", noise[:, :, :, :3], directions)


def test_all_that_varies_is_coupled():
    assert set(COUPLED_PLACES) == {name for name, places in SCENERY.items() if len(places) > 1}
    assert tuple(len(SCENERY[name]) for name in COUPLED_PLACES) == PLACES


def test_directions_are_orthonormal():
    directions = coupling_directions(5, 8, 16).flatten(1)
    torch.testing.assert_close(directions @ directions.T, torch.eye(K))


def test_directions_are_where_they_are_said_to_be():
    for direction, place in zip(coupling_directions(4, 8, 16), COUPLED_PLACES.values(), strict=True):
        expected = torch.zeros(4, 3, 4, 4)
        if place.row is None:
            expected[place.channel] = 1.0
        else:
            expected[place.channel, 0, place.row] = torch.tensor(place.columns, dtype=torch.float)
        places = direction / direction.abs().max()
        assert torch.equal(places, expected.repeat_interleave(2, 2).repeat_interleave(4, 3))


def test_means_are_seen_without_knowing_where_a_token_is():
    """Their projection stays when tokens change places; that of a difference does not."""
    directions = coupling_directions(4, 16, 16)
    turned = directions.roll(8, -1)
    for direction, other, place in zip(directions, turned, COUPLED_PLACES.values(), strict=True):
        assert torch.equal(direction, other) == (place.row is None)


def test_coupled_noise_has_the_quantile_as_its_projection():
    noise, scenery = torch.randn(50, 2, 8, 6, 4, 8), torch.rand(50, K)
    coupled = couple_noise(noise, scenery, torch.ones(50, 2, dtype=torch.bool))
    quantile = torch.special.ndtri(scenery.clamp(1e-4, 1 - 1e-4))
    for stream in range(2):
        torch.testing.assert_close(projections(coupled)[:, stream], quantile, atol=1e-5, rtol=1e-5)
    # all other directions and all later blocks stay
    directions = coupling_directions(8, 4, 8)

    def rest(any_noise: torch.Tensor) -> torch.Tensor:
        known = torch.einsum("bsk,kcfhw->bscfhw", projections(any_noise), directions)
        return any_noise[:, :, :, :3] - known

    torch.testing.assert_close(rest(coupled), rest(noise), atol=1e-5, rtol=0)
    assert torch.equal(coupled[:, :, :, 3:], noise[:, :, :, 3:])


def test_coupling_touches_chosen_streams_only():
    noise, scenery = torch.randn(6, 3, 8, 3, 4, 4), torch.rand(6, K)
    only, given = torch.tensor([[True, False, True], [False, True, False]] * 3), noise.clone()
    coupled = couple_noise(noise, scenery, only)
    assert torch.equal(coupled[~only], noise[~only])
    assert all(not torch.equal(one, other) for one, other in zip(coupled[only], noise[only], strict=True))
    assert torch.equal(noise, given)  # a copy is made


def test_coupled_noise_is_standard_normal():
    """For uniform scenery: moments of the coupled directions and their neighbours, and no correlations."""
    torch.manual_seed(0)
    count = 20_000
    noise, scenery = torch.randn(count, 1, 4, 3, 4, 4), torch.rand(count, K)
    coupled = couple_noise(noise, scenery, torch.ones(count, 1, dtype=torch.bool))[:, 0].flatten(1)
    error = 4 / count**0.5
    assert coupled.mean(0).abs().max() < 1.1 * error
    covariance = coupled.T @ coupled / count
    assert (covariance - torch.eye(192)).abs().max() < 1.5 * error
    for moment, expected in ((3, 0.0), (4, 3.0)):
        assert (coupled**moment).mean() == pytest.approx(expected, abs=0.06)
    told = coupled @ coupling_directions(4, 4, 4).flatten(1).T
    for direction in told.T:  # Kolmogorov-Smirnov
        distance = (torch.special.ndtr(direction.sort().values) - torch.arange(count) / count).abs().max()
        assert distance < 1.95 / count**0.5  # one in a thousand


def test_every_place_is_an_interval():
    cells = torch.tensor([[len(places) - 1 for places in SCENERY.values()], [0] * len(SCENERY)])
    told = coupled_scenery(cells) * torch.tensor(PLACES)
    assert torch.equal(told[0].floor(), torch.tensor(PLACES) - 1.0)
    assert torch.equal(told[1].floor(), torch.zeros(K))


def test_a_head_that_knows_nothing_has_the_entropy_of_all_places():
    head, every = SceneryHead(6), torch.ones(2, 3, dtype=torch.bool)
    loss = head(torch.randn(2, 3, 4, 6), torch.rand(2, K), every)
    assert loss.item() == pytest.approx(sum(map(math.log, PLACES)), abs=1e-5)


def test_a_head_reads_tokens_of_chosen_streams_only():
    torch.manual_seed(0)
    head, scenery = SceneryHead(6), torch.rand(2, K)
    torch.nn.init.normal_(head.classifier.weight)
    tokens = torch.randn(2, 3, 4, 6, requires_grad=True)
    only = torch.tensor([[True, False, False], [False, False, True]])
    loss = head(tokens, scenery, only)
    loss.backward()
    assert torch.equal(tokens.grad.abs().sum((2, 3)) > 0, only)
    each = [
        head(tokens[b : b + 1, s : s + 1], scenery[b : b + 1], torch.ones(1, 1)) for b, s in ((0, 0), (1, 2))
    ]
    torch.testing.assert_close(loss, sum(each) / 2)
    assert head(tokens, scenery, torch.zeros_like(only)).item() == 0.0


def test_a_head_learns_what_tokens_tell():
    torch.manual_seed(0)
    head, scenery = SceneryHead(K + 3), torch.rand(64, K)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.1)
    tokens = torch.cat([scenery - 0.5, torch.randn(64, 3) * 0.1], 1)[:, None, None].expand(-1, 2, 3, -1)
    first = None
    for _ in range(100):
        loss = head(tokens, scenery, torch.ones(64, 2))
        first = first or loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5 * first
