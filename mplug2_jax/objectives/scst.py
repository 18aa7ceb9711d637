"""Self-critical sequence training (SCST): sampled captions are rewarded by CIDEr-D (Rennie et al., arXiv 1612.00563).

The baseline of a caption is the mean reward of the other samples of its example (Kool et al., 2019; Luo,
arXiv 2003.09971), so no greedy decoding is needed.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mplug2_jax.model.config import SpecialTokens
from mplug2_jax.objectives.cider import cider_d, uniform_frequencies
from mplug2_jax.objectives.forward import ForwardPass, LossOutput, weighted_mean
from mplug2_jax.objectives.language import next_token_loss


def advantages(rewards: Float[Array, "b k"]) -> Float[Array, "b k"]:
    """Subtract from each reward the mean of the other samples of its example."""
    k = rewards.shape[1]
    return (rewards - rewards.mean(1, keepdims=True)) * k / (k - 1)


def scst_loss(
    forward: ForwardPass, samples: Int[Array, "b k m"], lengths: Int[Array, "b k"], tokens: SpecialTokens
) -> LossOutput:
    """Compute the mean over all sampled tokens of -log p * advantage, whose gradient is that of REINFORCE.

    ``samples`` start with the begin token, which ``lengths`` include. The metric ``reward`` is CIDEr-D * 100, as papers
    report it; ``length`` counts sampled tokens.
    """
    frequencies = uniform_frequencies() if forward.frequencies is None else forward.frequencies
    rewards = cider_d(samples, forward.batch["references"], frequencies, tokens)
    _, k, m = samples.shape
    ids, token_mask = samples.reshape(-1, m), jnp.arange(m) < lengths.reshape(-1, 1)
    logits = forward.model.decoder(ids, token_mask, *forward.caption_memory)
    sample_weights = jnp.repeat(forward.example_weights, k)
    losses = next_token_loss(logits, ids) * jax.lax.stop_gradient(advantages(rewards)).reshape(-1, 1)
    loss = weighted_mean(losses, token_mask[:, 1:] * sample_weights[:, None])
    reward = 100 * weighted_mean(rewards.reshape(-1), sample_weights)
    length = weighted_mean(lengths.reshape(-1) - 1.0, sample_weights)
    return LossOutput(loss, {"loss": loss, "reward": reward, "length": length})
