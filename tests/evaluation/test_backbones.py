"""Backbones in the real formats with tiny random weights, through the real loading code; and what is said of the missing."""

import json

import numpy as np
import pytest
import torch
from reference import clip
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import (
    CLIPConfig,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    PreTrainedTokenizerFast,
    VideoMAEConfig,
    VideoMAEForVideoClassification,
    ViTConfig,
    ViTModel,
    XCLIPConfig,
    XCLIPModel,
)

from streamvid.cli import main
from streamvid.evaluation.backbones import BACKBONES, Backbones, MissingWeights, doctor
from streamvid.evaluation.engine import measure
from streamvid.evaluation.registry import resolve
from streamvid.evaluation.sampling import for_dino, middle_frames
from streamvid.evaluation.sources import ArraySource
from streamvid.evaluation.types import Segment, Video

VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
WORDS = ["a", "red", "ball", "rolls", "person", "is", "dancing", "in", "the", "style", "of"]


def tokenizer(folder):
    words = {word: i for i, word in enumerate(["<pad>", "<unk>", "<bos>", "<eos>", *WORDS])}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.normalizer, core.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    tokens = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<eos>"}
    PreTrainedTokenizerFast(tokenizer_object=core, **tokens).save_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tiny checkpoints of every backbone that a maintained and installed library runs."""
    root = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    ViTModel(ViTConfig(**VISION, image_size=32, patch_size=16), add_pooling_layer=False).save_pretrained(
        root / "dino"
    )
    small = Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28)
    Dinov2Model(small).save_pretrained(root / "dinov2")
    text = {
        **VISION,
        "vocab_size": 20,
        "max_position_embeddings": 8,
        "eos_token_id": 3,
        "bos_token_id": 2,
        "pad_token_id": 0,
    }
    vision = {**VISION, "image_size": 32, "patch_size": 16}
    for name, size in (("clip_b", 24), ("clip_l", 768)):
        CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=size)).save_pretrained(
            root / name
        )
        tokenizer(root / name)
    (root / "aesthetic_head").mkdir()
    head = {"weight": torch.randn(1, 768), "bias": torch.randn(1)}
    torch.save(head, root / "aesthetic_head" / "sa_0_4_vit_l_14_linear.pth")
    actions = {0: "dancing", 1: "cooking"}
    config = VideoMAEConfig(**VISION, image_size=32, patch_size=16, num_frames=16, id2label=actions)
    VideoMAEForVideoClassification(config).save_pretrained(root / "action")
    vision = {
        **vision,
        "mit_hidden_size": 32,
        "mit_intermediate_size": 48,
        "mit_num_hidden_layers": 1,
        "num_frames": 8,
    }
    vision["mit_num_attention_heads"] = 2
    config = XCLIPConfig(
        text_config=text, vision_config=vision, projection_dim=32, prompt_num_attention_heads=2
    )
    XCLIPModel(config).save_pretrained(root / "video_text")
    tokenizer(root / "video_text")
    (root / "amt").mkdir()
    torch.jit.script(_Blend()).save(str(root / "amt" / "amt-s.ts"))
    return root


class _Blend(torch.nn.Module):
    def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        assert first.shape[-1] % 16 == 0 and first.shape[-2] % 16 == 0
        return (first + second) / 2


def outcome(metric, folder, name="c_pan", **facts):
    video = Video("v", "v", **facts)
    return measure(video, ArraySource(clip(name), 16.0), resolve([metric]), Backbones(folder))[metric][0]


@pytest.mark.parametrize(
    "metric",
    [
        "vbench.subject_consistency",
        "vbench.background_consistency",
        "vbench.aesthetic_quality",
        "vbench.motion_smoothness",
        "drift.aesthetic",
    ],
)
def test_quality_dimensions_run_through_real_formats(metric, folder):
    found = outcome(metric, folder)
    assert found.status == "ok" and np.isfinite(found.score), found
    if metric.endswith("consistency"):
        assert outcome(metric, folder, "a_static").score == pytest.approx(1.0, abs=1e-5)


def test_dino_is_the_class_token_of_the_whole_picture(folder):
    encoder = Backbones(folder).get("dino")
    model = ViTModel.from_pretrained(folder / "dino", add_pooling_layer=False).eval()
    images = for_dino(clip("d_drift")[:3], 32)
    assert images.shape[-2:] == (32, 48)  # not cropped: position embeddings are interpolated
    with torch.no_grad():
        expected = model(images, interpolate_pos_encoding=True).last_hidden_state[:, 0]
    assert np.allclose(encoder(clip("d_drift")[:3]), expected.numpy(), atol=1e-5)


def test_clip_features_are_the_projected_ones(folder):
    encoder = Backbones(folder).get("clip_b")
    assert encoder(clip("c_pan")[:2]).shape == (2, 24) and encoder.text(["a red ball", "a"]).shape == (2, 24)
    model = CLIPModel.from_pretrained(folder / "clip_b").eval()
    tokens = encoder.text(["a red ball"])
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(folder / "clip_b")(["a red ball"], return_tensors="pt")
    with torch.no_grad():
        told = model.get_text_features(**ids)
    told = told if isinstance(told, torch.Tensor) else told.pooler_output
    assert torch.allclose(tokens, told, atol=1e-5)


def test_semantic_dimensions_run_through_real_formats(folder):
    styled = outcome(
        "vbench.appearance_style", folder, labels={"appearance_style": {"appearance_style": "red style"}}
    )
    assert styled.status == "ok" and -1 <= styled.score <= 1 and styled.weight == 33
    action = outcome("vbench.human_action", folder, prompt="A person is dancing")
    assert action.score in (0.0, 1.0)
    assert outcome("vbench.human_action", folder, prompt="a red ball").status == "skipped"
    told = outcome("vbench.overall_consistency", folder, prompt="a red ball rolls")
    assert told.status == "ok" and -1 <= told.score <= 1 and told.details["prompt_cut"] is False
    long = outcome("vbench.temporal_style", folder, prompt="a red ball rolls in the style of the person")
    assert long.details["prompt_cut"] is True


def test_segments_against_prompts_by_clip(folder):
    parts = (Segment(0, 16, "a red ball"), Segment(16, 33, "a red ball rolls in the style of the person"))
    found = outcome("interactive.clip_segment", folder, segments=parts)
    table = np.array(found.series["matrix"])
    assert table.shape == (2, 2) and found.score == pytest.approx(np.diag(table).mean())
    assert found.details["cut"] == 0.5


def test_clip_to_clip_through_dinov2(folder):
    video = Video("v", "v")
    requests = resolve(["long.subject_clip_to_clip"])
    found = measure(video, ArraySource(clip("d_drift"), 8.0), requests, Backbones(folder))
    outcome, _ = found["long.subject_clip_to_clip"]
    assert outcome.status == "ok" and 0 <= outcome.score <= 1


def test_weights_that_lack_are_named_with_their_place(tmp_path, capsys):
    lines = {name: (there, text) for name, there, text in doctor(Backbones(tmp_path))}
    assert set(lines) == set(BACKBONES) and lines["probe"][0]
    for name in ("dino", "amt", "aesthetic_head"):
        there, text = lines[name]
        assert not there and str(tmp_path / name) in text and BACKBONES[name].get in text
    assert main(["eval", "doctor", "--weights", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in BACKBONES) and "CC BY-NC" in shown
    with pytest.raises(MissingWeights):
        Backbones(tmp_path).get("dino")


def test_weights_that_cannot_be_read_are_a_skip(tmp_path):
    (tmp_path / "dino").mkdir()
    (tmp_path / "dino" / "config.json").write_text(json.dumps({"model_type": "vit"}))
    (tmp_path / "dino" / "model.safetensors").write_bytes(b"torn")
    found = outcome("vbench.subject_consistency", tmp_path)
    assert found.status == "skipped" and "cannot be loaded" in found.reason


def test_other_weights_are_another_key(folder, tmp_path):
    one = Backbones(folder).fingerprint(("dino",))
    (tmp_path / "dino").mkdir()
    for file in (folder / "dino").iterdir():
        (tmp_path / "dino" / file.name).write_bytes(file.read_bytes())
    assert Backbones(tmp_path).fingerprint(("dino",)) == one
    torch.manual_seed(1)
    ViTModel(ViTConfig(**VISION, image_size=32), add_pooling_layer=False).save_pretrained(tmp_path / "dino")
    assert Backbones(tmp_path).fingerprint(("dino",)) != one


def test_sampled_frames_reach_the_network(folder):
    seen = []

    class Spy(Backbones):
        def get(self, name):
            return lambda frames: seen.append(frames) or {"dancing": 0.9}

        def problem(self, names):
            return None

    video = Video("v", "v", "A person is dancing")
    found = measure(video, ArraySource(clip("d_drift"), 16.0), resolve(["vbench.human_action"]), Spy())
    assert found["vbench.human_action"][0].score == 1.0
    assert np.array_equal(seen[0], clip("d_drift")[middle_frames(16, 40)])
