"""Masked language modeling (MLM) through the text encoder and the universal layers."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray

from mplug2_jax.model.config import SpecialTokens
from mplug2_jax.model.prng import random_key
from mplug2_jax.objectives.config import MlmConfig
from mplug2_jax.objectives.forward import DeviceBatch, ForwardPass, LossOutput, label_cross_entropy, weighted_mean


def mask_tokens(
    keys: Key[Array, " b"], batch: DeviceBatch, vocab_size: int, tokens: SpecialTokens, config: MlmConfig
) -> tuple[Int[Array, "b l"], Bool[Array, "b l"]]:
    """Select tokens by one key per example; return corrupted ids and the selection, never special tokens."""

    def sample(key: PRNGKeyArray) -> tuple[Array, Array, Array]:
        select_key, action_key, replacement_key = jax.random.split(key, 3)
        length = batch["text"].shape[1:]
        return (
            jax.random.uniform(select_key, length),
            jax.random.uniform(action_key, length),
            jax.random.randint(replacement_key, length, 0, vocab_size, batch["text"].dtype),
        )

    ids = batch["text"]
    score, action, random_ids = jax.vmap(sample)(keys)
    if config.whole_word:
        word_index = jnp.cumsum(batch["word_starts"].astype(jnp.int32), axis=1) - 1
        score = jnp.take_along_axis(score, jnp.maximum(word_index, 0), axis=1)
    is_word = batch["text_mask"] & (ids != tokens.begin) & (ids != tokens.end) & (ids != tokens.pad)
    selected = is_word & (score < config.mask_rate)
    corrupted = jnp.where(action < 0.8, tokens.mask, jnp.where(action < 0.9, random_ids, ids))
    return jnp.where(selected, corrupted, ids), selected


def predict_masked(
    forward: ForwardPass, tokens: SpecialTokens, config: MlmConfig
) -> tuple[Float[Array, "b l v"], Float[Array, "b l"]]:
    """Compute log-probabilities at every token of the corrupted ``text``; also return 1 for the selected tokens.

    In evaluation the masking of an example depends on its id alone, not on its batch.
    """
    model, batch = forward.model, forward.batch
    rng = forward.key("mlm/masking")
    if rng is None:
        keys = jax.vmap(jax.random.fold_in, (None, 0))(random_key(0), batch["example_id"])
    else:
        keys = jax.random.split(rng, batch["text"].shape[0])
    corrupted, selected = mask_tokens(keys, batch, model.config.vocab_size, tokens, config)
    hidden = model.encode_text(corrupted, batch["text_mask"], rng=forward.key("mlm/text"))
    return jax.nn.log_softmax(model.mlm_logits(hidden), axis=-1), selected.astype(jnp.float32)


def mlm_loss(forward: ForwardPass, tokens: SpecialTokens, config: MlmConfig, smoothing: float = 0.0) -> LossOutput:
    """Compute the mean cross entropy over the selected tokens of ``text``."""
    log_probs, selected = predict_masked(forward, tokens, config)
    ids, weights = forward.batch["text"], selected * forward.example_weights[:, None]
    loss = weighted_mean(label_cross_entropy(log_probs, ids, smoothing), weights)
    correct = (jnp.argmax(log_probs, axis=-1) == ids).astype(jnp.float32)
    return LossOutput(loss, {"loss": loss, "accuracy": weighted_mean(correct, weights)})
