"""Training of the text encoder: its words, its batches, and that it learns."""

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, UMT5EncoderModel

from streamvid.training.text_stage import TEXT_LENGTH, TextStage, build_tokenizer
from streamvid.world.prompts import VOCABULARY, describe
from streamvid.world.scene import is_held_out, sample_scene

ENCODER = {"d_model": 32, "d_kv": 16, "num_heads": 2, "d_ff": 32, "num_layers": 1, "dropout_rate": 0.0}


def stage(**options) -> TextStage:
    torch.manual_seed(0)
    return TextStage(**{"encoder": ENCODER, "batch_size": 24, **options})


def test_every_word_of_the_grammar_is_a_token():
    tokenizer = build_tokenizer()
    assert len(tokenizer) == len(VOCABULARY) + 2
    ids = tokenizer(" ".join(VOCABULARY).upper(), truncation=False)["input_ids"]
    assert sorted(ids) == list(range(2, len(VOCABULARY) + 2))
    assert tokenizer("quantum")["input_ids"] == [tokenizer.unk_token_id] == [1]
    assert tokenizer.pad_token_id == 0


def test_every_prompt_of_the_grammar_fits():
    rng, tokenizer = np.random.default_rng(0), build_tokenizer()
    prompts = [describe(sample_scene(rng, held_out=None), rng) for _ in range(2000)]
    ids = tokenizer(prompts)["input_ids"]
    assert max(map(len, ids)) <= TEXT_LENGTH
    bare = tokenizer([prompt.replace(",", "") for prompt in prompts])["input_ids"]
    assert not any(1 in row for row in bare)  # only the comma is no word


def test_it_learns_what_the_words_mean():
    made = stage()
    batch = made.batch(0, 0, 0)
    optimizer = torch.optim.AdamW(made.trainable().parameters(), lr=1e-2)
    first, _ = made(batch)
    for _ in range(40):
        loss, metrics = made(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.5 * first and metrics["accuracy"] > 0.7


def test_a_batch_is_a_pure_function_of_seed_step_and_process():
    made = stage()
    one, twin = made.batch(3, 4, 1), stage().batch(3, 4, 1)
    assert all(torch.equal(one[name], twin[name]) for name in one)
    for other in ((2, 4, 1), (3, 5, 1), (3, 4, 0)):
        assert not torch.equal(one["labels"], made.batch(*other)["labels"])
    assert one["labels"].shape == (24, 7) and one["ids"].shape == one["mask"].shape


def test_padding_is_not_asked():
    """The loss counts real tokens only: more padding changes nothing."""
    made = stage()
    batch = made.batch(0, 0, 0)
    padded = {name: torch.nn.functional.pad(batch[name], (0, 5)) for name in ("ids", "mask")}
    assert made(batch)[0].item() == pytest.approx(made({**batch, **padded})[0].item(), rel=1e-5)


def test_options_have_an_effect():
    assert len(stage(batch_size=7).batch(0, 0, 0)["labels"]) == 7
    unknown = [(stage(word_dropout=share).batch(0, 0, 0)["ids"] == 1).sum() for share in (0.0, 0.1, 0.5)]
    assert unknown[0] < unknown[1] < unknown[2]
    deeper = stage(encoder={**ENCODER, "num_layers": 2})
    assert len(deeper.classifier.encoder.encoder.block) == 2


def test_validation_asks_for_held_out_scenes(monkeypatch, tmp_path):
    asked = []

    def sample(rng, held_out=False):
        scene = sample_scene(rng, held_out=held_out)
        asked.append(is_held_out(scene))
        return scene

    monkeypatch.setattr("streamvid.training.text_stage.sample_scene", sample)
    numbers = stage().validate(tmp_path, 0)
    assert all(asked) and len(asked) == 1024
    assert 0 < numbers["held_out_accuracy"] < 0.6  # nothing learnt yet


def test_the_export_encodes_as_the_stage_does(tmp_path):
    made = stage().eval()
    made.export(tmp_path)
    encoder = UMT5EncoderModel.from_pretrained(tmp_path / "text_encoder")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    tokens = tokenizer(["a small red ball bounces on the sand"], return_tensors="pt")
    assert torch.equal(
        encoder(**tokens).last_hidden_state, made.classifier.encoder(**tokens).last_hidden_state
    )
    assert tokenizer.model_max_length == TEXT_LENGTH
