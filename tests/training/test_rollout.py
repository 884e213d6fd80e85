"""Rollouts of training: the latents of inference bit for bit, gradient where it belongs and nowhere else."""

from itertools import islice

import pytest
import tiny
import torch

from streamvid.methods import load_method, method_names
from streamvid.noise import SeededNoise
from streamvid.training.rollout import RolloutStream

PROMPTS = ["a red fox walks", "a blue bird sleeps"]
SEEDS = [3, 4]
SMALL = {"window": 9, "sink": 3}  # evicts from block 3 on


def rollout(model=None, method="longlive", blocks=None, **changes) -> RolloutStream:
    pipe = tiny.pipeline()
    options = {key: changes.pop(key) for key in ("straight_through",) if key in changes}
    return RolloutStream(
        model or tiny.transformer(),
        pipe.scheduler,
        pipe.encode_prompt,
        load_method(method, changes),
        PROMPTS,
        tiny.LATENT[1:],
        SeededNoise(SEEDS, tiny.LATENT),
        blocks,
        **options,
    )


def streamed(method: str, blocks: int, switch_at: int | None = None, **changes) -> torch.Tensor:
    """Latents of inference."""
    stream = tiny.pipeline().stream(
        PROMPTS,
        method=method,
        overrides=changes,
        seed=SEEDS,
        blocks=blocks,
        decode_pixels=False,
        context_pass="separate",  # as rollouts have them
    )
    chunks = list(islice(stream, switch_at or 0))
    if switch_at is not None:
        stream.prompt("the cat runs")
    return torch.cat([chunk.latents for chunk in [*chunks, *stream]], 2)


FEW_STEP = [name for name in method_names() if load_method(name).sampler == "few_step"]


def few_blocks(method: str) -> int:
    """Enough for the window to move twice."""
    made = load_method(method)
    return made.window // made.frames_per_block + 2


@pytest.mark.parametrize("method", FEW_STEP)
def test_a_rollout_is_the_stream_of_inference(method):
    """Same seeds, same switch: bit-equal latents, with gradient in every block's last step."""
    blocks = few_blocks(method)
    made = rollout(method=method, blocks=blocks)
    last = len(made.steps) - 1
    first = made.roll([last] * (blocks - 1), blocks - 1)
    made.prompt("the cat runs")
    second = made.roll([last], 1)
    assert torch.equal(
        torch.cat([first.latents, second.latents], 2), streamed(method, blocks, switch_at=blocks - 1)
    )
    size = made.method.frames_per_block
    assert second.first_frame == (blocks - 1) * size and first.graded.all()
    for rolled in (first, second):
        (by_weight,) = torch.autograd.grad(rolled.latents.sum(), made.tap.model.proj_out.weight)
        assert by_weight.abs().sum() > 0


@pytest.mark.parametrize("method", ["rolling_forcing", "rolling_forcing_release", "streamdit"])
def test_a_rolling_rollout_is_the_stream_of_inference(method):
    blocks = few_blocks(method)
    made = rollout(method=method, blocks=blocks)
    assert torch.equal(torch.cat([c.latents for c in made], 2), streamed(method, blocks))


@pytest.mark.parametrize("offset", [0, 3])
def test_windows_that_do_not_overlap_hold_every_block_once(offset):
    blocks = 7
    made = rollout(method="rolling_forcing", blocks=blocks)
    rolled = made.roll_windows(offset)
    assert rolled.latents.shape[2] == 3 * blocks and rolled.graded.all()
    levels = rolled.timestep[0, ::3].tolist()
    # window w holds blocks w - 4 .. w, the newest at the first of five levels
    expected = []
    for block in range(blocks):
        window = next(w for w in range(block, block + 5) if w % 5 == offset)
        expected.append(made.steps[window - block][0])
    assert levels == pytest.approx(expected)
    (by_weight,) = torch.autograd.grad(rolled.latents[:, :, -1].sum(), made.tap.model.proj_out.weight)
    assert by_weight.abs().sum() > 0
    plain = rollout(method="rolling_forcing", blocks=blocks).roll_windows(offset, gradient=False)
    assert torch.equal(plain.latents, rolled.latents) and not plain.latents.requires_grad


