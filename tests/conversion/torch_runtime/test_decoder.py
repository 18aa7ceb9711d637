"""The programs of generation can be exported; a longer cache changes nothing."""

import torch

from mplug2_jax.conversion.torch_runtime import SearchConfig, VideoQA
from mplug2_jax.conversion.torch_runtime.decoder import DecoderCache, DecodeStep
from mplug2_jax.conversion.torch_runtime.model import Encode
from mplug2_jax.conversion.torch_runtime.search import beam_search
from tests.close import assert_close


def make_inputs():
    """Return pixels of two clips of three frames, questions of two lengths, and their mask."""
    question = torch.tensor([[1, 7, 8, 2], [1, 9, 2, 0]])
    return torch.randint(256, (2, 3, 16, 16, 3), dtype=torch.uint8), question, question != 0


def test_a_longer_cache_gives_the_same_search(small, lively):
    model = lively(VideoQA(small()))
    config = SearchConfig(num_beams=3, min_length=2, max_length=7, begin=1, end=2)
    with torch.no_grad():
        memory = Encode(model)(*make_inputs())
        short, long = (
            beam_search(DecoderCache(DecodeStep(model.text_decoder), memory, 3, length), 2, config)
            for length in (7, 12)
        )
    assert torch.equal(short.ids, long.ids)
    assert_close(short.scores, long.scores)


def test_encode_and_decode_step_are_exported(small, lively):
    model, inputs = lively(VideoQA(small())), make_inputs()
    with torch.no_grad():
        memory = Encode(model)(*inputs)
        cache = torch.zeros(2, 2, 3, 2, 7, 12)  # i, b, r, h, m, k
        tokens = torch.tensor([[3, 4, 5], [6, 7, 8]])
        step_inputs = (tokens, torch.tensor(2), cache, cache.clone(), memory.keys, memory.values, memory.mask)
        for program, arguments in ((Encode(model), inputs), (DecodeStep(model.text_decoder), step_inputs)):
            exported = torch.export.export(program, arguments).module()
            assert_close(exported(*arguments), program(*arguments))
