"""CIDEr-D of captions as token ids, on the device: the COCO toolkit's measure, with word pieces for words.

Vedantam et al., arXiv 1411.5726, as ``pycocoevalcap`` computes it: n-grams up to 4, weighted by how few documents have
them, clipped counts, a Gaussian penalty on length (sigma 6), times 10. Captions are so short that n-grams are compared
position by position, exactly.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt32

from mplug2_jax.model.config import SpecialTokens

ORDERS, SIGMA = 4, 6.0
TABLE = 2**18  # n-grams whose frequencies are known
_NO_WORD = -1


class DocumentFrequencies(NamedTuple):
    """In how many documents the commonest n-grams occur; all others count as if one document had them.

    N-grams are told apart by 32 bits. So of those that are not in a full table one in 16,384 gets another's frequency,
    and of those that are about 8 share one.
    """

    keys: UInt32[Array, " z"]  # rising
    logs: Float[Array, " z"]  # of the number of documents
    log_documents: Float[Array, ""]

    def weights(self, keys: UInt32[Array, "*n"]) -> Float[Array, "*n"]:
        """Inverse document frequency, the logarithm of documents / documents with the n-gram."""
        place = jnp.minimum(jnp.searchsorted(self.keys, keys), len(self.keys) - 1)
        return self.log_documents - jnp.where(self.keys[place] == keys, self.logs[place], 0.0)


def uniform_frequencies() -> DocumentFrequencies:
    """Of nothing: all n-grams weigh the same."""
    return DocumentFrequencies(jnp.full(TABLE, 2**32 - 1, jnp.uint32), jnp.zeros(TABLE), jnp.ones(()))


def count_document_frequencies(
    documents: Iterable[Int[np.ndarray, "_ _"]], tokens: SpecialTokens
) -> DocumentFrequencies:
    """Counts n-grams on the host, a few bytes for each of each document; a document is all captions of a picture.

    Of equally common n-grams that find no room the same are left out everywhere.
    """
    each = [np.empty(0, np.uint32)]
    for ids in documents:
        words, counts = compact_words(ids, tokens)
        found = [
            keys[np.arange(keys.shape[-1]) < (counts - before)[:, None]]
            for before, keys in enumerate(hash_ngrams(words))
        ]
        each.append(np.unique(np.concatenate(found)))
    keys, counts = np.unique(np.concatenate(each), return_counts=True)
    keys, counts = keys[counts > 1], counts[counts > 1]
    kept = np.sort(np.argsort(-counts, stable=True)[:TABLE])
    table, logs = np.full(TABLE, 2**32 - 1, np.uint32), np.zeros(TABLE, np.float32)
    table[: len(kept)], logs[: len(kept)] = keys[kept], np.log(counts[kept])
    total = np.float32(np.log(max(1, len(each) - 1)))  # rounded as the others: what all documents have weighs nothing
    return DocumentFrequencies(jnp.asarray(table), jnp.asarray(logs), jnp.asarray(total))


# On hosts and devices alike, so that both mean the same n-gram: either's arrays bring their own functions.
def compact_words(ids: Any, tokens: SpecialTokens) -> tuple[Any, Any]:
    """Ids [..., m] without special tokens, the words moved to the front and -1 behind them; and how many, [...]."""
    xp = ids.__array_namespace__()
    is_word = (ids != tokens.pad) & (ids != tokens.begin) & (ids != tokens.end)
    order = xp.argsort(~is_word, axis=-1, stable=True)
    counts = xp.sum(is_word, axis=-1)
    words = xp.take_along_axis(ids, order, axis=-1)
    return xp.where(xp.arange(ids.shape[-1]) < counts[..., None], words, _NO_WORD), counts


def hash_ngrams(words: Any) -> list[Any]:
    """32 bits for the n-gram that begins at each word, for n = 1 to 4, [..., m - n + 1]."""
    words = words.astype(np.uint32)
    keys = [_mix(words)]
    while len(keys) < ORDERS:
        following = words[..., len(keys) :]
        keys.append(_mix(keys[-1][..., : following.shape[-1]] * np.uint32(31) + following))
    return keys


def _mix(x: Any) -> Any:
    """The finaliser of MurmurHash3, one to one."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> np.uint32(shift))) * np.uint32(factor)
    return x ^ (x >> np.uint32(16))


def cider_d(
    said: Int[Array, "b k m"], references: Int[Array, "b r n"], frequencies: DocumentFrequencies, tokens: SpecialTokens
) -> Float[Array, "b k"]:
    """Each caption against all references of its example, in the toolkit's unit: 10 is the most, papers quote it * 100.

    References that are all padding are none; one without words is one.
    """
    words, lengths = compact_words(said, tokens)
    theirs, their_lengths = compact_words(references, tokens)
    between = _matches(words[:, :, None], theirs[:, None])
    ours = _measured(words, lengths, frequencies)
    others = _measured(theirs, their_lengths, frequencies)

    similarity = jnp.zeros((*said.shape[:2], references.shape[1]))
    for (weights, times, norm), (_, _, their_norm), theirs_as_well in zip(ours, others, between, strict=True):
        there = theirs_as_well.sum(-1)  # [b, k, r, p]: how often a reference has the n-gram that begins at p
        clipped = jnp.minimum(times[:, :, None], there) * there / times[:, :, None]
        product = jnp.sum(weights[:, :, None] * clipped, axis=-1)
        norms = norm[:, :, None] * their_norm[:, None]
        similarity += product / jnp.where(norms > 0, norms, 1.0) / ORDERS

    bigrams, their_bigrams = (jnp.maximum(x - 1, 0) for x in (lengths, their_lengths))
    apart = (bigrams[:, :, None] - their_bigrams[:, None]).astype(jnp.float32)
    similarity *= jnp.exp(-(apart**2) / (2 * SIGMA**2))
    exists = (references != tokens.pad).any(-1)[:, None]
    return 10 * jnp.sum(similarity * exists, axis=-1) / jnp.maximum(exists.sum(-1), 1)


def _matches(a: Int[Array, "*#n p"], b: Int[Array, "*#n q"]) -> list[Array]:
    """Whether the n-grams that begin at p and at q are the same, for n = 1 to 4."""
    same = [a[..., :, None] == b[..., None, :]]
    while len(same) < ORDERS:
        n = len(same)
        same.append(same[-1][..., :-1, :-1] & same[0][..., n:, n:])
    return same


def _measured(
    words: Int[Array, "*n m"], lengths: Int[Array, "*n"], frequencies: DocumentFrequencies
) -> list[tuple[Array, Array, Array]]:
    """For n = 1 to 4 and each n-gram by its place: its squared weight, how often it occurs; and the vector's norm."""
    found = []
    for before, (keys, same) in enumerate(zip(hash_ngrams(words), _matches(words, words), strict=True)):
        inside = jnp.arange(keys.shape[-1]) < (lengths - before)[..., None]
        weights = jnp.where(inside, frequencies.weights(keys) ** 2, 0.0)
        times = same.sum(-1)
        found.append((weights, times, jnp.sqrt(jnp.sum(weights * times, axis=-1))))
    return found
