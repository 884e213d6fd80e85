"""From a name to a pipeline: which folder, which device, which number format, and that all tensors are there."""

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from diffusers.utils import logging as diffusers_logging
from safetensors.torch import load_file, save_file

from streamvid import load_pipeline, models
from streamvid.errors import UserError


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """The folder of a tiny model."""
    folder = tmp_path_factory.mktemp("model")
    tiny.pipeline().save_pretrained(folder)
    return folder


# --- names ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def shipped(monkeypatch, tmp_path) -> Path:
    """The package has an embedded model called diorama."""
    monkeypatch.setattr(models.resources, "files", lambda package: tmp_path)
    folder = tmp_path / "embedded" / "diorama"
    folder.mkdir(parents=True)
    (folder / "model_index.json").write_text("{}")
    (tmp_path / "embedded" / "half").mkdir()  # no index: no model
    return folder


def test_an_embedded_model_goes_by_its_name(shipped, tmp_path, monkeypatch):
    assert models.embedded_models() == {"diorama": shipped}
    assert models.resolve_model("diorama") == str(shipped)
    (tmp_path / "diorama").mkdir()
    monkeypatch.chdir(tmp_path)
    assert models.resolve_model("diorama") == str(shipped)  # a folder of that name does not hide it


def test_a_folder_goes_by_its_path_and_a_hub_id_is_passed_on(model, shipped):
    assert models.resolve_model(str(model)) == str(model)
    assert models.resolve_model("owner/name") == "owner/name"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dioramo", r"model = 'dioramo' is not known \(did you mean diorama\?\): give diorama, a folder"),
        ("a/b/c", r"model = 'a/b/c' is not known: give diorama, a folder with model_index.json, or a hub id"),
        ("./nowhere", r"model = './nowhere' is not known"),
        ("/nowhere", r"model = '/nowhere' is not known"),
        ("", r"model = '' is a folder without model_index.json"),
        (
            str(Path(__file__).parent),
            "is a folder without model_index.json: make one with `streamvid convert`",
        ),
        (__file__, "is a single file: turn it into a folder with `streamvid convert`"),
    ],
)
def test_other_names_are_refused(name, message, shipped):
    with pytest.raises(UserError, match=message):
        models.resolve_model(name)


def test_a_model_s_method_is_known_before_it_is_loaded(model, tmp_path):
    assert models.model_method(str(model)) == "longlive"
    assert models.model_method("owner/name") is None
    (tmp_path / "model_index.json").write_text("{")
    assert models.model_method(str(tmp_path)) is None


def test_facts_of_an_embedded_model(model, monkeypatch):
    monkeypatch.setattr(models, "embedded_models", lambda: {"tiny": model})
    weights = sum(path.stat().st_size for path in model.rglob("*.safetensors"))
    facts = {"name": "tiny", "bytes": weights, "size": "32x32 at 16 fps", "method": "longlive"}
    assert models.describe_model("tiny") == facts


# --- device and number format ---------------------------------------------------------------------------------------


@pytest.fixture
def machine(monkeypatch):
    """Pretends that so many CUDA devices and MPS are there."""

    def pretend(cuda: int = 0, mps: bool = False) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    return pretend


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"),
    [(0, False, "cpu"), (0, True, "mps"), (1, False, "cuda"), (2, True, "cuda")],
)
def test_the_device_of_auto(cuda, mps, expected, machine):
    machine(cuda, mps)
    assert models.choose_device() == torch.device(expected)


def test_a_device_that_is_there_is_taken(machine):
    machine(cuda=2, mps=True)
    for name in ("cpu", "cuda", "cuda:1", "mps"):
        assert models.choose_device(name) == torch.device(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cuda", "asks for CUDA, which is not available here: use --device cpu"),
        ("cuda:1", "asks for CUDA, which is not available here: use --device cpu"),
        ("mps", "device = 'mps' is not available here: use --device cpu"),
        ("gpu", "device = 'gpu' is not a device to run on: give cpu, cuda, cuda:0 or mps"),
        ("meta", "device = 'meta' is not a device to run on"),
        ("", "device = '' is not a device to run on"),
    ],
)
def test_a_device_that_is_not_there_is_refused(name, message, machine):
    machine()
    with pytest.raises(UserError, match=message):
        models.choose_device(name)


def test_a_device_number_beyond_the_last_is_refused(machine):
    machine(cuda=2)
    with pytest.raises(UserError, match="device = 'cuda:2' does not exist: there are 2 CUDA devices"):
        models.choose_device("cuda:2")


@pytest.mark.parametrize("fast", [False, True])
def test_the_number_format_of_auto(fast, monkeypatch):
    monkeypatch.setattr(models, "cpu_multiplies_bfloat16", lambda: fast)
    assert models.choose_dtype("auto", torch.device("cpu")) == (torch.bfloat16 if fast else torch.float32)
    assert models.choose_dtype("auto", torch.device("cuda")) == torch.bfloat16
    for name, dtype in models.DTYPES.items():
        assert models.choose_dtype(name, torch.device("cpu")) == dtype
    with pytest.raises(UserError, match="dtype = 'int8' is not known: choose one of auto, float32"):
        models.choose_dtype("int8", torch.device("cpu"))


