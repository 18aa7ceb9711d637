"""Masked-language modelling through the text encoder and the universal layers."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray

from mplug2_jax.model.config import SpecialTokens
from mplug2_jax.model.prng import random_key
from mplug2_jax.objectives.config import MlmConfig
from mplug2_jax.objectives.forward import DeviceBatch, ForwardPass, LossOutput, label_cross_entropy, weighted_mean


def mask_tokens(
    keys: Key[Array, " b"],
    batch: DeviceBatch,
    vocab_size: int,
    tokens: SpecialTokens,
    config: MlmConfig,
) -> tuple[Int[Array, "b l"], Bool[Array, "b l"]]:
    """Corrupted ids, and which tokens were chosen, by one key per example. Padding and the ends never are."""

    def draw(key: PRNGKeyArray) -> tuple[Array, Array, Array]:
        choose, act, replace = jax.random.split(key, 3)
        length = batch["text"].shape[1:]
        return (
            jax.random.uniform(choose, length),
            jax.random.uniform(act, length),
            jax.random.randint(replace, length, 0, vocab_size, batch["text"].dtype),
        )

    ids = batch["text"]
    chance, action, random_ids = jax.vmap(draw)(keys)
    if config.whole_word:
        word = jnp.cumsum(batch["word_starts"].astype(jnp.int32), axis=1) - 1
        chance = jnp.take_along_axis(chance, jnp.maximum(word, 0), axis=1)
    plain = batch["text_mask"] & (ids != tokens.begin) & (ids != tokens.end) & (ids != tokens.pad)
    chosen = plain & (chance < config.mask_rate)
    corrupted = jnp.where(action < 0.8, tokens.mask, jnp.where(action < 0.9, random_ids, ids))
    return jnp.where(chosen, corrupted, ids), chosen


def predict_masked(
    forward: ForwardPass, tokens: SpecialTokens, config: MlmConfig
) -> tuple[Float[Array, "b l v"], Float[Array, "b l"]]:
    """Log-probabilities at every token of the corrupted ``text``, and 1 for the tokens that were chosen.

    In evaluation the masking of an example depends on its id alone, whatever batch it is in.
    """
    model, batch = forward.model, forward.batch
    rng = forward.key("mlm/masking")
    if rng is None:
        keys = jax.vmap(jax.random.fold_in, (None, 0))(random_key(0), batch["example_id"])
    else:
        keys = jax.random.split(rng, batch["text"].shape[0])
    corrupted, chosen = mask_tokens(keys, batch, model.config.vocab_size, tokens, config)
    hidden = model.encode_text(corrupted, batch["text_mask"], rng=forward.key("mlm/text"))
    return jax.nn.log_softmax(model.mlm_logits(hidden), axis=-1), chosen.astype(jnp.float32)


def mlm_loss(forward: ForwardPass, tokens: SpecialTokens, config: MlmConfig, smoothing: float = 0.0) -> LossOutput:
    """Mean cross entropy over the chosen tokens of ``text``."""
    log_probs, chosen = predict_masked(forward, tokens, config)
    ids, weights = forward.batch["text"], chosen * forward.example_weights[:, None]
    loss = weighted_mean(label_cross_entropy(log_probs, ids, smoothing), weights)
    hit = (jnp.argmax(log_probs, axis=-1) == ids).astype(jnp.float32)
    return LossOutput(loss, {"loss": loss, "accuracy": weighted_mean(hit, weights)})
