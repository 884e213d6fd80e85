"""The windowed-attention kernel and its twin: against float64, for every option, on the GPU or in Triton's interpreter."""

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from streamvid.kernels.attention import attention_backend, sdpa
from streamvid.kernels.windowed import Part, alive, dense, merge, reference, windowed_attention

from streamvid.compression import summed_importance
from streamvid.errors import UserError
from streamvid.kv_storage import codecs
from streamvid.rope import Rotation, rotate, rotation

triton = pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["reference", "triton"]
H, D, T, FRAMES = 2, 24, 5, 4


def normal(seed: int, *shape: int) -> torch.Tensor:
    return tiny.normal(seed, *shape).to(DEVICE)


def runs(*pairs) -> torch.Tensor:
    return torch.tensor(pairs, dtype=torch.int32, device=DEVICE)


def phase(seed: int, frames: int, heads: int, dim: int) -> Rotation:
    angle = normal(seed, frames, heads, dim // 2)
    return Rotation(angle.cos(), angle.sin())


def exact(q, parts):
    """The twin in float64, from the very numbers that are stored."""

    def wide(x):
        return x.double() if x.dtype.itemsize > 1 else x

    wider = [part._replace(k_BSHD=wide(part.k_BSHD), v_BSHD=wide(part.v_BSHD)) for part in parts]
    return reference(q.double(), wider)


Q = normal(0, 2, 7, H, D)
K, V = normal(1, 2, FRAMES * T, H, D), normal(2, 2, FRAMES * T, H, D)
ALL = runs((0, FRAMES * T))
PLAIN = Part(K, V, ALL, T)


def test_the_twin_is_attention_over_the_tokens_in_the_runs():
    part = PLAIN._replace(runs=runs((15, 5), (2, 6), (9, 0)))
    picked = [*range(2, 8), *range(15, 20)]
    assert alive(part)[0].nonzero().flatten().tolist() == picked
    got = reference(Q, [part])
    torch.testing.assert_close(got.out_BLHD, sdpa(Q, K[:, picked], V[:, picked]))
    scores = torch.einsum("blhd,bshd->bhls", Q, K[:, picked]) * D**-0.5
    torch.testing.assert_close(got.lse_BHL, scores.exp().sum(-1).log())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bias_counts_frames_and_a_dead_frame_is_absent(backend):
    bias = torch.tensor([1.0, 3.0, 1.0, 2.0], device=DEVICE).log()
    got = windowed_attention(Q, [PLAIN._replace(bias=bias)], backend=backend).out_BLHD
    frames = [range(f * T, f * T + T) for f in (1, 1, 1, 2, 3, 3)]
    counted = [token for frame in [range(T), *frames] for token in frame]
    torch.testing.assert_close(got, sdpa(Q, K[:, counted], V[:, counted]))
    bias[0] = float("-inf")
    got = windowed_attention(Q, [PLAIN._replace(bias=bias)], backend=backend).out_BLHD
    torch.testing.assert_close(got, sdpa(Q, K[:, counted[T:]], V[:, counted[T:]]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gain_is_that_of_the_keys(backend):
    gain = torch.tensor([1.0, 0.5, 0.0, 2.0], device=DEVICE)
    got = windowed_attention(Q, [PLAIN._replace(gain=gain)], backend=backend).out_BLHD
    torch.testing.assert_close(got, sdpa(Q, K * gain.repeat_interleave(T)[:, None, None], V))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_phase_moves_a_frame_in_time(backend):
    """Keys stored at one position and turned on load are keys that were rotated to the other position."""
    grid, here, there = (1, T), [4, 5, 6, 7], [0, 2.5, 6, 9]
    stored = rotate(K, rotation(here, *grid, D, DEVICE))
    by = rotation([b - a for a, b in zip(here, there, strict=True)], 1, 1, D, DEVICE)
    got = windowed_attention(Q, [Part(stored, V, ALL, T, phase=by)], backend=backend).out_BLHD
    torch.testing.assert_close(
        got, sdpa(Q, rotate(K, rotation(there, *grid, D, DEVICE)), V), atol=2e-6, rtol=1e-5
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kv_dtype", ["int8", "fp8"])
def test_quantised_keys_and_values_are_read_as_their_codec_decodes_them(backend, kv_dtype):
    codec, _ = codecs(kv_dtype)
    k, v = codec.encode(K), codec.encode(V)
    part = Part(k[0], v[0], ALL, T, k_scale=k[1], v_scale=v[1])
    got = windowed_attention(Q, [part], backend=backend).out_BLHD
    torch.testing.assert_close(got, sdpa(Q, codec.decode(k), codec.decode(v)))
    off = (got - sdpa(Q, K, V)).abs().amax()  # the bound that quantising itself has
    assert 0 < off < {"int8": 0.02, "fp8": 0.1}[kv_dtype]


@pytest.mark.parametrize("backend", BACKENDS)
def test_importance_is_that_of_compression_where_attended_and_zero_elsewhere(backend):
    part = PLAIN._replace(runs=runs((0, 5), (10, 7)))
    got = windowed_attention(Q, [part], Q.sum(1), backend).importance[0]
    torch.testing.assert_close(got, summed_importance(Q, K) * alive(part), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_parts_one_after_the_other_or_merged_are_one_window(backend):
    """Sink, ring and current block in three buffers; an empty part changes nothing."""
    cuts = [slice(0, 5), slice(5, 12), slice(12, 20)]
    parts = [Part(K[:, cut], V[:, cut], runs((0, cut.stop - cut.start))) for cut in cuts]
    parts.insert(1, PLAIN._replace(runs=runs((3, 0))))
    whole = reference(Q, [PLAIN])
    together = windowed_attention(Q, parts, backend=backend)
    merged = merge([windowed_attention(Q, [part], backend=backend) for part in parts])
    for got in (together, merged):
        torch.testing.assert_close(got.out_BLHD, whole.out_BLHD)
        torch.testing.assert_close(got.lse_BHL, whole.lse_BHL)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_batch_element_may_have_a_window_of_its_own_even_none(backend):
    ragged = runs([(0, 20), (0, 0)], [(0, 0), (0, 0)])
    got = windowed_attention(Q, [PLAIN._replace(runs=ragged)], backend=backend)
    torch.testing.assert_close(got.out_BLHD[0], sdpa(Q, K, V)[0])
    assert (got.out_BLHD[1] == 0).all() and (got.lse_BHL[1] == float("-inf")).all()


SHAPES = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 2),
        "heads": st.integers(1, 2),
        "dim": st.sampled_from([16, 20, 40, 64, 80, 96, 128]),
        "queries": st.integers(1, 40),
        "frame": st.integers(1, 17),
        "frames": st.integers(1, 4),
        "kv": st.sampled_from(["native", "int8", "fp8"]),
        "bias": st.booleans(),
        "gain": st.booleans(),
        "ragged": st.booleans(),
        "phase": st.sampled_from([0, 1, 2]),
        "own": st.booleans(),
        "dead": st.integers(0, 3),
    }
)


def window(s: dict, dtype: torch.dtype) -> tuple[torch.Tensor, list[Part]]:
    """Queries and a window with the options that hypothesis chose; frames in backward order, one perhaps left out."""
    shape = (s["batch"], s["frames"] * s["frame"], s["heads"], s["dim"])
    q = normal(0, s["batch"], s["queries"], s["heads"], s["dim"]).to(dtype)
    k, v = normal(1, *shape).to(dtype), normal(2, *shape).to(dtype)
    scales: dict = {}
    if s["kv"] != "native":
        codec, _ = codecs(s["kv"])
        (k, k_scale), (v, v_scale) = codec.encode(k), codec.encode(v)
        scales = {"k_scale": k_scale, "v_scale": v_scale}
    live = [f for f in reversed(range(s["frames"])) if f != s["dead"] or s["frames"] == 1]
    turned = min(s["phase"], s["heads"])
    part = Part(
        k,
        v,
        runs(*((f * s["frame"], s["frame"]) for f in live)),
        s["frame"],
        normal(3, s["frames"]) if s["bias"] else None,
        phase(4, s["frames"], turned, s["dim"]) if turned else None,
        gain=normal(7, s["frames"]).sigmoid() if s["gain"] else None,
        **scales,
    )
    if s["ragged"]:  # the last video sees less: tokens of the first run only, and not all of them
        every = part.runs.repeat(s["batch"], 1, 1)
        every[-1, 1:, 1] = 0
        every[-1, 0, 1] = (s["frame"] + 1) // 2
        part = part._replace(runs=every)
    own = (s["batch"], s["queries"], s["heads"], s["dim"])
    block = Part(normal(5, *own).to(dtype), normal(6, *own).to(dtype), runs((0, s["queries"])))
    return q, [part, block] if s["own"] else [part]


@settings(max_examples=12)
@given(SHAPES)
def test_float32_is_within_1e_5_for_any_shape_and_option(shape):
    q, parts = window(shape, torch.float32)
    got, expected = windowed_attention(q, parts, backend="triton"), exact(q, parts)
    assert (got.out_BLHD - expected.out_BLHD).abs().amax() < 1e-5
    assert (got.lse_BHL - expected.lse_BHL).abs().amax() < 1e-5
    merged = merge([windowed_attention(q, [part], backend="triton") for part in parts])
    assert (merged.out_BLHD - expected.out_BLHD).abs().amax() < 1e-5
    assert (merged.lse_BHL - expected.lse_BHL).abs().amax() < 1e-5


@settings(max_examples=8)
@given(SHAPES, st.sampled_from([torch.bfloat16, torch.float16]))
def test_half_precision_is_within_twice_the_error_of_sdpa(shape, dtype):
    """PyTorch's attention gets the same numbers, gathered, decoded, turned and cast."""
    q, parts = window(shape, dtype)
    expected = exact(q, parts).out_BLHD
    got = windowed_attention(q, parts, backend="triton").out_BLHD
    assert got.dtype == dtype
    keys, values, biases = [], [], []
    for part in parts:
        k, v = part.k_BSHD.float(), part.v_BSHD.float()
        if part.k_scale is not None:
            k, v = k * part.k_scale, v * part.v_scale
        if part.phase is not None:
            k = rotate(k, Rotation(*(x.repeat_interleave(part.frame_tokens, 0) for x in part.phase)))
        if part.gain is not None:
            k = k * part.gain.repeat_interleave(part.frame_tokens)[:, None, None]
        bias = torch.zeros(k.shape[1], device=DEVICE)
        if part.bias is not None:
            bias = part.bias.repeat_interleave(part.frame_tokens)
        keys.append(k.to(dtype))
        values.append(v.to(dtype))
        bias = torch.where(alive(part), bias, float("-inf"))
        biases.append(bias.expand(len(q), -1)[:, None, None].to(dtype))
    theirs = sdpa(q, torch.cat(keys, 1), torch.cat(values, 1), torch.cat(biases, -1))
    bound = 2 * (theirs - expected).abs().amax() + torch.finfo(dtype).eps * expected.abs().amax() / 2
    assert (got - expected).abs().amax() <= bound


def test_what_does_not_fit_is_told():
    with pytest.raises(UserError, match="backend = 'numba' is not known: choose reference or triton"):
        windowed_attention(Q, [PLAIN], backend="numba")
    with pytest.raises(UserError, match="batch, heads and channels must be the same"):
        windowed_attention(Q, [PLAIN._replace(v_BSHD=V[:1])])
    with pytest.raises(UserError, match="k_scale None: int8 and float8_e4m3fn take a scale"):
        windowed_attention(Q, [PLAIN._replace(k_BSHD=K.to(torch.int8))])
    with pytest.raises(UserError, match=r"must be torch\.bfloat16"):
        windowed_attention(Q.bfloat16(), [PLAIN])
    with pytest.raises(UserError, match="triton cannot attend with a mask that differs between queries"):
        attention_backend("triton")(Q, K, V, torch.ones(7, 20, dtype=torch.bool))
    with pytest.raises(UserError, match="triton has no gradient"):
        attention_backend("triton")(Q.clone().requires_grad_(), K, V)


def test_as_a_backend_masks_may_differ_between_batch_elements():
    mask = torch.arange(40, device=DEVICE).view(2, 1, 1, 20) % 3 > 0
    torch.testing.assert_close(dense(Q, K, V, mask), sdpa(Q, K, V, mask))
