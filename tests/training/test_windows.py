"""Training sees what a stream sees: the mask route, the gathered route and the cached route are equal."""

from dataclasses import replace

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streamvid.errors import UserError
from streamvid.methods import Method, load_method, method_names
from streamvid.rope import temporal_frequencies
from streamvid.training.windows import MaskedAttention, WindowedAttention, attention_mask, plan_blocks
from streamvid.window import POSITIONS, WindowOptions

SMALL = WindowOptions(frames_per_block=2, window=6, sink=2)
BLOCKS = 8  # the window is full at block 3, so that most blocks come after evictions


def clip_of(blocks: int, size: int, batch: int = 2):
    """Noisy and clean latents, a timestep per frame, a prompt per block."""
    frames = blocks * size
    timestep = torch.linspace(1000, 100, blocks).repeat_interleave(size)
    return tiny.clip(1, frames, batch), tiny.clip(2, frames, batch), timestep, tiny.text(3, batch, blocks)


def teacher_forcing(context, noisy, clean, timestep, text, model=None) -> torch.Tensor:
    """Predictions for the noisy half of `[clean | noisy]`."""
    frames = noisy.shape[2]
    output = (model or tiny.shared_transformer())(
        torch.cat([clean, noisy], 2),
        torch.cat([torch.zeros(frames), timestep]).expand(len(noisy), -1),
        torch.cat([text, text], 1),
        context=context,
    )
    return output.sample[:, :, frames:]


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("sink", [0, 1, 2, 3])
def test_teacher_forcing_sees_what_the_stream_sees(positions, sink):
    options = replace(SMALL, sink=sink, positions=positions)
    plans, clip = plan_blocks(options, BLOCKS), clip_of(BLOCKS, 2)
    cached = tiny.run_blocks(tiny.context_cache(options, batch=2), *clip)
    gathered = teacher_forcing(WindowedAttention(plans, 2, tiny.GRID, 12), *clip)
    torch.testing.assert_close(gathered, cached, atol=1e-5, rtol=0)
    if positions == "absolute":
        masked = teacher_forcing(MaskedAttention(plans, 2, tiny.GRID, 12), *clip)
        torch.testing.assert_close(masked, cached, atol=1e-5, rtol=0)


@pytest.mark.parametrize("frequencies", [(6, 4.0, 0.0), (None, 1.0, 0.5), (4, 2.0, 0.3)])
@pytest.mark.parametrize("positions", POSITIONS)
def test_the_routes_agree_for_other_frequencies(positions, frequencies):
    trained, interpolation, jitter = frequencies
    options = replace(SMALL, positions=positions)
    plans, clip = plan_blocks(options, BLOCKS), clip_of(BLOCKS, 2)
    cache = tiny.context_cache(
        options, batch=2, trained_frames=trained, rope_interpolation=interpolation, head_jitter=jitter
    )
    temporal = temporal_frequencies(12, 2, trained, interpolation, jitter)
    cached = tiny.run_blocks(cache, *clip)
    gathered = teacher_forcing(WindowedAttention(plans, 2, tiny.GRID, 12, temporal=temporal), *clip)
    torch.testing.assert_close(gathered, cached, atol=1e-5, rtol=0)
    assert (gathered - teacher_forcing(WindowedAttention(plans, 2, tiny.GRID, 12), *clip)).abs().max() > 1e-3
    if positions == "absolute":
        masked = teacher_forcing(MaskedAttention(plans, 2, tiny.GRID, 12, temporal=temporal), *clip)
        torch.testing.assert_close(masked, cached, atol=1e-5, rtol=0)


@torch.no_grad()
@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from(sorted(POSITIONS)),
    *[st.integers(low, high) for low, high in [(1, 3), (0, 4), (0, 5), (1, 6)]],
)
def test_the_routes_agree_for_any_window(positions, size, sink, extra, blocks):
    options = WindowOptions(size, sink + size + extra, sink, positions)
    plans, clip = plan_blocks(options, blocks), clip_of(blocks, size, batch=1)
    cached = tiny.run_blocks(tiny.context_cache(options), *clip)
    gathered = teacher_forcing(WindowedAttention(plans, 2, tiny.GRID, 12), *clip)
    torch.testing.assert_close(gathered, cached, atol=1e-5, rtol=0)
    if positions == "absolute":
        masked = teacher_forcing(MaskedAttention(plans, 2, tiny.GRID, 12), *clip)
        torch.testing.assert_close(masked, cached, atol=1e-5, rtol=0)


