"""Backbones in the real formats with tiny random weights, through the real loading code; and what is said of the missing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from reference import clip
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import (
    BertTokenizerFast,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    CLIPConfig,
    CLIPModel,
    CLIPTokenizerFast,
    Dinov2Config,
    Dinov2Model,
    Owlv2Config,
    Owlv2ForObjectDetection,
    Owlv2ImageProcessor,
    Owlv2Processor,
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
    save_detector(root / "detector")
    save_captioner(root / "captioner")
    return root


def save_detector(folder):
    """OWLv2 with CLIP's kind of tokenizer: pairs of bytes, here letters only."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    start, end = len(words) - 2, len(words) - 1  # a text that starts with token 0 would be taken for padding
    numbers = {word: i for i, word in enumerate(words)}
    tokens = CLIPTokenizerFast(vocab=numbers, merges=[], pad_token="<|endoftext|>", model_max_length=16)
    text = {**VISION, "vocab_size": len(words), "max_position_embeddings": 16}
    text |= {"eos_token_id": end, "bos_token_id": start, "pad_token_id": end}
    vision = {**VISION, "image_size": 32, "patch_size": 16}
    config = Owlv2Config(text_config=text, vision_config=vision, projection_dim=32)
    Owlv2ForObjectDetection(config).save_pretrained(folder)
    size = {"height": 32, "width": 32}
    Owlv2Processor(Owlv2ImageProcessor(size=size), tokens).save_pretrained(folder)


def save_captioner(folder):
    """BLIP with BERT's kind of tokenizer."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", *WORDS]
    tokens = BertTokenizerFast(vocab={word: i for i, word in enumerate(words)}, bos_token="[DEC]")
    text = {**VISION, "vocab_size": len(words), "max_position_embeddings": 32, "encoder_hidden_size": 32}
    text |= {"bos_token_id": 5, "sep_token_id": 3, "eos_token_id": 3, "pad_token_id": 0}
    vision = {**VISION, "image_size": 32, "patch_size": 16}
    config = BlipConfig(text_config=text, vision_config=vision, projection_dim=24, image_text_hidden_size=24)
    BlipForConditionalGeneration(config).save_pretrained(folder)
    size = {"height": 32, "width": 32}
    BlipProcessor(BlipImageProcessor(size=size), tokens).save_pretrained(folder)


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


def test_boxes_are_where_the_detector_sees_things(folder):
    """Every box above the threshold, under the name that it answers, in pixels of the frame."""
    frames, names = clip("c_pan")[:2], ["cat", "red ball"]
    detect = Backbones(folder).get("detector")
    found = detect(frames, names, threshold=0.0)
    assert [set(boxes) for boxes in found] == [set(names)] * 2
    assert [sum(map(len, boxes.values())) for boxes in found] == [4, 4]  # a box for each of 2 x 2 patches
    assert detect(frames, names, threshold=1.0) == [{"cat": [], "red ball": []}] * 2
    model = Owlv2ForObjectDetection.from_pretrained(folder / "detector").eval()
    processor = Owlv2Processor.from_pretrained(folder / "detector")
    texts = [
        ["a photo of a cat", "a photo of a red ball"]
    ]  # the second is cut to what the text encoder reads
    inputs = processor(text=texts, images=frames[0], truncation=True, return_tensors="pt")
    with torch.no_grad():
        told = model(**inputs)
    best = told.logits[0].argmax(-1)
    centres = [tuple(box[:2].tolist()) for box in 96 * told.pred_boxes[0]]  # frames are padded to 96 x 96
    seen = [((b[0] + b[2]) / 2, (b[1] + b[3]) / 2) for boxes in found[0].values() for b in boxes]
    assert np.allclose(np.sort(seen, axis=0), np.sort(centres, axis=0), atol=1e-3)
    assert len(found[0]["red ball"]) == int((best == 1).sum())


@pytest.mark.parametrize(
    ("metric", "prompt", "label"),
    [
        ("object_class", "a cat", {"object": "cat"}),
        ("multiple_objects", "a bird and a cat", {"object": "bird and cat"}),
        ("color", "a red ball", {"color": "red"}),
        (
            "spatial_relationship",
            "a cat on the left of a dog",
            {"object_a": "cat", "object_b": "dog", "relationship": "on the left of"},
        ),
        ("scene", "alley", {"scene": {"scene": "alley"}}),
    ],
)
def test_detector_and_captioner_answer_their_dimensions(metric, prompt, label, folder):
    found = outcome(f"vbench.{metric}", folder, prompt=prompt, labels={metric: label})
    assert found.status == "ok" and 0 <= found.score <= 1, found


def test_captions_are_what_the_model_writes(folder):
    caption = Backbones(folder).get("captioner")
    texts = caption(clip("c_pan")[:2])
    assert len(texts) == 2 and all(set(text.split()) <= set(WORDS) | {"[UNK]"} for text in texts)
    model = BlipForConditionalGeneration.from_pretrained(folder / "captioner").eval()
    processor = BlipProcessor.from_pretrained(folder / "captioner")
    inputs = processor(images=clip("c_pan")[0], return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=24, num_beams=1, do_sample=False)
    assert texts[0] == processor.batch_decode(tokens, skip_special_tokens=True)[0]


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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", ["dino", "clip_b", "dinov2"])
def test_a_gpu_sees_the_same(name, folder):
    frames = clip("c_pan")[:3]
    here, there = (Backbones(folder, device).get(name)(frames) for device in ("cpu", "cuda"))
    assert np.allclose(here, there, atol=1e-3)


ASIDE = Path(sys.prefix) / "torchvision"  # `make test` puts it there; see the Makefile
RAFT = """
import sys
import numpy, torch

