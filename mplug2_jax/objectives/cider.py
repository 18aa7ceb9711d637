"""CIDEr-D of captions as token ids, on the device: the COCO toolkit's metric, on word pieces instead of words.

Vedantam et al., arXiv 1411.5726, as implemented in ``pycocoevalcap``: n-grams up to 4 weighted by inverse document
frequency, clipped counts, a Gaussian length penalty (sigma 6), times 10. Captions are short enough to compare n-grams
position by position, exactly.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt32

from mplug2_jax.model.config import SpecialTokens

MAX_NGRAM, SIGMA = 4, 6.0
TABLE_SIZE = 2**18  # n-grams with a known document frequency
_PADDING = -1


class DocumentFrequencies(NamedTuple):
    """Document frequencies of the most common n-grams; every other n-gram has frequency 1.

    N-grams are identified by 32-bit hashes. With a full table, one in 16,384 n-grams outside it gets the frequency of
    another n-gram, and about 8 in it share one.
    """

    keys: UInt32[Array, " z"]  # ascending
    logs: Float[Array, " z"]  # log of the number of documents with the n-gram
    log_documents: Float[Array, ""]  # log of the number of documents

    def inverse(self, keys: UInt32[Array, "*n"]) -> Float[Array, "*n"]:
        """Return the inverse document frequency: log(documents / documents with the n-gram)."""
        index = jnp.minimum(jnp.searchsorted(self.keys, keys), len(self.keys) - 1)
        return self.log_documents - jnp.where(self.keys[index] == keys, self.logs[index], 0.0)


def uniform_frequencies() -> DocumentFrequencies:
    """Return an empty table: all n-grams have the same weight."""
    return DocumentFrequencies(jnp.full(TABLE_SIZE, 2**32 - 1, jnp.uint32), jnp.zeros(TABLE_SIZE), jnp.ones(()))


def count_document_frequencies(
    documents: Iterable[Int[np.ndarray, "_ _"]], tokens: SpecialTokens
) -> DocumentFrequencies:
    """Count n-grams on the host, in a few bytes per n-gram and document; a document is all captions of one example.

    If equally common n-grams do not all fit into the table, the choice among them is deterministic.
    """
    keys_of_documents = [np.empty(0, np.uint32)]
    for ids in documents:
        words, num_words = compact_words(ids, tokens)
        valid_keys = [
            keys[np.arange(keys.shape[-1]) < (num_words - order)[:, None]]
            for order, keys in enumerate(hash_ngrams(words))
        ]
        keys_of_documents.append(np.unique(np.concatenate(valid_keys)))
    keys, counts = np.unique(np.concatenate(keys_of_documents), return_counts=True)
    keys, counts = keys[counts > 1], counts[counts > 1]
    top = np.sort(np.argsort(-counts, stable=True)[:TABLE_SIZE])
    table, logs = np.full(TABLE_SIZE, 2**32 - 1, np.uint32), np.zeros(TABLE_SIZE, np.float32)
    table[: len(top)], logs[: len(top)] = keys[top], np.log(counts[top])
    # Rounded like the logs above, so that an n-gram of all documents has weight 0.
    log_documents = np.float32(np.log(max(1, len(keys_of_documents) - 1)))
    return DocumentFrequencies(jnp.asarray(table), jnp.asarray(logs), jnp.asarray(log_documents))


# These run on numpy and JAX arrays alike, so that hosts and devices identify n-grams by the same hashes.
def compact_words(ids: Any, tokens: SpecialTokens) -> tuple[Any, Any]:
    """Move ids [..., m] other than special tokens to the front, padded with -1; also return their number [...]."""
    xp = ids.__array_namespace__()
    is_word = (ids != tokens.pad) & (ids != tokens.begin) & (ids != tokens.end)
    order = xp.argsort(~is_word, axis=-1, stable=True)
    num_words = xp.sum(is_word, axis=-1)
    words = xp.take_along_axis(ids, order, axis=-1)
    return xp.where(xp.arange(ids.shape[-1]) < num_words[..., None], words, _PADDING), num_words


def hash_ngrams(words: Any) -> list[Any]:
    """Hash the n-gram that starts at each word to 32 bits, for n = 1 to 4: arrays [..., m - n + 1]."""
    words = words.astype(np.uint32)
    keys = [_murmur3_finalizer(words)]
    while len(keys) < MAX_NGRAM:
        next_words = words[..., len(keys) :]
        keys.append(_murmur3_finalizer(keys[-1][..., : next_words.shape[-1]] * np.uint32(31) + next_words))
    return keys


def _murmur3_finalizer(x: Any) -> Any:
    """Apply the finalizer of MurmurHash3, a bijection."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> np.uint32(shift))) * np.uint32(factor)
    return x ^ (x >> np.uint32(16))


