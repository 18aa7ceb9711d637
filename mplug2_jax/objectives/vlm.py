"""Vision-language matching (VLM): binary classification of (visual, text) pairs, with hard negatives.

Negatives are sampled within fixed groups of the global batch by contrastive similarity, and are the same on every mesh.
Larger groups have harder negatives. Token sequences cross the network only where a group spans chips.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from mplug2_jax.objectives.config import VlmConfig
from mplug2_jax.objectives.forward import ForwardPass, LossOutput, label_cross_entropy, weighted_mean
from mplug2_jax.objectives.group_gather import gather_in_group
from mplug2_jax.parallel.sharding import constrain

Features = tuple[Float[Array, "b e"], Float[Array, "b e"]]  # (visual, text), unit vectors


def hard_negatives(
    features: Features,
    candidates: Features,
    ids: Int[Array, " b"],
    example_weights: Float[Array, " b"],
    temperature: Float[Array, ""],
    group_size: int,
    rng: PRNGKeyArray | None,
) -> tuple[Int[Array, "g n"], Int[Array, "g n"], Bool[Array, "g n"]]:
    """Sample a negative image for each text and a negative text for each image.

    Negatives are sampled in proportion to softmax(similarity / temperature) among examples with a different id; without
    a key, the most similar one is taken. ``candidates`` are the features of possible negatives: a momentum teacher's,
    or ``features`` again.

    Returns:
        Indices of the images, indices of the texts (both within the group), and whether an example has any negative.
    """
    group_ids, valid = ids.reshape(-1, group_size), example_weights.reshape(-1, group_size) > 0
    is_negative = (group_ids[:, :, None] != group_ids[:, None, :]) & valid[:, :, None] & valid[:, None, :]

    def sample(anchors: Array, candidates: Array, key: PRNGKeyArray | None) -> Int[Array, "g n"]:
        anchors, candidates = (x.reshape(-1, group_size, x.shape[-1]) for x in (anchors, candidates))
        scores = jnp.einsum("gie,gje->gij", anchors, candidates, precision=jax.lax.Precision.HIGHEST)
        scores = jnp.where(is_negative, scores / temperature, -jnp.inf).reshape(-1, group_size)
        scores = constrain(scores, "batch", None)  # each chip has the scores, and draws the noise, of its rows
        index = jnp.argmax(scores, -1) if key is None else jax.random.categorical(key, scores)
        return index.reshape(-1, group_size)

    keys = (None, None) if rng is None else tuple(jax.random.split(rng))
    negative_images = sample(features[1], candidates[0], keys[0])
    return negative_images, sample(features[0], candidates[1], keys[1]), is_negative.any(-1)


def vlm_loss(forward: ForwardPass, config: VlmConfig, smoothing: float = 0.0) -> LossOutput:
    """Compute binary cross entropy over one positive pair, one negative image and one negative text per example."""
    model, batch = forward.model, forward.batch
    text, mask, visual = forward.text, batch["text_mask"], forward.visual
    group_size = config.group_size or text.shape[0]
    features, temperature = jax.lax.stop_gradient((forward.features, model.contrastive.temperature[...]))
    candidates = features if forward.teacher is None else jax.lax.stop_gradient(forward.teacher.features)
    negative_images, negative_texts, has_negative = hard_negatives(
        features, candidates, batch["example_id"], forward.example_weights, temperature, group_size,
        forward.key("vlm/negatives"),
    )  # fmt: skip

    # The positive and the negative text of an image share its memory; interleaved, they stay on its chip.
    texts = jnp.stack([text, gather_in_group(text, negative_texts)], axis=1).reshape(-1, *text.shape[1:])
    masks = jnp.stack([mask, gather_in_group(mask, negative_texts)], axis=1).reshape(-1, mask.shape[1])
    _, fused = model.fusion(texts, masks, visual, rng=forward.key("vlm/texts"))
    text_logits = model.matching(fused).reshape(-1, 2, 2)
    _, fused = model.fusion(
        text, mask, gather_in_group(visual, negative_images, "visual"), rng=forward.key("vlm/picture")
    )
    logits = jnp.concatenate([text_logits, model.matching(fused)[:, None]], axis=1)  # [b, (positive, text, image), 2]

    labels = jnp.asarray([1, 0, 0])
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    losses = label_cross_entropy(log_probs, jnp.broadcast_to(labels, logits.shape[:2]), smoothing)
    usable = jnp.stack([jnp.ones_like(has_negative), has_negative, has_negative], axis=-1).reshape(-1, 3)
    weights = usable * forward.example_weights[:, None]
    loss = weighted_mean(losses, weights)
    correct = (jnp.argmax(logits, -1) == labels).astype(jnp.float32)
    return LossOutput(loss, {"loss": loss, "accuracy": weighted_mean(correct, weights)})