library = torch.library.Library("torchvision", "DEF")  # its operators, of which RAFT uses none
for name in ("nms", "qnms", "roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "deform_conv2d"):
    for operator in (name, f"_{name}_backward"):
        library.define(f"{operator}() -> ()")
from torchvision.models.optical_flow import raft_large
from streamvid.evaluation.backbones import Backbones

torch.manual_seed(0)
folder, frames, found = sys.argv[1:]
torch.save(raft_large(weights=None).state_dict(), f"{folder}/raft/raft_large.pth")
numpy.save(found, Backbones(folder).get("raft")(*numpy.load(frames)))
"""


@pytest.mark.skipif(not ASIDE.is_dir(), reason="make test installs torchvision aside")
def test_flow_of_torchvision(tmp_path):
    """RAFT as torchvision saves it: flow of the size of the frames, also where they are no multiple of eight."""
    (tmp_path / "raft").mkdir()
    first, second = clip("c_pan")[:2, :60, :90]
    np.save(tmp_path / "frames.npy", [first, second])
    command = [sys.executable, "-c", RAFT, tmp_path, tmp_path / "frames.npy", tmp_path / "flow.npy"]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(ASIDE)})
    flow = np.load(tmp_path / "flow.npy")
    assert flow.shape == (60, 90, 2) and np.isfinite(flow).all() and flow.std() > 0


def package(folder, name, text):
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(text)


def test_packages_that_users_bring_are_called_as_they_document(tmp_path, monkeypatch):
    """pyiqa and dreamsim cannot be part of the tests (licence, weights of real size): stand-ins of their interfaces."""
    made = "import torch\ndef create_metric(name, device, pretrained_model_path):\n    assert name == 'musiq-spaq'\n"
    made += "    level = torch.load(pretrained_model_path)['level']\n    return lambda image: level * image.mean()\n"
    package(tmp_path, "pyiqa", made)
    made = (
        "def dreamsim(pretrained, cache_dir, device):\n    class Model:\n        def embed(self, images):\n"
    )
    made += "            assert images.shape[-2:] == (224, 224) and 0 <= images.min() <= images.max() <= 1\n"
    made += "            return images.flatten(2).mean(-1)\n    return Model(), None\n"
    package(tmp_path, "dreamsim", made)
    monkeypatch.syspath_prepend(tmp_path)
    weights = tmp_path / "weights"
    assert "musiq_spaq_ckpt" in (Backbones(weights).problem(["musiq"]) or "")
    (weights / "musiq").mkdir(parents=True)
    torch.save({"level": torch.tensor(50.0)}, weights / "musiq" / "musiq_spaq_ckpt-358bb6af.pth")
    (weights / "dreamsim" / "ensemble_lora").mkdir(parents=True)
    found = outcome("vbench.imaging_quality", weights, "a_static")
    assert found.score == pytest.approx(0.5 * clip("a_static")[0].mean() / 255, abs=1e-4)
    assert Backbones(weights).get("dreamsim")(clip("c_pan")[:2]).shape == (2, 3)


@pytest.mark.parametrize("name", ["musiq", "dreamsim", "raft"])
def test_a_library_that_is_not_there_is_named(name, tmp_path, monkeypatch):
    monkeypatch.setattr("streamvid.evaluation.backbones.importlib.util.find_spec", lambda library: None)
    there, text = {n: (there, text) for n, there, text in doctor(Backbones(tmp_path))}[name]
    assert not there and f"pip install {BACKBONES[name].library}" in text
    metric = {
        "musiq": "vbench.imaging_quality",
        "dreamsim": "long.background_clip_to_clip",
        "raft": "vbench.dynamic_degree",
    }
    found = outcome(metric[name], tmp_path)
    assert found.status == "skipped" and found.score is None and "pip install" in found.reason
