"""Muon on parameters that move, and its state; what it computes is in test_trainer.py."""

import pytest
import torch
from torch import nn

from streamvid.training.optimizers import Muon, build_optimizers


def step(optimizer, weight: nn.Parameter, seed: int) -> None:
    weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
    optimizer.step()


def test_muon_follows_a_parameter_whose_storage_was_moved():
    """Distributed wrappers and `.to` give a parameter new storage; a view kept from before would be updated in vain."""
    still, moved = (nn.Parameter(torch.ones(4, 2, 3)) for _ in range(2))
    optimizers = [Muon([weight], lr=0.1) for weight in (still, moved)]
    for seed in range(3):
        moved.data = moved.data.clone()
        before = moved.detach().clone()
        for optimizer, weight in zip(optimizers, (still, moved), strict=True):
            step(optimizer, weight, seed)
        assert not torch.equal(moved, before)
        assert torch.equal(moved, still)


def test_muon_takes_gradients_of_any_layout():
    contiguous, strided = (nn.Parameter(torch.ones(4, 6)) for _ in range(2))
    gradient = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).T
    strided.grad, contiguous.grad = gradient, gradient.contiguous()
    for weight in (contiguous, strided):
        Muon([weight], lr=0.1).step()
    assert torch.equal(contiguous, strided)


SHAPES = [((6, 4, 3, 3), torch.channels_last), ((8, 5, 2, 3, 3), torch.channels_last_3d)]


@pytest.mark.parametrize(("shape", "layout"), SHAPES, ids=["2d", "3d"])
def test_muon_updates_channels_last_weights_like_contiguous_ones(shape, layout):
    """Orthogonalisation does not depend on the order of a matrix' columns: up to rounding (in bfloat16), and bit for bit
    it is the update of the matrix with channels as its last columns, in the weight's own memory."""
    torch.manual_seed(0)
    start = torch.randn(shape)
    plain, last = (nn.Parameter(start.clone(memory_format=f)) for f in (torch.contiguous_format, layout))
    matrix = nn.Parameter(start.movedim(1, -1).flatten(1).clone())
    ours = [Muon([weight], lr=0.1, weight_decay=0.05) for weight in (plain, last)]
    theirs = torch.optim.Muon(
        [matrix], lr=0.1, weight_decay=0.05, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    memory = last.data_ptr()
    for number in range(3):
        gradient = torch.randn(shape)
        plain.grad = gradient
        # a network gives gradients of the weight's layout, a distributed wrapper may give others
        last.grad = gradient.clone(memory_format=layout if number else torch.contiguous_format)
        matrix.grad = gradient.movedim(1, -1).flatten(1)
        for optimizer in (*ours, theirs):
            optimizer.step()
        assert torch.equal(last.detach().movedim(1, -1).flatten(1), matrix.detach())
        assert (last - plain).norm() < 0.02 * (plain - start).norm()
    assert last.is_contiguous(memory_format=layout) and last.data_ptr() == memory


def test_optimizers_go_on_from_their_saved_state():
    def network() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))

    def train(module, optimizers, steps) -> None:
        for seed in steps:
            torch.manual_seed(seed)
            module(torch.randn(5, 3)).square().mean().backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()

    whole, first, second = network(), network(), network()
    rates = {"muon_lr": 0.02, "adamw_lr": 0.01, "weight_decay": 0.1}
    train(whole, build_optimizers(whole, **rates), range(6))
    saved = build_optimizers(first, **rates)
    train(first, saved, range(3))
    second.load_state_dict(first.state_dict())
    resumed = build_optimizers(second, **rates)
    for optimizer, state in zip(resumed, [optimizer.state_dict() for optimizer in saved], strict=True):
        optimizer.load_state_dict(state)
    train(second, resumed, range(3, 6))
    for one, other in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)
