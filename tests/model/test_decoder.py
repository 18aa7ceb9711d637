import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mplug2_jax.errors import UserError
from mplug2_jax.model.config import model_config
from mplug2_jax.model.decoder import Decoder
from tests.close import assert_close

CONFIG = model_config("tiny", dtype="float32", width=32, heads=4, mlp_width=64, vocab_size=50, max_positions=12)


@pytest.fixture(scope="module")
def decoder():
    with nnx.use_eager_sharding(False):
        return Decoder(CONFIG, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def memory():
    mask = jnp.asarray([[True] * 7, [True] * 4 + [False] * 3])
    return jax.random.normal(jax.random.key(0), (2, 7, 32)), mask


def test_decoding_with_a_cache_matches_teacher_forcing(decoder, memory):
    ids = jax.random.randint(jax.random.key(1), (6, 8), 1, 50)  # three sequences for each memory
    expected = decoder(ids, None, *memory)
    cache = decoder.init_cache(*memory, num_sequences=3, length=8)
    step = jax.jit(decoder.decode_step)
    for position in range(8):
        logits, cache = step(ids[:, position], jnp.asarray(position), cache)
        assert_close(logits, expected[:, position])


def test_sequences_that_share_a_memory_match_sequences_with_copies_of_it(decoder, memory):
    ids = jax.random.randint(jax.random.key(1), (6, 8), 1, 50)
    shared = decoder(ids, ids != 0, *memory)
    copied = decoder(ids, ids != 0, *(jnp.repeat(x, 3, axis=0) for x in memory))
    assert_close(shared, copied)


def test_later_tokens_and_masked_memory_have_no_effect(decoder, memory):
    tokens, mask = memory
    ids = jax.random.randint(jax.random.key(1), (2, 8), 1, 50)
    before = decoder(ids, None, tokens, mask)
    after = decoder(ids.at[:, 5:].set(7), None, tokens.at[1, 4:].set(9.0), mask)
    assert_close(after[:, :5], before[:, :5])
    assert float(jnp.abs(after[:, 5:] - before[:, 5:]).max()) > 1e-3


def test_the_pad_row_gets_no_gradient_through_the_lookup(decoder):
    graphdef, params = nnx.split(decoder, nnx.Param)
    ids = jnp.asarray([[0, 3, 0]])

    def embed(params):
        return nnx.merge(graphdef, params).embeddings(ids).sum() ** 2

    grads = jax.grad(lambda p: jnp.sum(nnx.merge(graphdef, p).embeddings(ids) * jnp.arange(32.0)))(params)
    words = grads["embeddings"]["words"][...]
    np.testing.assert_array_equal(words[0], 0)
    assert float(jnp.abs(words[3]).max()) > 0
    assert jnp.isfinite(embed(params))


def test_texts_longer_than_the_position_table_are_refused(decoder, memory):
    with pytest.raises(UserError, match=r"13 tokens exceeds config\.model\.max_positions=12"):
        decoder(jnp.ones((2, 13), jnp.int32), None, *memory)
