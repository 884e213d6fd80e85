"""Prompts are encoded once, and the text encoder can go."""

import gc
import weakref

import numpy as np
import pytest
import tiny
import torch
from streamvid.pipelines.pipeline_streamvid import StreamVidPipeline

from streamvid.errors import UserError
from streamvid.text import encode_prompts

FOX, CAT, BIRD = "a red fox walks", "the blue cat sleeps", "a bird in the rain"
SCRIPT = f"{FOX} [1s] | {CAT} [1s]"


@pytest.fixture
def pipe() -> StreamVidPipeline:
    return tiny.new_pipeline()


@pytest.fixture
def encoded(pipe) -> list[int]:
    """Batch sizes of the text encoder's forwards."""
    sizes: list[int] = []
    pipe.text_encoder.register_forward_hook(lambda module, args, output: sizes.append(len(args[0])))
    return sizes


def test_embeddings_are_those_of_the_text_encoder(pipe):
    length = pipe.transformer.config.text_len
    expected = encode_prompts(pipe.tokenizer, pipe.text_encoder, [CAT], length)
    assert torch.equal(pipe.encode_prompt([FOX, CAT])[1:], expected)
    assert torch.equal(pipe.encode_prompt(CAT), expected)
    assert not torch.equal(pipe.encode_prompt(FOX), expected)


def test_a_prompt_is_encoded_once(pipe, encoded):
    stream = pipe.stream(FOX, decode_pixels=False)
    for prompt in (CAT, FOX, CAT):
        next(stream)
        stream.prompt(prompt, "cross_only")
    next(stream)
    next(pipe.stream([CAT, FOX], decode_pixels=False))
    assert encoded == [1, 1]


def test_the_prompts_used_longest_ago_go_first(pipe, encoded):
    pipe.prompt_cache.limit = 2
    for prompt in (FOX, CAT, FOX, BIRD):
        pipe.encode_prompt(prompt)
    assert len(pipe.prompt_cache) == 2 and len(encoded) == 3
    assert FOX in pipe.prompt_cache and BIRD in pipe.prompt_cache
    pipe.encode_prompt(CAT)
    assert len(encoded) == 4


def test_a_script_longer_than_the_cache_is_kept_whole(pipe):
    pipe.prompt_cache.limit = 1
    embeddings = pipe.encode_script(SCRIPT)
    assert list(embeddings) == [FOX, CAT] and len(pipe.prompt_cache) == 2


def test_another_encoder_or_number_format_encodes_anew(pipe):
    before = pipe.encode_prompt(FOX)
    pipe.text_encoder = tiny.text_encoder(seed=1)
    other = pipe.encode_prompt(FOX)
    assert not torch.equal(other, before)
    pipe.to(torch.bfloat16)
    assert pipe.encode_prompt(FOX).dtype == torch.bfloat16


def test_a_script_streams_without_its_text_encoder(pipe):
    expected = pipe(SCRIPT, seed=1, output_type="np").frames
    pipe = tiny.new_pipeline()
    pipe.encode_script(SCRIPT)
    encoder = weakref.ref(pipe.text_encoder)
    pipe.text_encoder = None
    gc.collect()
    assert encoder() is None  # its memory is free
    assert np.array_equal(pipe(SCRIPT, seed=1, output_type="np").frames, expected)
    pipe.tokenizer = None
    assert pipe(CAT, 1, output_type="np").frames.shape[1] == 1


def test_a_prompt_that_was_not_encoded_is_refused_at_once(pipe):
    pipe.encode_script(SCRIPT)
    pipe.text_encoder = None
    message = "prompt = 'a bird in the rain' was not encoded before the text encoder was freed: encode it"
    stream = pipe.stream(FOX)
    next(stream)
    for attempt in (
        lambda: pipe(BIRD),
        lambda: pipe.stream(f"{FOX} [1s] | {BIRD} [1s]"),
        lambda: stream.prompt(BIRD),
        lambda: pipe.encode_script(BIRD),
    ):
        with pytest.raises(UserError, match=message) as error:
            attempt()
        assert "\n" not in str(error.value)
    stream.prompt(CAT)  # the stream lives on
    assert [next(stream).prompt, next(stream).prompt] == [CAT, CAT]


def test_a_model_may_come_without_its_text_encoder(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "whole")
    small = StreamVidPipeline.from_pretrained(tmp_path / "whole", text_encoder=None)
    with pytest.raises(UserError, match="was not encoded"):
        small.stream(FOX)
    small.save_pretrained(tmp_path / "small")
    smaller = StreamVidPipeline.from_pretrained(tmp_path / "small")
    assert smaller.text_encoder is None
    smaller.prompt_cache.put(FOX, pipe.encode_prompt(FOX)[0])
    expected = next(pipe.stream(FOX)).frames
    assert np.array_equal(next(smaller.stream(FOX)).frames, expected)
