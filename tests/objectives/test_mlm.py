"""Masked language modeling: which tokens are masked, and the loss over them."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mplug2_jax.model.config import SpecialTokens
from mplug2_jax.objectives.config import MlmConfig
from mplug2_jax.objectives.forward import ForwardPass
from mplug2_jax.objectives.mlm import mask_tokens, mlm_loss, predict_masked
from tests.close import CHAIN, assert_close

TOKENS = SpecialTokens(pad=0, begin=1, end=2, mask=3)
VOCABULARY = 1000


def sentences(batch, length, seed=0):
    """Return ``[CLS] words [SEP] pad`` of several lengths, where about every second piece continues a word."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(4, VOCABULARY, size=(batch, length))
    ends = rng.integers(2, length, size=(batch, 1))
    position = np.arange(length)
    ids[:, 0] = TOKENS.begin
    ids = np.where(position == ends, TOKENS.end, np.where(position > ends, TOKENS.pad, ids))
    starts = (rng.random(ids.shape) < 0.5) | (ids < 4) | (position == 1)
    return {
        "text": jnp.asarray(ids, jnp.int32),
        "text_mask": jnp.asarray(position <= ends),
        "word_starts": jnp.asarray(starts),
        "example_id": jnp.asarray(rng.permutation(10**6)[:batch], jnp.int32),
        "example_mask": jnp.ones(batch, bool),
    }


@functools.partial(jax.jit, static_argnames="config")
def mask(batch, config):
    keys = jax.random.split(jax.random.key(0), batch["text"].shape[0])
    return mask_tokens(keys, batch, VOCABULARY, TOKENS, config)


@pytest.fixture(scope="module")
def batch():
    return sentences(2048, 48)


def is_binomial(count, total, rate):
    """Return whether a count is within five standard deviations of a binomial distribution's mean."""
    return abs(count - total * rate) < 5 * np.sqrt(total * rate * (1 - rate))


