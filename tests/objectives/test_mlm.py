"""Masked-language modelling: what is masked, and what counts."""

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
    """``[CLS] words [SEP] pad`` of several lengths, and where words start: about every second piece continues one."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(4, VOCABULARY, size=(batch, length))
    ends = rng.integers(2, length, size=(batch, 1))
    place = np.arange(length)
    ids[:, 0] = TOKENS.begin
    ids = np.where(place == ends, TOKENS.end, np.where(place > ends, TOKENS.pad, ids))
    starts = (rng.random(ids.shape) < 0.5) | (ids < 4) | (place == 1)
    return {
        "text": jnp.asarray(ids, jnp.int32),
        "text_mask": jnp.asarray(place <= ends),
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


def within(count, total, share):
    """Whether a count is what a share would give, within five standard deviations."""
    return abs(count - total * share) < 5 * np.sqrt(total * share * (1 - share))


def assert_80_10_10(before, after):
    """Of the chosen words 80 % are masked, 10 % are random (once in a thousand the same, or the mask), 10 % stay."""
    assert within((after == TOKENS.mask).sum(), len(after), 0.8 + 0.1 / VOCABULARY)
    assert within((after == before).sum(), len(after), 0.1 + 0.1 / VOCABULARY)
    random = after[(after != before) & (after != TOKENS.mask)]
    assert within(len(random), len(after), 0.1 * (1 - 2 / VOCABULARY))
    assert within((random < VOCABULARY // 2).sum(), len(random), 0.5)
    assert random.max() < VOCABULARY


def test_of_the_words_15_percent_are_chosen_and_of_those_80_10_10_are_masked_replaced_kept(batch):
    corrupted, chosen = (np.asarray(x) for x in mask(batch, MlmConfig()))
    ids, rate = np.asarray(batch["text"]), 0.15
    plain = ids >= 4
    assert within(chosen.sum(), plain.sum(), rate)
    assert_80_10_10(ids[chosen], corrupted[chosen])
    # No place in a sentence, and no example, is favoured.
    for part in (np.s_[:, :12], np.s_[:, 12:], np.s_[:1024], np.s_[1024:]):
        assert within(chosen[part].sum(), plain[part].sum(), rate)


@pytest.mark.parametrize("whole_word", [False, True])
def test_padding_and_ends_are_never_chosen_and_what_is_not_chosen_stays(batch, whole_word):
    corrupted, chosen = (np.asarray(x) for x in mask(batch, MlmConfig(mask_rate=1.0, whole_word=whole_word)))
    ids = np.asarray(batch["text"])
    np.testing.assert_array_equal(chosen, ids >= 4)  # at a rate of 1, all words and nothing else
    np.testing.assert_array_equal(corrupted[~chosen], ids[~chosen])
    assert_80_10_10(ids[chosen], corrupted[chosen])  # many more than at the usual rate


def test_words_that_the_mask_hides_are_never_chosen(batch):
    hidden = batch | {"text_mask": batch["text_mask"] & (jnp.arange(48) != 1)}
    _, chosen = mask(hidden, MlmConfig(mask_rate=1.0))
    assert not chosen[:, 1].any()


def test_whole_words_are_chosen_with_all_their_pieces(batch):
    chosen = np.asarray(mask(batch, MlmConfig(mask_rate=0.3, whole_word=True))[1])
    ids, starts = np.asarray(batch["text"]), np.asarray(batch["word_starts"])
    words = np.cumsum(starts, axis=1)
    continues = ~starts & (ids >= 4)  # the piece before it belongs to the same word
    np.testing.assert_array_equal(chosen[continues], np.roll(chosen, 1, axis=1)[continues])
    assert continues.sum() > 5000
    # Words are chosen by themselves: the rate is one of words, and neighbours do not go together.
    first = starts & (ids >= 4)
    assert within(chosen[first].sum(), first.sum(), 0.3)
    neighbours = first & np.roll(first, 1, axis=1) & (words > 2)
    both = chosen & np.roll(chosen, 1, axis=1)
    assert within(both[neighbours].sum(), neighbours.sum(), 0.09)
    # Without the option, pieces are chosen one by one.
    apart = np.asarray(mask(batch, MlmConfig())[1])
    assert (apart[continues] != np.roll(apart, 1, axis=1)[continues]).mean() > 0.2


class Prepared(ForwardPass):
    """A forward pass whose model says what a table tells for the tokens that it gets."""

    def __init__(self, batch, rng=None):
        self.batch, self.rng, self.seen = batch, rng, []
        self.model = types.SimpleNamespace(
            config=types.SimpleNamespace(vocab_size=VOCABULARY),
            encode_text=self.encode_text,
            mlm_logits=self.mlm_logits,
        )

    def encode_text(self, ids, mask, rng):
        self.seen.append(ids)
        return jnp.cumsum(jax.nn.one_hot(ids % 16, 16), axis=1)

    def mlm_logits(self, hidden):
        return hidden @ jnp.sin(jnp.arange(16.0 * VOCABULARY)).reshape(16, VOCABULARY)


def take(batch, rows):
    return {name: value[jnp.asarray(rows)] for name, value in batch.items()}


@jax.jit
def predict(batch, rng=None):
    """Log-probabilities, which tokens were chosen, what the model was shown, and the loss."""
    config = MlmConfig(mask_rate=0.3)
    forward = Prepared(batch, rng)
    log_probs, chosen = predict_masked(forward, TOKENS, config)
    return log_probs, chosen, forward.seen[0], mlm_loss(forward, TOKENS, config)


def test_in_evaluation_the_masking_depends_on_the_example_alone():
    batch = sentences(8, 24)
    whole = predict(batch)
    for rows in ([7, 0, 5], list(range(7, -1, -1)), [3, 3, 3, 1, 3, 3, 0, 3]):
        parts = predict(take(batch, rows))
        for part, everything in zip(parts[:3], whole[:3], strict=True):
            assert_close(part, np.asarray(everything)[rows])
    twins = take(batch, [2] * 8) | {"example_id": jnp.arange(8, dtype=jnp.int32)}
    assert len(np.unique(predict(twins)[1], axis=0)) == 8


def test_in_training_the_masking_changes_with_the_key():
    batch = sentences(8, 24)
    chosen = [np.asarray(predict(batch, jax.random.key(seed))[1]) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(chosen[0], chosen[1])
    assert (chosen[0] != chosen[2]).any()


def test_the_loss_is_the_mean_over_chosen_tokens_of_examples_that_count():
    counts = np.asarray([True, False, True, True, False, False, True, False])
    batch = sentences(8, 24) | {"example_mask": jnp.asarray(counts)}
    log_probs, chosen, seen, outcome = predict(batch)
    ids, log_probs = np.asarray(batch["text"]), np.asarray(log_probs)
    assert_close(np.exp(log_probs).sum(-1), np.ones((8, 24)), CHAIN)
    assert (seen != ids).any()  # the model is shown the corrupted text ...
    losses, hits = [], []
    for b, l in np.argwhere((chosen > 0) & counts[:, None]):
        losses.append(-log_probs[b, l, ids[b, l]])  # ... and asked for the true one
        hits.append(log_probs[b, l].argmax() == ids[b, l])
    assert len(losses) > 5
    assert_close(outcome.loss, np.mean(losses))
    assert_close(outcome.metrics["accuracy"], np.mean(hits))


def test_a_batch_without_a_word_is_worth_nothing():
    batch = sentences(8, 24)
    assert float(predict(batch | {"example_mask": jnp.zeros(8, bool)})[3].loss) == 0
