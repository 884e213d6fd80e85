"""The causal transformer: Wan's network, one timestep per frame, text computed once."""

import inspect

import pytest
import tiny
import torch
from diffusers import WanTransformer3DModel

from streamvid.transformer import CausalWanTransformer3DModel, FullAttention, PatchEmbedding, WanRMSNorm

FRAMES = 3


@pytest.fixture
def model() -> CausalWanTransformer3DModel:
    return tiny.shared_transformer()


@torch.no_grad()
@pytest.mark.parametrize("cross_attn_norm", [True, False])
def test_without_a_context_it_is_diffusers_wan(cross_attn_norm):
    """The same parameter names, shapes and outputs, with weights that leave no term at zero."""
    ours = tiny.transformer(cross_attn_norm=cross_attn_norm)
    config = {
        name: ours.config[name] for name in inspect.signature(type(ours)).parameters if name != "text_len"
    }
    theirs = WanTransformer3DModel(**config, qk_norm="rms_norm_across_heads").eval()
    theirs.load_state_dict(ours.state_dict())
    latents, timestep, rows = tiny.clip(0, FRAMES, 2), torch.tensor([1000.0, 333.3]), tiny.text(1, 2)
    torch.testing.assert_close(
        ours(latents, timestep, rows).sample, theirs(latents, timestep, rows).sample, atol=2e-5, rtol=1e-5
    )


