"""Prompts to text embeddings, as Wan does it: cleaned, tokenized, encoded, rows after the prompt's end set to zero."""

from __future__ import annotations

import difflib
import html
import re
import warnings
from collections.abc import Sequence

import ftfy
import torch
from transformers import PreTrainedTokenizerBase, UMT5EncoderModel


def clean_prompt(prompt: str) -> str:
    """Mend encoding accidents, HTML entities and white space."""
    return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(prompt)))).strip()


@torch.no_grad()
def encode_prompts(
    tokenizer: PreTrainedTokenizerBase,
    text_encoder: UMT5EncoderModel,
    prompts: Sequence[str],
    text_len: int,
) -> torch.Tensor:
    """Embeddings `[B, text_len, D]`; warns once of words that the tokenizer does not know and of prompts cut off."""
    cleaned = [clean_prompt(prompt) for prompt in prompts]
    for prompt in cleaned:
        _warn_of_unknown_words(tokenizer, prompt)
        length = len(tokenizer(prompt)["input_ids"])
        if length > text_len:
            warnings.warn(
                f"prompt {prompt[:40]!r}... has {length} tokens and is cut after {text_len}: shorten it",
                stacklevel=2,
            )
    tokens = tokenizer(
        cleaned, padding="max_length", max_length=text_len, truncation=True, return_tensors="pt"
    )
    mask = tokens["attention_mask"].to(text_encoder.device)
    hidden = text_encoder(tokens["input_ids"].to(text_encoder.device), mask).last_hidden_state
    return hidden * mask[..., None].to(hidden.dtype)


def _warn_of_unknown_words(tokenizer: PreTrainedTokenizerBase, prompt: str) -> None:
    """One warning that names words outside a word-level vocabulary and the nearest known ones."""
    unknown = tokenizer.unk_token_id
    if unknown is None or unknown not in tokenizer(prompt)["input_ids"]:
        return
    known = [word for word in tokenizer.get_vocab() if word.isalpha()]
    words = [w for w in re.findall(r"\w+", prompt) if unknown in tokenizer(w)["input_ids"]]
    hints = []
    for word in dict.fromkeys(words):
        near = difflib.get_close_matches(word.lower(), known, 1, cutoff=0.5)
        hints.append(f"{word} (nearest: {near[0]})" if near else word)
    if hints:
        warnings.warn(
            f"this model does not know these words and ignores them: {', '.join(hints)}", stacklevel=2
        )