def has_mask_form(method: Method) -> bool:
    """Whole frames, seen at their indices, with scores as they are: one mask says all that a block attends."""
    whole = method.sink_update == "static" and method.budget is None and not method.recompute
    plain = method.far_scale == method.far_decay == method.past_bias == 1.0
    return method.sampler == "few_step" and method.positions == "absolute" and whole and plain


MASKED = [name for name in method_names() if has_mask_form(load_method(name))]


def test_methods_with_a_mask_form():
    framewise = ["causal_forcing_1step", "causal_forcing_2step", "causal_forcing_framewise"]
    assert [*framewise, "flex", "lol", "longlive", "longlive2_multishot", "self_forcing"] == MASKED


@torch.no_grad()
@pytest.mark.parametrize("name", MASKED)
def test_the_routes_agree_for_every_method_with_a_mask_form(name):
    method = load_method(name)
    options = method.window_options()
    size, blocks = options.frames_per_block, options.window // options.frames_per_block + 2
    plans, clip = plan_blocks(options, blocks), clip_of(blocks, size, batch=1)
    assert plans[-1].evicted
    cached = tiny.run_blocks(tiny.context_cache(options, **method.cache_options()), *clip)
    temporal = temporal_frequencies(
        12, 2, method.trained_frames, method.rope_interpolation, method.head_jitter
    )
    masked = teacher_forcing(MaskedAttention(plans, 2, tiny.GRID, 12, temporal=temporal), *clip)
    torch.testing.assert_close(masked, cached, atol=1e-5, rtol=0)


@torch.no_grad()
def test_block_causal_training_sees_what_the_stream_sees():
    """Diffusion forcing: the context is the noisy stream itself, each block at its own level."""
    plans, (noisy, _, timestep, text) = plan_blocks(SMALL, BLOCKS), clip_of(BLOCKS, 2)
    model, cache = tiny.shared_transformer(), tiny.context_cache(SMALL, batch=2)
    cached = []
    for block in range(BLOCKS):
        own = slice(2 * block, 2 * block + 2)
        plan = cache.planner.plan()
        cache.begin(plan)
        prompt_kv = model.prompt_kv(text[:, block])
        times = timestep[own].expand(2, -1)
        cached.append(model(noisy[:, :, own], times, prompt_kv=prompt_kv, context=cache).sample)
        cache.commit(plan, noisy[:, :, own])
    for context in (MaskedAttention(plans, 1, tiny.GRID, 12), WindowedAttention(plans, 1, tiny.GRID, 12)):
        output = model(noisy, timestep.expand(2, -1), text, context=context).sample
        torch.testing.assert_close(output, torch.cat(cached, 2), atol=1e-5, rtol=0)