@torch.no_grad()
@pytest.mark.parametrize("patch", [(1, 2, 2), (1, 4, 4), (2, 2, 4)])
@pytest.mark.parametrize("channels", [16, 36])
def test_patches_are_embedded_as_by_the_convolution(patch, channels):
    """And no number format computes something else on this machine: the convolution does, of some shapes on some CPUs."""
    embedding = PatchEmbedding(channels, 24, kernel_size=patch, stride=patch)
    x = tiny.normal(0, 2, channels, 4, 8, 12)
    expected = torch.nn.functional.conv3d(x, embedding.weight, embedding.bias, stride=patch)
    torch.testing.assert_close(embedding(x), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(embedding.bfloat16()(x.bfloat16()).float(), expected, atol=0.05, rtol=0.05)
    for laid_out in (torch.channels_last_3d, torch.contiguous_format):
        other = embedding.to(memory_format=laid_out)(x.bfloat16().contiguous(memory_format=laid_out))
        torch.testing.assert_close(other.float(), expected, atol=0.05, rtol=0.05)


@torch.no_grad()
def test_a_timestep_per_frame_is_one_for_all_where_they_agree(model):
    latents, rows = tiny.clip(0, FRAMES, 2), tiny.text(1, 2)
    shared = model(latents, torch.tensor([700.0, 20.0]), rows).sample
    each = model(latents, torch.tensor([[700.0] * FRAMES, [20.0] * FRAMES]), rows).sample
    assert torch.equal(shared, each)


def test_without_gradient_it_runs_in_inference_mode_and_gives_plain_tensors():
    """The numbers of a forward with gradient; what comes out may be written to and learnt from."""
    model = tiny.transformer().requires_grad_(True)
    latents, timestep, rows = tiny.clip(0, FRAMES), torch.tensor([700.0]), tiny.text(1, 1)
    modes = []

    class Watching(FullAttention):
        def attend(self, *args):
            modes.append(torch.is_inference_mode_enabled())
            return super().attend(*args)

    context = Watching(FRAMES, *tiny.GRID, 12, "cpu")
    learnt = model(latents, timestep, rows, context=context).sample
    assert learnt.requires_grad and not any(modes)
    modes.clear()
    with torch.no_grad():
        plain = model(latents, timestep, rows, context=context).sample
    assert modes and all(modes) and not plain.is_inference()
    assert torch.equal(plain, learnt)
    (plain.mul_(2) * torch.ones(1, requires_grad=True)).sum().backward()


class Alone:
    """Every frame attends itself only."""

    def attend(self, layer, q, k, v):
        one = FullAttention(1, *tiny.GRID, 12, "cpu")
        pieces = zip(*(x.split(tiny.TOKENS, 1) for x in (q, k, v)), strict=True)
        return torch.cat([one.attend(layer, *piece) for piece in pieces], 1)


@torch.no_grad()
def test_timesteps_and_texts_are_those_of_their_frames(model):
    """Where frames cannot see each other, each comes out as if it were alone."""
    latents, rows = tiny.clip(0, 4, 2), tiny.text(1, 2, 2)  # two texts for two frames each
    timestep = torch.tensor([[1000.0, 0.0, 412.5, 3.0], [1.0, 999.0, 250.0, 250.0]])
    together = model(latents, timestep, rows, context=Alone()).sample
    for frame in range(4):
        own = slice(frame, frame + 1)
        one = model(latents[:, :, own], timestep[:, own], rows[:, frame // 2]).sample
        torch.testing.assert_close(together[:, :, own], one, atol=2e-6, rtol=0)


@torch.no_grad()
def test_text_computed_before_gives_the_same(model):
    latents, timestep, rows = tiny.clip(0, FRAMES, 2), torch.full((2,), 500.0), tiny.text(1, 2)
    prompt_kv = model.prompt_kv(rows)
    given = model(latents, timestep, prompt_kv=prompt_kv, return_dict=False)[0]
    assert torch.equal(given, model(latents, timestep, rows).sample)


@torch.no_grad()
def test_videos_of_a_batch_do_not_see_each_other(model):
    latents, timestep, rows = tiny.clip(0, FRAMES, 2), torch.tensor([900.0, 100.0]), tiny.text(1, 2)
    both = model(latents, timestep, rows).sample
    for i in range(2):
        one = model(latents[i : i + 1], timestep[i : i + 1], rows[i : i + 1]).sample
        torch.testing.assert_close(both[i : i + 1], one, atol=2e-6, rtol=0)


@torch.no_grad()
def test_known_frames_leave_their_keys_and_nothing_else(model):
    latents, rows = tiny.clip(0, 4, 2), tiny.text(1, 2, 2)
    timestep = torch.tensor([[0.0, 0.0, 412.5, 3.0], [0.0, 0.0, 250.0, 250.0]])
    rows = rows[:, :1].expand(-1, 2, -1, -1)

    class Seen(FullAttention):
        def attend(self, layer, q, k, v):
            self.keys = [*getattr(self, "keys", []), k]
            return super().attend(layer, q, k, v)

    outputs, keys = [], []
    for known in (0, 2, 4):
        context = Seen(4, *tiny.GRID, 12, "cpu")
        prompt_kv = model.prompt_kv(rows[:, 0])
        outputs.append(
            model(latents, timestep, prompt_kv=prompt_kv, context=context, known_frames=known).sample
        )
        keys.append(torch.stack(context.keys))
    assert torch.equal(keys[0], keys[1]) and torch.equal(keys[0], keys[2])
    torch.testing.assert_close(outputs[1], outputs[0][:, :, 2:], atol=2e-6, rtol=0)
    assert outputs[2].shape[2] == 0


@torch.no_grad()
def test_embedded_timesteps_stand_for_themselves(model):
    latents, rows = tiny.clip(0, FRAMES, 2), tiny.text(1, 2)
    timestep = torch.tensor([[700.0] * FRAMES, [20.0] * FRAMES])
    embedded = model.time_embedding(timestep)
    assert torch.equal(model(latents, embedded, rows).sample, model(latents, timestep, rows).sample)


def test_rms_norm_is_cast_before_it_is_scaled():
    norm = WanRMSNorm(16, 1e-6).bfloat16()
    norm.weight.data = tiny.normal(0, 16).bfloat16()
    x = tiny.normal(1, 3, 16).bfloat16()
    wide = x.float()
    normed = wide * (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    assert torch.equal(norm(x), normed.bfloat16() * norm.weight)


@torch.no_grad()
def test_half_precision_stays_near(model):
    half = tiny.transformer().bfloat16()
    latents, timestep, rows = tiny.clip(0, FRAMES), torch.full((1,), 500.0), tiny.text(1, 1)
    output = half(latents.bfloat16(), timestep, rows.bfloat16()).sample
    assert output.dtype == torch.bfloat16
    exact = model(latents, timestep, rows).sample
    assert (output - exact).square().mean() < 1e-3 * exact.square().mean()


def test_saved_and_loaded(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = CausalWanTransformer3DModel.from_pretrained(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
