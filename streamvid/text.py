"""Prompts to text embeddings, as Wan does it: cleaned, tokenized, encoded, rows after the prompt's end set to zero."""

from __future__ import annotations

import difflib
import html
import re
import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Sequence

import ftfy
import torch
from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

from streamvid.errors import UserError


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
    # where weights lie elsewhere (meta), the hook that brings them brings the tokens too
    device = "cpu" if text_encoder.device.type == "meta" else text_encoder.device
    mask = tokens["attention_mask"].to(device)
    hidden = text_encoder(tokens["input_ids"].to(device), mask).last_hidden_state
    return hidden * mask[..., None].to(hidden)


class PromptCache:
    """Embeddings of the prompts used last, on the CPU, so that a prompt is encoded once and its encoder can be freed.

    They belong to one text encoder in one number format: another one empties the cache, none at all leaves it as it is.
    Thread-safe.

    Args:
        limit: prompts kept; the one used longest ago goes first.
    """

    def __init__(self, limit: int = 256):
        self.limit = limit
        self._embeddings: OrderedDict[str, torch.Tensor] = OrderedDict()
        self._source: tuple[weakref.ref, torch.dtype, int] | None = None
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self._embeddings)

    def __contains__(self, prompt: object) -> bool:
        return prompt in self._embeddings

    def put(self, prompt: str, embedding_LD: torch.Tensor) -> None:
        """Keep the embedding of a prompt."""
        with self._lock:
            self._embeddings[prompt] = embedding_LD.cpu()
            while len(self._embeddings) > self.limit:
                self._embeddings.popitem(last=False)

    def encode(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        text_encoder: UMT5EncoderModel | None,
        prompts: Sequence[str],
        text_len: int,
    ) -> torch.Tensor:
        """What `encode_prompts` gives, prompt by prompt: `[B, text_len, D]`.

        Raises:
            UserError: there is no text encoder, and a prompt was not encoded before.
        """
        with self._lock:
            if text_encoder is not None:
                self._belongs_to((weakref.ref(text_encoder), text_encoder.dtype, text_len))
            rows = []
            for prompt in prompts:
                if prompt not in self._embeddings:
                    if tokenizer is None or text_encoder is None:
                        raise UserError(
                            f"prompt = {prompt[:40]!r} was not encoded before the text encoder was freed: encode it "
                            "with pipe.encode_script first, or load the model with its text encoder"
                        )
                    self.put(prompt, encode_prompts(tokenizer, text_encoder, [prompt], text_len)[0])
                self._embeddings.move_to_end(prompt)
                rows.append(self._embeddings[prompt])
            return torch.stack(rows)

    def _belongs_to(self, source: tuple[weakref.ref, torch.dtype, int]) -> None:
        if self._source != source:
            self._embeddings.clear()
            self._source = source


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
