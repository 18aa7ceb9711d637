"""Answer ranking: the most likely answers of a fixed list under the decoder."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mplug2_jax.generation.constrained import ANSWER_PAD
from mplug2_jax.model.config import SpecialTokens
from mplug2_jax.model.decoder import Decoder


def best_answer(
    decoder: Decoder,
    memory: Float[Array, "b s d"],
    memory_mask: Bool[Array, "b s"],
    answers: Int[np.ndarray, "a m"],
    tokens: SpecialTokens,
    *,
    num_candidates: int,
    double_count_first_token: bool = False,
) -> Int[Array, "b n"]:
    """Return the ids of the best answer of each example, from the begin token on, padded to the longest answer.

    Answers are those of :func:`~mplug2_jax.generation.constrained.constrain_step`, ``num_candidates`` (at most all) and
    ``double_count_first_token`` those of :func:`rank_answers`.
    """
    ids = np.pad(answers, ((0, 0), (1, 0)), constant_values=tokens.begin)
    mask = ids != ANSWER_PAD
    table = jnp.asarray(np.where(mask, ids, tokens.pad))
    best, _ = rank_answers(
        decoder, memory, memory_mask, table, jnp.asarray(mask), num_candidates=min(num_candidates, len(ids)),
        double_count_first_token=double_count_first_token,
    )  # fmt: skip
    return table[best[:, 0]]


def rank_answers(
    decoder: Decoder,
    memory: Float[Array, "b s d"],
    memory_mask: Bool[Array, "b s"],
    answers: Int[Array, "a m"],
    answers_mask: Bool[Array, "a m"],
    *,
    num_candidates: int,
    double_count_first_token: bool = False,
) -> tuple[Int[Array, "b r"], Float[Array, "b r"]]:
    """Rank answers by likelihood: return the indices of ``num_candidates`` answers per example, best first, and scores.

    The candidates are the answers whose first token is most likely; they are ranked by log-likelihood. As in the
    release, ``double_count_first_token`` adds the first token's a second time. Scores are probabilities among the
    candidates. Answers are ``[CLS] words [SEP] pad``.
    """
    b = memory.shape[0]
    begin = jnp.broadcast_to(answers[0, :1], (b, 1))
    first = jax.nn.softmax(decoder(begin, None, memory, memory_mask)[:, 0], axis=-1)
    first_probs, candidates = jax.lax.top_k(first[:, answers[:, 1]], num_candidates)

    ids = answers[candidates].reshape(b * num_candidates, -1)
    mask = answers_mask[candidates].reshape(b * num_candidates, -1)
    logits = decoder(ids, mask, memory, memory_mask)
    token_log_probs = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), ids[:, 1:, None], axis=-1)[..., 0]
    total = jnp.sum(token_log_probs * mask[:, 1:], axis=-1).reshape(b, num_candidates)

    if double_count_first_token:
        total += jnp.log(first_probs)
    scores, order = jax.lax.top_k(jax.nn.softmax(total, axis=-1), num_candidates)
    return jnp.take_along_axis(candidates, order, axis=1), scores
