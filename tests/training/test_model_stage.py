"""Options of the model that a stage starts from, and what it exports."""

from pathlib import Path

import pytest
import tiny
import torch
from streamvid.kernels.attention import attention_backend

from streamvid.errors import UserError
from streamvid.models import load_pipeline
from streamvid.training.model_stage import ModelOptions, ModelStage, options
from streamvid.training.self_forcing import SelfForcingStage


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> str:
    """A transformer with other weights."""
    folder = tmp_path_factory.mktemp("other")
    tiny.transformer(seed=7).save_pretrained(folder)
    return str(folder)


def stage(folder: str, **changes) -> ModelStage:
    return ModelStage({"folder": folder, **changes})


def same(one: torch.nn.Module, two: torch.nn.Module) -> bool:
    return all(
        torch.equal(a.float(), b.float()) for a, b in zip(one.parameters(), two.parameters(), strict=True)
    )


def test_where_the_weights_come_from(model_folder, other):
    assert same(stage(model_folder).transformer, tiny.transformer())
    assert same(stage(model_folder, weights=other).transformer, tiny.transformer(seed=7))
    config = dict(tiny.transformer().config) | {"num_layers": 1}
    new = stage(model_folder, transformer={k: v for k, v in config.items() if not k.startswith("_")})
    assert len(new.transformer.blocks) == 1


def test_the_attention_of_all_networks_and_new_ones_begin_as_the_identity(model_folder, prompt_file):
    model = {"folder": model_folder, "attention": "reference"}
    made = SelfForcingStage(model, prompt_file, rollout={"frames": 12, "supervised": 12})
    for network in (made.transformer, made.teacher.model, made.critic.score.model):
        assert network.attention_name == "reference"
    assert made.clips._stream(made.method, ["a fox"], [0], 1).cache.attention is attention_backend(
        "reference"
    )
    with pytest.raises(UserError, match="attention backend = 'fox' is not known"):
        stage(model_folder, attention="fox")
    config = {k: v for k, v in tiny.transformer().config.items() if not k.startswith("_")}
    new = stage(model_folder, transformer=config)
    with torch.no_grad():
        predicted = new.denoiser.model(tiny.clip(0, 3), torch.tensor([500.0]), new.encode(["a fox"])).sample
    assert not predicted.any()  # the output projection starts at zero


def test_the_schedule_the_method_and_the_size(model_folder):
    made = stage(
        model_folder,
        scheduler={"shift": 3.0},
        method="self_forcing",
        overrides={"sink": 1},
        height=48,
        width=64,
    )
    assert made.scheduler.config.shift == 3.0 and list(made.scheduler.config.denoising_steps) == [1000, 500]
    assert (made.method.name, made.method.sink) == ("self_forcing", 1)
    assert made.latent_shape == (16, 6, 8) and made.tokens_per_frame == 12
    assert stage(model_folder).latent_shape == tiny.LATENT


def test_frozen_parts_may_be_in_half_precision(model_folder, prompt_file):
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        made = SelfForcingStage(
            {"folder": model_folder, "frozen_dtype": name},
            prompt_file,
            rollout={"frames": 6, "supervised": 6},
        )
        assert made.teacher.model.dtype == made.text_encoder.dtype == dtype
        assert made.critic.score.model.dtype == made.transformer.dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16, enabled=name == "bfloat16"):
            loss, _ = made.train()(made.phase_batch("generator", 0, 0, 0))
        loss.backward()
        assert torch.isfinite(loss) and made.transformer.proj_out.weight.grad.abs().sum() > 0


def test_teacher_and_critic_start_where_they_are_told(model_folder, other, prompt_file):
    def build(**parts):
        return SelfForcingStage(
            {"folder": model_folder}, prompt_file, rollout={"frames": 6, "supervised": 6}, **parts
        )

    plain = build()
    assert same(plain.teacher.model, tiny.transformer()) and same(
        plain.critic.score.model, tiny.transformer()
    )
    taught = build(teacher={"weights": other})
    assert same(taught.teacher.model, tiny.transformer(seed=7))
    assert same(taught.critic.score.model, tiny.transformer(seed=7))  # as the teacher
    judged = build(critic={"weights": other})
    assert same(judged.teacher.model, tiny.transformer()) and same(
        judged.critic.score.model, tiny.transformer(seed=7)
    )
    apart = build(teacher={"weights": other}, critic={"folder": model_folder})
    assert same(apart.critic.score.model, tiny.transformer())


def test_prompts_are_encoded_once_and_as_the_pipeline_does(model_folder):
    made, calls = stage(model_folder), []
    encoder = made.text_encoder.forward
    made.text_encoder.forward = lambda *a, **k: calls.append(1) or encoder(*a, **k)
    rows = made.encode(["a red fox", "a cat", "a red fox"])
    assert torch.equal(rows, made.encode(["a red fox", "a cat", "a red fox"])) and len(calls) == 1
    torch.testing.assert_close(rows, tiny.pipeline().encode_prompt(["a red fox", "a cat", "a red fox"]))


def test_exports(model_folder, tmp_path):
    stage(model_folder, method="self_forcing", width=64).export(tmp_path / "whole")
    pipe = load_pipeline(str(tmp_path / "whole"), "cpu", "float32")
    assert (pipe.config.method, pipe.config.width, pipe.config.height) == ("self_forcing", 64, 32)
    stage(model_folder, export="transformer").export(tmp_path / "part")
    assert {p.name for p in Path(tmp_path / "part").iterdir()} == {"transformer", "scheduler"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fox": 1}, r"stage\.model\.fox is not an option: choose from folder, weights"),
        ({"export": "fox"}, r"model\.export = 'fox' is not known"),
        ({"frozen_dtype": "int8"}, r"model\.frozen_dtype = 'int8' is not known"),
        ({"weights": "x", "transformer": {"num_layers": 1}}, "exclude each other"),
        ({"method": "fox"}, "method = 'fox' is not known"),
        ({"height": 33}, "height = 33 must be a positive multiple of 16"),
        ({"weights": "nowhere.pt"}, "nowhere.pt"),
    ],
)
def test_mistakes_are_one_sentence(model_folder, changes, message):
    with pytest.raises(UserError, match=message) as failure:
        stage(model_folder, **changes)
    assert "\n" not in str(failure.value)


def test_a_missing_option_is_named():
    with pytest.raises(
        UserError, match=r"stage\.model: missing 1 required positional argument: 'folder': add it"
    ):
        options(ModelOptions, {}, "stage.model")
    with pytest.raises(UserError, match=r"stage\.model = \[1\] must be a mapping"):
        options(ModelOptions, [1], "stage.model")
