"""What a user of diffusers does with any pipeline: load, move, cast, offload, compile, quantise."""

import json
from collections.abc import Callable

import accelerate
import accelerate.hooks
import numpy as np
import pytest
import tiny
import torch
from diffusers.hooks import apply_group_offloading
from diffusers.utils import export_to_video
from streamvid.kernels import attention as kernels
from streamvid.pipelines.pipeline_streamvid import StreamVidPipeline

from streamvid import load_pipeline
from streamvid.errors import UserError
from streamvid.tiny_decoder import TinyDecoder

PROMPT, SCRIPT = "a red fox walks", "a red fox walks [1s] | the blue cat sleeps [1s]"


@pytest.fixture
def pipe() -> StreamVidPipeline:
    return tiny.new_pipeline()


def latents(pipe, script: str = PROMPT, **options) -> torch.Tensor:
    length = {} if script == SCRIPT else {"num_frames": 9}
    return pipe(script, output_type="latent", **length, **options).frames


def frames(pipe) -> np.ndarray:
    """Of a script, so that the text encoder runs between blocks."""
    return pipe(SCRIPT, output_type="np").frames


# --- loading and casting ----------------------------------------------------------------------------------------------


def test_an_embedded_model_is_loaded_by_its_name():
    pipe = StreamVidPipeline.from_pretrained("diorama", dtype=torch.float32)
    assert pipe.config.height == 128
    expected = next(load_pipeline("diorama", "cpu", "float32").stream("a small red cube bounces")).frames
    assert np.abs(next(pipe.stream("a small red cube bounces")).frames.astype(int) - expected).max() <= 1


def test_a_model_is_loaded_in_a_number_format(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["transformer"] == ["streamvid.transformer", "CausalWanTransformer3DModel"]
    half = StreamVidPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    half.set_progress_bar_config(disable=True)
    assert {part.dtype for part in (half.transformer, half.vae, half.text_encoder)} == {torch.bfloat16}
    assert torch.equal(latents(half), latents(pipe.to(torch.bfloat16)))


def test_a_pipeline_is_cast(pipe):
    plain = latents(pipe)
    half = latents(pipe.to(dtype=torch.bfloat16))
    assert half.dtype == torch.bfloat16 and 0 < (half - plain).abs().max() < 0.1 * plain.abs().max()
    assert pipe.stream(PROMPT).cache.keys.dtype == torch.bfloat16


def test_a_pipeline_is_moved_with_all_its_parts(pipe):
    pipe.register_modules(tiny_decoder=TinyDecoder(widths=(8, 8, 8, 8), blocks=(1, 1, 1)))
    parts = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    assert len(parts) == 4 and {part.device.type for part in parts} == {"cpu"}
    pipe.to("meta")
    assert {p.device.type for part in parts for p in part.parameters()} == {"meta"}


def test_parts_are_shared_and_replaced(pipe):
    other = StreamVidPipeline.from_pipe(pipe, height=48)
    assert other.transformer is pipe.transformer and other.config.height == 48
    scheduler = tiny.scheduler(denoising_steps=(1000,))
    one = StreamVidPipeline(**{**pipe.components, "scheduler": scheduler}, height=32, width=32)
    assert len(one.stream(PROMPT).steps) == 1


def test_a_tiny_decoder_is_a_part_like_the_others(pipe, tmp_path):
    """It is cast, saved, loaded and moved with the pipeline, which has none otherwise."""
    torch.manual_seed(0)
    exact = frames(pipe)
    pipe.register_modules(tiny_decoder=TinyDecoder(widths=(8, 8, 8, 8), blocks=(1, 1, 1)).eval())
    expected = frames(pipe)
    assert np.abs(expected - exact).max() > 0.1
    assert pipe.to(torch.bfloat16).tiny_decoder.dtype == torch.bfloat16
    pipe.to(torch.float32)
    pipe.save_pretrained(tmp_path)
    loaded = StreamVidPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.decoder is loaded.tiny_decoder and loaded.decoder is not loaded.vae
    other = StreamVidPipeline.from_pretrained(tmp_path, tiny_decoder=None)
    assert other.decoder is other.vae
    accelerate.hooks.add_hook_to_module(loaded.tiny_decoder, Elsewhere())
    assert np.abs(frames(loaded) - expected).max() < 0.02  # weights went through bfloat16


def test_frames_are_what_export_to_video_takes(pipe, tmp_path):
    video = pipe(PROMPT, 9).frames[0]
    assert export_to_video(video, str(tmp_path / "fox.mp4"), fps=16)
    assert (tmp_path / "fox.mp4").stat().st_size > 0


# --- attention --------------------------------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """Names of the backends, call by call."""
    made: list[str] = []

    def spied(name: str, attention: Callable) -> Callable:
        def call(*args, **kwargs):
            made.append(name)
            return attention(*args, **kwargs)

        return call

    for name, backend in list(kernels.BACKENDS.items()):
        monkeypatch.setitem(kernels.BACKENDS, name, backend._replace(attend=spied(name, backend.attend)))
    return made


def test_the_attention_backend_is_used_everywhere(pipe, calls):
    expected = latents(pipe)
    calls.clear()
    pipe.transformer.set_attention_backend("reference")
    reference = latents(pipe)
    assert set(calls) == {"reference"}
    assert torch.allclose(reference, expected, atol=1e-4) and not torch.equal(reference, expected)
    calls.clear()
    latents(pipe, attention="sdpa")  # the stream's own, for self-attention
    assert set(calls) == {"reference", "sdpa"}
    pipe.transformer.reset_attention_backend()
    assert torch.equal(latents(pipe), expected)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("flash9", "attention backend = 'flash9' is not known: choose one of"),
        ("flash", "attention backend = flash needs a GPU"),
    ],
)
def test_an_attention_backend_that_cannot_run_is_refused(pipe, monkeypatch, name, message):
    broken = kernels.BACKENDS["flash"]._replace(missing=lambda: "needs a GPU")
    monkeypatch.setitem(kernels.BACKENDS, "flash", broken)
    with pytest.raises(UserError, match=message) as error:
        pipe.transformer.set_attention_backend(name)
    assert "\n" not in str(error.value)
    assert pipe.transformer.attention_name == "auto"


