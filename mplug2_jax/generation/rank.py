"""Answer ranking: which of a fixed list of answers does the decoder find most likely?"""

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
    """The best of a list's answers for each example, its ids from the begin token on; padded to the longest.

    Answers are as :func:`~mplug2_jax.generation.constrained.constrained` takes them. ``keep`` and ``first_twice`` are
    :func:`rank_answers`'; of a list that is shorter than ``keep`` all are ranked.
    """
    ids = np.pad(answers, ((0, 0), (1, 0)), constant_values=tokens.begin)
    mask = ids != ANSWER_PAD
    table = jnp.asarray(np.where(mask, ids, tokens.pad))
    best, _ = rank_answers(
        decoder,
        memory,
        memory_mask,
        table,
        jnp.asarray(mask),
        num_candidates=min(num_candidates, len(ids)),
        double_count_first_token=double_count_first_token,
    )
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
    """The ``keep`` best answers of each example, best first, and their share of probability among themselves.

    The answers are first narrowed by the probability of their first token, then scored by their log-likelihood; with
    ``first_twice`` the first token counts a second time, as in the release. Answers are ``[CLS] words [SEP] pad``.
    """
    b = memory.shape[0]
    begin = jnp.broadcast_to(answers[0, :1], (b, 1))
    first = jax.nn.softmax(decoder(begin, None, memory, memory_mask)[:, 0], axis=-1)
    probabilities, chosen = jax.lax.top_k(first[:, answers[:, 1]], num_candidates)

    ids = answers[chosen].reshape(b * num_candidates, -1)
    mask = answers_mask[chosen].reshape(b * num_candidates, -1)
    logits = decoder(ids, mask, memory, memory_mask)
    log_likelihood = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), ids[:, 1:, None], axis=-1)[..., 0]
    total = jnp.sum(log_likelihood * mask[:, 1:], axis=-1).reshape(b, num_candidates)

    if double_count_first_token:
        total += jnp.log(probabilities)
    share, order = jax.lax.top_k(jax.nn.softmax(total, axis=-1), num_candidates)
    return jnp.take_along_axis(chosen, order, axis=1), share