def assert_80_10_10(before, after):
    """Check that 80% are masked, 10% random (one in a thousand the same token or the mask), 10% unchanged."""
    assert is_binomial((after == TOKENS.mask).sum(), len(after), 0.8 + 0.1 / VOCABULARY)
    assert is_binomial((after == before).sum(), len(after), 0.1 + 0.1 / VOCABULARY)
    random = after[(after != before) & (after != TOKENS.mask)]
    assert is_binomial(len(random), len(after), 0.1 * (1 - 2 / VOCABULARY))
    assert is_binomial((random < VOCABULARY // 2).sum(), len(random), 0.5)
    assert random.max() < VOCABULARY


def test_15_percent_of_words_are_selected_and_80_10_10_masked_replaced_unchanged(batch):
    corrupted, selected = (np.asarray(x) for x in mask(batch, MlmConfig()))
    ids, rate = np.asarray(batch["text"]), 0.15
    is_word = ids >= 4
    assert is_binomial(selected.sum(), is_word.sum(), rate)
    assert_80_10_10(ids[selected], corrupted[selected])
    # No position in a sentence, and no example, is preferred.
    for part in (np.s_[:, :12], np.s_[:, 12:], np.s_[:1024], np.s_[1024:]):
        assert is_binomial(selected[part].sum(), is_word[part].sum(), rate)


@pytest.mark.parametrize("whole_word", [False, True])
def test_special_tokens_are_never_selected_and_unselected_tokens_are_unchanged(batch, whole_word):
    corrupted, selected = (np.asarray(x) for x in mask(batch, MlmConfig(mask_rate=1.0, whole_word=whole_word)))
    ids = np.asarray(batch["text"])
    np.testing.assert_array_equal(selected, ids >= 4)  # at rate 1, all words and nothing else
    np.testing.assert_array_equal(corrupted[~selected], ids[~selected])
    assert_80_10_10(ids[selected], corrupted[selected])  # many more than at the default rate


def test_masked_out_words_are_never_selected(batch):
    hidden = batch | {"text_mask": batch["text_mask"] & (jnp.arange(48) != 1)}
    _, selected = mask(hidden, MlmConfig(mask_rate=1.0))
    assert not selected[:, 1].any()


def test_whole_words_are_selected_with_all_their_pieces(batch):
    selected = np.asarray(mask(batch, MlmConfig(mask_rate=0.3, whole_word=True))[1])
    ids, starts = np.asarray(batch["text"]), np.asarray(batch["word_starts"])
    words = np.cumsum(starts, axis=1)
    continues = ~starts & (ids >= 4)  # the previous piece belongs to the same word
    np.testing.assert_array_equal(selected[continues], np.roll(selected, 1, axis=1)[continues])
    assert continues.sum() > 5000
    # Words are selected independently: the rate is per word, and adjacent words are uncorrelated.
    first = starts & (ids >= 4)
    assert is_binomial(selected[first].sum(), first.sum(), 0.3)
    adjacent = first & np.roll(first, 1, axis=1) & (words > 2)
    both = selected & np.roll(selected, 1, axis=1)
    assert is_binomial(both[adjacent].sum(), adjacent.sum(), 0.09)
    # Without the option, pieces are selected independently.
    by_piece = np.asarray(mask(batch, MlmConfig())[1])
    assert (by_piece[continues] != np.roll(by_piece, 1, axis=1)[continues]).mean() > 0.2


class FakeForward(ForwardPass):
    """Forward pass whose model computes logits from a fixed table, and records its input."""

    def __init__(self, batch, rng=None):
        self.batch, self.rng, self.inputs = batch, rng, []
        self.model = types.SimpleNamespace(
            config=types.SimpleNamespace(vocab_size=VOCABULARY),
            encode_text=self.encode_text,
            mlm_logits=self.mlm_logits,
        )

    def encode_text(self, ids, mask, rng):
        self.inputs.append(ids)
        return jnp.cumsum(jax.nn.one_hot(ids % 16, 16), axis=1)

    def mlm_logits(self, hidden):
        return hidden @ jnp.sin(jnp.arange(16.0 * VOCABULARY)).reshape(16, VOCABULARY)


def select_rows(batch, rows):
    return {name: value[jnp.asarray(rows)] for name, value in batch.items()}


@jax.jit
def predict(batch, rng=None):
    """Return log-probabilities, selected tokens, the model's input, and the loss."""
    config = MlmConfig(mask_rate=0.3)
    forward = FakeForward(batch, rng)
    log_probs, selected = predict_masked(forward, TOKENS, config)
    return log_probs, selected, forward.inputs[0], mlm_loss(forward, TOKENS, config)


def test_in_evaluation_masking_depends_on_the_example_only():
    batch = sentences(8, 24)
    expected = predict(batch)
    for rows in ([7, 0, 5], list(range(7, -1, -1)), [3, 3, 3, 1, 3, 3, 0, 3]):
        found = predict(select_rows(batch, rows))
        for subset, everything in zip(found[:3], expected[:3], strict=True):
            assert_close(subset, np.asarray(everything)[rows])
    twins = select_rows(batch, [2] * 8) | {"example_id": jnp.arange(8, dtype=jnp.int32)}
    assert len(np.unique(predict(twins)[1], axis=0)) == 8


def test_in_training_masking_depends_on_the_key():
    batch = sentences(8, 24)
    selections = [np.asarray(predict(batch, jax.random.key(seed))[1]) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(selections[0], selections[1])
    assert (selections[0] != selections[2]).any()


def test_the_loss_is_the_mean_over_selected_tokens_of_unpadded_examples():
    counts = np.asarray([True, False, True, True, False, False, True, False])
    batch = sentences(8, 24) | {"example_mask": jnp.asarray(counts)}
    log_probs, selected, model_input, result = predict(batch)
    ids, log_probs = np.asarray(batch["text"]), np.asarray(log_probs)
    assert_close(np.exp(log_probs).sum(-1), np.ones((8, 24)), CHAIN)
    assert (model_input != ids).any()  # the model reads the corrupted text ...
    losses, hits = [], []
    for b, l in np.argwhere((selected > 0) & counts[:, None]):
        losses.append(-log_probs[b, l, ids[b, l]])  # ... and predicts the original text
        hits.append(log_probs[b, l].argmax() == ids[b, l])
    assert len(losses) > 5
    assert_close(result.loss, np.mean(losses))
    assert_close(result.metrics["accuracy"], np.mean(hits))


def test_the_loss_of_a_batch_of_padding_is_0():
    batch = sentences(8, 24)
    assert float(predict(batch | {"example_mask": jnp.zeros(8, bool)})[3].loss) == 0