def cider_d(
    candidates: Int[Array, "b k m"], references: Int[Array, "b r n"], frequencies: DocumentFrequencies,
    tokens: SpecialTokens,
) -> Float[Array, "b k"]:  # fmt: skip
    """Score each candidate against all references of its example, on the toolkit's scale: the maximum is 10.

    A reference that is all padding is ignored; one that has tokens but no words counts.
    """
    words, lengths = compact_words(candidates, tokens)
    ref_words, ref_lengths = compact_words(references, tokens)
    matches = _match_ngrams(words[:, :, None], ref_words[:, None])
    candidate_stats = _ngram_stats(words, lengths, frequencies)
    ref_stats = _ngram_stats(ref_words, ref_lengths, frequencies)

    similarity = jnp.zeros((*candidates.shape[:2], references.shape[1]))
    for (weights, counts, norm), (_, _, ref_norm), match in zip(candidate_stats, ref_stats, matches, strict=True):
        ref_counts = match.sum(-1)  # [b, k, r, p]: count in a reference of the n-gram that starts at p
        clipped = jnp.minimum(counts[:, :, None], ref_counts) * ref_counts / counts[:, :, None]
        product = jnp.sum(weights[:, :, None] * clipped, axis=-1)
        norms = norm[:, :, None] * ref_norm[:, None]
        similarity += product / jnp.where(norms > 0, norms, 1.0) / MAX_NGRAM

    num_bigrams, num_ref_bigrams = (jnp.maximum(x - 1, 0) for x in (lengths, ref_lengths))
    length_diff = (num_bigrams[:, :, None] - num_ref_bigrams[:, None]).astype(jnp.float32)
    similarity *= jnp.exp(-(length_diff**2) / (2 * SIGMA**2))
    exists = (references != tokens.pad).any(-1)[:, None]
    return 10 * jnp.sum(similarity * exists, axis=-1) / jnp.maximum(exists.sum(-1), 1)


def _match_ngrams(a: Int[Array, "*#n p"], b: Int[Array, "*#n q"]) -> list[Array]:
    """Compare the n-grams that start at p and at q, for n = 1 to 4."""
    matches = [a[..., :, None] == b[..., None, :]]
    while len(matches) < MAX_NGRAM:
        n = len(matches)
        matches.append(matches[-1][..., :-1, :-1] & matches[0][..., n:, n:])
    return matches


def _ngram_stats(
    words: Int[Array, "*n m"], lengths: Int[Array, "*n"], frequencies: DocumentFrequencies
) -> list[tuple[Array, Array, Array]]:
    """Return squared weight and count of the n-gram at each position, and the norm of the vector, for n = 1 to 4."""
    stats = []
    for order, (keys, match) in enumerate(zip(hash_ngrams(words), _match_ngrams(words, words), strict=True)):
        valid = jnp.arange(keys.shape[-1]) < (lengths - order)[..., None]
        weights = jnp.where(valid, frequencies.inverse(keys) ** 2, 0.0)
        counts = match.sum(-1)
        stats.append((weights, counts, jnp.sqrt(jnp.sum(weights * counts, axis=-1))))
    return stats
