"""Vision-language contrast over the global batch."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mplug2_jax.objectives.config import VlcConfig
from mplug2_jax.objectives.contrast import cross_entropy
from mplug2_jax.objectives.forward import Forward, Outcome, weighted_mean
from mplug2_jax.objectives.momentum import momentum_contrastive_loss


def contrastive_loss(
    visual: Float[Array, "b e"],
    text: Float[Array, "b e"],
    ids: Int[Array, " b"],
    counts: Float[Array, " b"],
    temperature: Float[Array, ""],
) -> Float[Array, ""]:
    """Mean of both directions of softmax cross entropy; all pairs with equal ids are positives, equally weighted.

    Features are unit vectors; examples with ``counts`` 0 are neither rows nor columns.
    """
    rows = cross_entropy(visual, text, ids, counts, temperature)
    columns = cross_entropy(text, visual, ids, counts, temperature)
    return (weighted_mean(rows, counts) + weighted_mean(columns, counts)) / 2


def vlc_loss(forward: Forward, config: VlcConfig) -> Outcome:
    """Contrast between ``frames`` and ``text``, both directions."""
    ids = forward.batch["example_id"]
    temperature = jnp.maximum(forward.model.contrastive.temperature[...], config.min_temperature)
    if forward.queue is None or forward.teacher is None:
        loss = contrastive_loss(*forward.features, ids, forward.counts, temperature)
        return Outcome(loss, {"loss": loss, "temperature": temperature})
    theirs = jax.lax.stop_gradient(forward.teacher.features)
    loss = momentum_contrastive_loss(forward.features, theirs, ids, forward.queue, temperature, forward.alpha)
    return Outcome(loss, {"loss": loss, "temperature": temperature}, forward.queue.push(*theirs, ids))