# --- compilation ------------------------------------------------------------------------------------------------------


def test_repeated_blocks_are_compiled(pipe):
    expected, graphs = latents(pipe, SCRIPT), []

    def backend(graph: torch.fx.GraphModule, inputs) -> Callable:
        graphs.append(sum("linear" in str(node.target) for node in graph.graph.nodes))
        return graph.forward

    torch._dynamo.reset()
    pipe.transformer.compile_repeated_blocks(backend=backend)
    try:
        assert torch.allclose(latents(pipe, SCRIPT), expected, atol=1e-4)
    finally:
        torch._dynamo.reset()
    assert sum(graphs) > 0


def test_all_layers_share_their_programs():
    """However many layers: one that needed its own would reach the compiler's limit and quietly stay uncompiled."""
    programs = []
    for layers in (2, 3):
        pipe, graphs = tiny.new_pipeline(num_layers=layers), []

        def backend(graph: torch.fx.GraphModule, inputs, graphs=graphs) -> Callable:
            graphs.append(graph)
            return graph.forward

        torch._dynamo.reset()
        pipe.transformer.compile_repeated_blocks(backend=backend)
        try:
            latents(pipe)
        finally:
            torch._dynamo.reset()
        programs.append(len(graphs))
    assert programs[0] == programs[1] > 0


# --- offloading: weights lie elsewhere until a part is called ---------------------------------------------------------


