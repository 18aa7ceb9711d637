"""Self-critical sequence training: captions that the model draws are rewarded by CIDEr-D (Rennie et al., 1612.00563).

A caption's baseline is the mean reward of the others that were drawn for its example (Kool et al., 2019; Luo,
arXiv 2003.09971), so that nothing is decoded greedily besides.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mplug2_jax.model.config import SpecialTokens
from mplug2_jax.objectives.cider import cider_d, uniform_frequencies
from mplug2_jax.objectives.forward import ForwardPass, LossOutput, weighted_mean
from mplug2_jax.objectives.language import next_token_loss


def advantages(rewards: Float[Array, "b k"]) -> Float[Array, "b k"]:
    """How much better each is than the mean of its example's others."""
    k = rewards.shape[1]
    return (rewards - rewards.mean(1, keepdims=True)) * k / (k - 1)


def scst_loss(
    forward: ForwardPass, said: Int[Array, "b k m"], lengths: Int[Array, "b k"], tokens: SpecialTokens
) -> LossOutput:
    """Mean over all drawn tokens of -log p * their caption's advantage; its gradient is REINFORCE's.

    ``said`` begins with the begin token, which ``lengths`` count. The metric ``reward`` is CIDEr-D as papers quote it,
    ``length`` counts drawn tokens.
    """
    frequencies = uniform_frequencies() if forward.frequencies is None else forward.frequencies
    rewards = cider_d(said, forward.batch["references"], frequencies, tokens)
    _, k, m = said.shape
    ids, spoken = said.reshape(-1, m), jnp.arange(m) < lengths.reshape(-1, 1)
    logits = forward.model.decoder(ids, spoken, *forward.caption_memory)
    counts = jnp.repeat(forward.example_weights, k)
    losses = next_token_loss(logits, ids) * jax.lax.stop_gradient(advantages(rewards)).reshape(-1, 1)
    loss = weighted_mean(losses, spoken[:, 1:] * counts[:, None])
    reward = 100 * weighted_mean(rewards.reshape(-1), counts)
    length = weighted_mean(lengths.reshape(-1) - 1.0, counts)
    return LossOutput(loss, {"loss": loss, "reward": reward, "length": length})
