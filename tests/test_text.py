"""Prompts to embeddings: cleaned, padded with zero rows, with a word about words that are not known."""

import warnings

import pytest
import tiny
import torch

from streamvid.text import clean_prompt, encode_prompts


def encode(*prompts: str) -> torch.Tensor:
    pipe = tiny.pipeline()
    return encode_prompts(pipe.tokenizer, pipe.text_encoder, prompts, tiny.TEXT_LENGTH)


def test_rows_behind_the_prompt_are_zero():
    rows = encode("a red fox", "the blue cat sleeps in the snow")
    assert rows.shape == (2, tiny.TEXT_LENGTH, tiny.TEXT_DIM) and not rows.requires_grad
    used = rows.abs().sum(-1) > 0
    assert used.tolist() == [[True] * 3 + [False] * 5, [True] * 7 + [False]]


def test_a_prompt_does_not_depend_on_its_neighbours():
    both = encode("a red fox", "the blue cat sleeps in the snow")
    torch.testing.assert_close(both[:1], encode("a red fox"))


@pytest.mark.parametrize(
    ("given", "cleaned"),
    [
        ("  a \n red\tfox ", "a red fox"),
        ("fish &amp; chips", "fish & chips"),
        ("fish &amp;amp; chips", "fish & chips"),
        ("a ï¬\x81sh", "a fish"),  # a ligature, read in the wrong encoding
    ],
)
def test_prompts_are_mended(given, cleaned):
    assert clean_prompt(given) == cleaned


def test_unknown_words_are_named_once_with_the_nearest_known():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        encode("a red foxx walks a Foxx quickly xylophone")
    (warning,) = caught
    text = str(warning.message)
    assert text.startswith("this model does not know these words and ignores them: foxx (nearest: fox)")
    assert "xylophone" in text and "quickly" in text and text.count("nearest: fox") <= 2


def test_known_words_are_no_cause_for_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encode("The RED fox", "a cat in the rain")


def test_a_prompt_that_is_too_long_is_cut_with_a_warning():
    words = ["red"] * tiny.TEXT_LENGTH
    with pytest.warns(UserWarning, match=r"prompt 'red .*\.\.\. has 9 tokens and is cut after 8: shorten it"):
        rows = encode(" ".join([*words, "cat"]))
    torch.testing.assert_close(rows, encode(" ".join(words)))