@pytest.fixture
def nan_memory():
    """Memory that was given away holds NaN, so that a part that was not loaded again is found out."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def same(got: np.ndarray, expected: np.ndarray, dtype: torch.dtype) -> bool:
    """In half precision, a decoder that is offloaded takes another way, with other roundings."""
    if dtype == torch.float32:
        return np.array_equal(got, expected)
    return np.abs(got - expected).mean() < 1 / 255


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
def test_group_offload(pipe, tmp_path, nan_memory, offload_type, dtype):
    pipe.to(dtype)
    expected = frames(pipe)
    options = {"onload_device": torch.device("cpu"), "offload_type": offload_type, "num_blocks_per_group": 1}
    pipe.transformer.enable_group_offload(**options, offload_to_disk_path=str(tmp_path / "transformer"))
    pipe.vae.enable_group_offload(**options, offload_to_disk_path=str(tmp_path / "vae"))
    apply_group_offloading(pipe.text_encoder, **options, offload_to_disk_path=str(tmp_path / "text"))
    assert torch.isnan(pipe.transformer.blocks[1].attn2.to_k.weight).any()  # it is on the disk
    assert same(frames(pipe), expected, dtype)
    assert torch.isnan(pipe.transformer.blocks[1].attn2.to_k.weight).any()


def test_group_offload_of_the_whole_pipeline(pipe):
    expected = frames(pipe)
    pipe.enable_group_offload(torch.device("cpu"), num_blocks_per_group=1)
    assert np.array_equal(frames(pipe), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sequential_offload(pipe, dtype):
    pipe.to(dtype)
    expected = frames(pipe)
    for part in (pipe.text_encoder, pipe.transformer, pipe.vae):  # what enable_sequential_cpu_offload does
        accelerate.cpu_offload(part, "cpu")
    assert {p.device.type for p in pipe.transformer.parameters()} == {"meta"}
    assert pipe.transformer.device.type == "cpu"  # where it computes
    assert same(frames(pipe), expected, dtype)
    assert {p.device.type for p in pipe.vae.parameters()} == {"meta"}


class Elsewhere(accelerate.hooks.ModelHook):
    """A model offload whose device can be told from the CPU: weights are gone until the part is called."""

    execution_device = "cpu"

    def init_hook(self, module):
        self.weights = {name: p.data for name, p in module.named_parameters()}
        for p in module.parameters():
            p.data = torch.full_like(p, torch.nan)
        return module

    def pre_forward(self, module, *args, **kwargs):
        for name, p in module.named_parameters():
            p.data = self.weights[name]
        return args, kwargs


def test_model_offload_brings_every_part_in_time(pipe):
    expected = frames(pipe)
    parts = [getattr(pipe, name) for name in pipe.model_cpu_offload_seq.split("->")]
    assert set(parts) == {p for p in pipe.components.values() if isinstance(p, torch.nn.Module)} | {None}
    for part in filter(None, parts):
        accelerate.hooks.add_hook_to_module(part, Elsewhere())
    assert np.array_equal(frames(pipe), expected)


def test_a_call_puts_offloaded_models_back(pipe):
    expected = frames(pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    hooks = list(pipe._all_hooks)
    assert len(hooks) == 3
    assert np.array_equal(frames(pipe), expected)
    assert all(
        new is not old for new, old in zip(pipe._all_hooks, hooks, strict=True)
    )  # taken off and put on anew


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    "kind", ["model", "sequential", "group", "group with a stream", "leaf with a stream"]
)
def test_offload_from_a_gpu(pipe, kind):
    expected = frames(pipe.to("cuda"))
    pipe.to("cpu")
    if kind == "model":
        pipe.enable_model_cpu_offload()
    elif kind == "sequential":
        pipe.enable_sequential_cpu_offload()
    else:
        level = "leaf_level" if "leaf" in kind else "block_level"
        stream = "stream" in kind
        pipe.enable_group_offload(
            torch.device("cuda"), offload_type=level, num_blocks_per_group=1, use_stream=stream
        )
    assert np.abs(frames(pipe) - expected).max() <= 1 / 255


# --- quantisation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
def test_int8_weights(pipe, tmp_path, config):
    quantization = pytest.importorskip("torchao.quantization")
    from diffusers import PipelineQuantizationConfig, TorchAoConfig

    pipe.save_pretrained(tmp_path)
    mapping = {"transformer": TorchAoConfig(getattr(quantization, config)())}
    options = {
        "quantization_config": PipelineQuantizationConfig(quant_mapping=mapping),
        "dtype": torch.float32,
    }
    small = StreamVidPipeline.from_pretrained(tmp_path, **options)
    small.set_progress_bar_config(disable=True)
    weight = small.transformer.blocks[0].attn1.to_q.weight
    assert weight.qdata.dtype == torch.int8 and small.vae.dtype == torch.float32
    plain, quantised = latents(pipe), latents(small)
    assert 0 < (quantised - plain).abs().max() < 0.05 * plain.abs().max()

    small.save_pretrained(tmp_path / "int8")
    again = StreamVidPipeline.from_pretrained(tmp_path / "int8", dtype=torch.float32)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(latents(again), quantised)