def test_an_exit_step_takes_what_the_sampler_predicted_there():
    """At exit step e the block is x0 of step e, and the next block attends it."""
    made, twin = rollout(), rollout()
    seen = []
    make = twin.tap.model.forward

    def watch(x=None, t=None, **keywords):
        output = make(x, t, **keywords)
        if x is not None and not keywords.get("return_dict", True):
            seen.append(twin.pipe.scheduler.x0_from_output(output[0], x, float(twin.steps[0][1])))
        return output

    twin.tap.model.forward = watch
    next(twin)
    rolled = made.roll([0, 1], 0)
    assert torch.equal(rolled.latents[:, :, :3], seen[0])
    assert rolled.timestep[0, ::3].tolist() == [made.steps[0][0], made.steps[1][0]]
    other = rollout().roll([1, 1], 0)
    assert not torch.equal(other.latents[:, :, 3:], rolled.latents[:, :, 3:])


def test_only_the_last_blocks_carry_gradient_and_values_stay():
    rolled, plain = rollout().roll([1] * 4, 2), rollout().roll([1] * 4, 0)
    assert torch.equal(rolled.latents, plain.latents) and not plain.latents.requires_grad
    assert rolled.graded.tolist() == [False] * 6 + [True] * 6
    (by_latents,) = torch.autograd.grad(rolled.latents.sum(), rolled.latents)
    assert by_latents.shape == rolled.latents.shape


def test_every_weight_learns_also_in_half_precision():
    for precise in (True, False):
        made = rollout(tiny.transformer())
        with torch.autocast("cpu", torch.bfloat16, enabled=not precise):
            rolled = made.roll([1, 0], 2)
        rolled.latents.float().square().mean().backward()
        without = [
            n for n, p in made.tap.model.named_parameters() if p.grad is None or p.grad.abs().sum() == 0
        ]
        assert not without


# --- what is detached -------------------------------------------------------------------------------------------------


def gradient_between_blocks(straight_through: bool, **changes):
    """Latents of four blocks, and the gradient of the last one's loss by all weights."""
    made = rollout(straight_through=straight_through, **{**SMALL, **changes})
    rolled = made.roll([1] * 4, 4)
    loss = rolled.latents[:, :, -3:].square().sum()
    names, weights = zip(*made.tap.model.named_parameters(), strict=True)
    return rolled.latents, dict(zip(names, torch.autograd.grad(loss, weights), strict=True))


def test_a_straight_through_cache_changes_gradients_and_no_value():
    (plain, detached), (same, through) = (gradient_between_blocks(on) for on in (False, True))
    assert torch.equal(plain, same)
    assert not torch.allclose(detached["blocks.0.attn1.to_k.weight"], through["blocks.0.attn1.to_k.weight"])
    # the last layer's queries see no earlier block through the last layer's own keys
    torch.testing.assert_close(detached["proj_out.weight"], through["proj_out.weight"])


def test_nothing_flows_into_finished_blocks():
    """The loss of a block moves none of the earlier forwards' activations; straight-through it does."""
    for straight_through in (False, True):
        made = rollout(straight_through=straight_through, **SMALL)
        leaves = []
        project = made.tap.model.blocks[0].attn1.to_k

        def watch(module, arguments, output, into=leaves):
            if output.requires_grad:
                output.retain_grad()
                into.append(output)

        project.register_forward_hook(watch)
        rolled = made.roll([1] * 3, 3)
        assert len(leaves) == 3
        rolled.latents[:, :, -3:].sum().backward()
        moved = [leaf.grad is not None and leaf.grad.abs().sum() > 0 for leaf in leaves]
        assert moved == ([True] * 3 if straight_through else [False, False, True])


@pytest.mark.parametrize("straight_through", [False, True])
@pytest.mark.parametrize(
    "changes", [{}, {"positions": "cache_relative"}, {"sink_update": "ema", "sink_decay": 0.5}]
)
def test_gradient_checkpointing_recomputes_against_the_window_of_then(straight_through, changes):
    """The backward runs when the cache has long moved on: the same gradients, bit for bit."""
    found = []
    for checkpointing in (False, True):
        model = tiny.transformer()
        if checkpointing:
            model.enable_gradient_checkpointing()
        made = rollout(model, straight_through=straight_through, **SMALL, **changes)
        rolled = made.roll([1] * 6, 6)
        rolled.latents.square().sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name]), name