# --- loading --------------------------------------------------------------------------------------------------------


def test_a_loaded_pipeline_is_the_saved_one(model):
    saved, loaded = tiny.pipeline(), load_pipeline(str(model), "cpu", "float32")
    for name in ("transformer", "vae", "text_encoder"):
        one, other = getattr(saved, name), getattr(loaded, name)
        assert type(one) is type(other) and not other.training
        assert list(one.state_dict()) == list(other.state_dict())
        for key, tensor in one.state_dict().items():
            assert torch.equal(tensor, other.state_dict()[key]), key
    assert loaded.transformer.config.text_len == saved.transformer.config.text_len
    assert (loaded.config.method, loaded.config.fps, loaded.config.height) == ("longlive", 16.0, 32)
    one, other = (pipe.stream("a red fox walks", blocks=2, seed=1) for pipe in (saved, loaded))
    for chunk, twin in zip(one, other, strict=True):
        assert torch.equal(chunk.latents, twin.latents)
        # loading lays convolutions out channels-last, which rounds otherwise
        assert abs(chunk.videos.astype(int) - twin.videos).max() <= 1


@pytest.mark.parametrize("dtype", models.DTYPES)
def test_all_parts_run_in_one_number_format(dtype, model):
    pipe = load_pipeline(str(model), "cpu", dtype)
    assert pipe.transformer.dtype == pipe.vae.dtype == models.DTYPES[dtype]
    assert pipe.text_encoder.get_input_embeddings().weight.dtype == models.DTYPES[dtype]
    assert len(next(pipe.stream("a red fox walks")).frames) == 9


def test_compiled_blocks(model, monkeypatch):
    """That they compute the same is tested in tests/pipelines/test_diffusers.py."""
    compiled = []
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **options: compiled.append(type(self).__name__)
    )
    pipe = load_pipeline(str(model), "cpu", "float32")
    assert compiled == []
    load_pipeline(str(model), "cpu", "float32", compiled=True)
    assert compiled == ["CausalWanBlock"] * len(pipe.transformer.blocks)


def test_the_shipped_model_makes_the_same_video_in_bfloat16():
    """A library that computes something else on some CPU would show."""
    latents, pixels = [], []
    for dtype in ("float32", "bfloat16"):
        chunks = list(load_pipeline("diorama", "cpu", dtype).stream("a blue ball circles", seed=1, blocks=3))
        latents.append(torch.cat([chunk.latents for chunk in chunks], 2).float())
        pixels.append(torch.cat([torch.from_numpy(chunk.videos) for chunk in chunks], 1).float())
    assert (latents[1] - latents[0]).norm() < 0.05 * latents[0].norm()
    assert (pixels[1] - pixels[0]).abs().mean() < 3  # of 255


def test_loading_says_nothing_and_leaves_the_loggers_alone(model, capfd):
    diffusers_logging.set_verbosity_info()
    try:
        load_pipeline(str(model), "cpu", "float16")
        assert capfd.readouterr() == ("", "")
        assert diffusers_logging.get_verbosity() == diffusers_logging.INFO
    finally:
        diffusers_logging.set_verbosity_warning()


def test_a_model_in_diffusers_own_classes_is_read(model, tmp_path):
    """Folders of Wan-class models name `WanTransformer3DModel`: the same tensors, our class."""
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"_class_name": "WanPipeline", "transformer": ["diffusers", "WanTransformer3DModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    one, other = load_pipeline(str(folder), "cpu", "float32"), tiny.pipeline()
    one, other = (next(pipe.stream("a red fox walks")).latents for pipe in (one, other))
    assert torch.equal(one, other)


def test_no_tensor_may_be_missing(model, tmp_path):
    """`from_pretrained` would go on with random weights."""
    for part, name in (("text_encoder", "encoder.final_layer_norm.weight"), ("vae", "decoder.conv_in.bias")):
        folder = Path(shutil.copytree(model, tmp_path / part))
        (file,) = (folder / part).glob("*.safetensors")
        tensors = load_file(file)
        del tensors[name]
        save_file(tensors, file, {"format": "pt"})
        with pytest.raises(UserError, match=name):
            load_pipeline(str(folder), "cpu", "float32")


def test_a_text_encoder_that_encodes_the_script_and_makes_room(model):
    whole = load_pipeline(str(model), "cpu", "float32")
    freed = load_pipeline(
        str(model), "cpu", "float32", text_encoder="free", prompts=["a red fox", "a blue cat"]
    )
    assert freed.text_encoder is None and whole.text_encoder is not None
    one, other = (next(pipe.stream("a blue cat")).latents for pipe in (whole, freed))
    assert torch.equal(one, other)
    with pytest.raises(UserError, match="was not encoded before the text encoder was freed"):
        freed.stream("a bird")


def test_a_text_encoder_has_no_place_beside_a_cpu(model):
    for place in ("cpu", "attic"):
        with pytest.raises(
            UserError, match=f"text_encoder = '{place}' is not possible on cpu: choose one of"
        ):
            load_pipeline(str(model), "cpu", text_encoder=place)
