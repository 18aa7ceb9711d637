"""The static cache gives what the growing one does; its programs can be exported."""

import pytest
import torch

from mplug2_jax.conversion.torch_runtime import Caption, SearchConfig, VideoQA, normalize_pixels
from mplug2_jax.conversion.torch_runtime.search import beam_search
from mplug2_jax.conversion.torch_runtime.steps import DecodeStep, Encode, StaticCache
from tests.close import assert_close

SEARCH = SearchConfig(num_beams=3, min_length=2, max_length=7, begin=1, end=2)


def make_inputs(model, frames=3):
    """Return pixels of two clips, and questions if the model reads them."""
    pixels = torch.randint(256, (2, frames, 16, 16, 3), dtype=torch.uint8)
    question = torch.tensor([[1, 7, 8, 2], [1, 9, 2, 0]])
    return (pixels, question, question != 0) if isinstance(model, VideoQA) else (pixels,)


@pytest.mark.parametrize("kind", [Caption, VideoQA])
def test_a_static_cache_gives_the_same_search(small, lively, kind):
    model = lively(kind(small()))
    pixels, *question = make_inputs(model)
    expected = model.generate(normalize_pixels(pixels), *question, search=SEARCH)
    with torch.no_grad():
        encoded = Encode(model)(pixels, *question)
        for length in (SEARCH.max_length, 12):
            cache = StaticCache(DecodeStep(model.text_decoder), encoded, SEARCH.num_beams, length)
            found = beam_search(cache, 2, SEARCH)
            assert found.ids.tolist() == expected.ids.tolist()
            assert_close(found.scores, expected.scores)


def test_programs_are_exported(small, lively):
    model = lively(VideoQA(small()))
    inputs = make_inputs(model)
    encode, step = Encode(model), DecodeStep(model.text_decoder)
    with torch.no_grad():
        encoded = encode(*inputs)
        cache = torch.zeros(2, 2, 3, 2, 7, 12)  # i, b, r, h, m, k
        tokens = torch.tensor([[3, 4, 5], [6, 7, 8]])
        step_inputs = (tokens, torch.tensor(2), cache, cache.clone(), *encoded[1:])
        for program, arguments in ((encode, inputs), (step, step_inputs)):
            exported = torch.export.export(program, arguments).module()
            assert_close(exported(*arguments), program(*arguments))