@torch.no_grad()
def test_several_noisy_copies_do_not_see_each_other():
    plans, (noisy, clean, timestep, text) = plan_blocks(SMALL, 4), clip_of(4, 2)
    other = tiny.clip(9, 8, 2)
    for context in (WindowedAttention(plans, 3, tiny.GRID, 12), MaskedAttention(plans, 3, tiny.GRID, 12)):
        both = tiny.shared_transformer()(
            torch.cat([clean, noisy, other], 2),
            torch.cat([torch.zeros(8), timestep, timestep]).expand(2, -1),
            text.repeat(1, 3, 1, 1),
            context=context,
        ).sample[:, :, 8:]
        for copy, output in zip((noisy, other), both.split(8, 2), strict=True):
            alone = teacher_forcing(type(context)(plans, 2, tiny.GRID, 12), copy, clean, timestep, text)
            torch.testing.assert_close(output, alone, atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_first_block_needs_no_clean_stream():
    plans, (noisy, clean, timestep, text) = plan_blocks(SMALL, 1), clip_of(1, 2)
    expected = tiny.run_blocks(tiny.context_cache(SMALL, batch=2), noisy, clean, timestep, text)
    context = WindowedAttention(plans, 2, tiny.GRID, 12, has_clean=False)
    doubled = [torch.cat([x, x], d) for x, d in ((noisy, 2), (timestep, 0), (text, 1))]
    output = tiny.shared_transformer()(
        doubled[0], doubled[1].expand(2, -1), doubled[2], context=context
    ).sample
    torch.testing.assert_close(output, torch.cat([expected, expected], 2), atol=1e-5, rtol=0)


@torch.no_grad()
def test_diffusion_forcing_sees_noisy_frames_of_its_own_stream():
    """Without a clean stream every copy attends its own window: the block-causal mask of the papers."""
    plans, (noisy, _, timestep, text) = plan_blocks(SMALL, BLOCKS), clip_of(BLOCKS, 2)
    model = tiny.shared_transformer()
    masked = model(
        noisy, timestep.expand(2, -1), text, context=MaskedAttention(plans, 1, tiny.GRID, 12)
    ).sample
    two = [torch.cat([noisy, noisy.flip(0)], 2), timestep.repeat(2).expand(2, -1), torch.cat([text, text], 1)]
    gathered = model(*two, context=WindowedAttention(plans, 2, tiny.GRID, 12, has_clean=False)).sample
    torch.testing.assert_close(gathered[:, :, : noisy.shape[2]], masked, atol=1e-5, rtol=0)
    assert not torch.allclose(gathered[:, :, noisy.shape[2] :], masked, atol=1e-2)


@pytest.mark.parametrize("route", [MaskedAttention, WindowedAttention])
def test_gradient_checkpointing_changes_nothing(route):
    plans, clip = plan_blocks(SMALL, 4), clip_of(4, 2, batch=1)
    results = []
    for checkpointing in (False, True):
        model = tiny.transformer()
        if checkpointing:
            model.enable_gradient_checkpointing()
        loss = teacher_forcing(route(plans, 2, tiny.GRID, 12), *clip, model).square().mean()
        loss.backward()
        results.append((loss.detach(), [p.grad for p in model.parameters()]))
    (loss, gradients), (other_loss, other_gradients) = results
    assert torch.equal(loss, other_loss)
    assert all(map(torch.equal, gradients, other_gradients))
    assert all(g.abs().max() > 0 for g in gradients)  # every parameter takes part


def test_gradients_reach_the_clean_context():
    """The last block learns from what it attends, and from nothing that was evicted."""
    plans, (noisy, clean, timestep, text) = plan_blocks(replace(SMALL, window=4), 5), clip_of(5, 2, batch=1)
    clean.requires_grad_()
    one_layer = tiny.transformer(num_layers=1)
    output = teacher_forcing(
        MaskedAttention(plans, 2, tiny.GRID, 12), noisy, clean, timestep, text, one_layer
    )
    output[:, :, -2:].sum().backward()
    reached = clean.grad.abs().amax((0, 1, 3, 4)) > 0
    # a window of 4 is the sink and the block itself, whose noisy copy stands in for the clean one
    assert reached.nonzero().flatten().tolist() == [0, 1]


def test_the_mask_of_a_short_clip():
    """[clean | noisy] of three one-frame blocks, window 2, sink 1: by hand."""
    mask = attention_mask(plan_blocks(WindowOptions(1, 2, 1), 3), 2, 1).int().tolist()
    assert mask == [
        # clean   noisy
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 0, 1, 0, 0, 0],
        [0, 0, 0, 1, 0, 0],
        [1, 0, 0, 0, 1, 0],
        [1, 0, 0, 0, 0, 1],
    ]
    wide = attention_mask(plan_blocks(WindowOptions(1, 2, 1), 3), 2, 4)
    assert wide.shape == (24, 24) and torch.equal(wide[::4, ::4].int(), torch.tensor(mask, dtype=torch.int32))


def test_relative_positions_have_no_mask():
    with pytest.raises(UserError, match="positions = cache_relative has no mask form: use WindowedAttention"):
        MaskedAttention(plan_blocks(replace(SMALL, positions="cache_relative"), 8), 2, tiny.GRID, 12)
