"""Vision-language matching: does this text belong to this picture? Trained on hard negatives.

Negatives are drawn within fixed groups of the global batch, by the contrastive similarities: so no token sequence
crosses the interconnect, and the draw is the same on any mesh.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from mplug2_jax.objectives.config import VlmConfig
from mplug2_jax.objectives.forward import ForwardPass, LossOutput, label_cross_entropy, weighted_mean

Features = tuple[Float[Array, "b e"], Float[Array, "b e"]]  # (visual, text), unit vectors


def hard_negatives(
    features: Features,
    candidates: Features,
    ids: Int[Array, " b"],
    counts: Float[Array, " b"],
    temperature: Float[Array, ""],
    group: int,
    rng: PRNGKeyArray | None,
) -> tuple[Int[Array, "g n"], Int[Array, "g n"], Bool[Array, "g n"]]:
    """For each text a wrong picture, for each picture a wrong text: (indices inside the group) x 2, and whether any.

    Drawn in proportion to softmax(similarity / temperature) among examples with another id; without a key, the most
    similar one. ``candidates`` are the features to be drawn from: a momentum teacher's, or the same.
    """
    names, valid = ids.reshape(-1, group), counts.reshape(-1, group) > 0
    wrong = (names[:, :, None] != names[:, None, :]) & valid[:, :, None] & valid[:, None, :]

    def draw(own: Array, others: Array, key: PRNGKeyArray | None) -> Int[Array, "g n"]:
        own, others = (x.reshape(-1, group, x.shape[-1]) for x in (own, others))
        scores = jnp.where(wrong, jnp.einsum("gie,gje->gij", own, others) / temperature, -jnp.inf)
        return jnp.argmax(scores, -1) if key is None else jax.random.categorical(key, scores)

    keys = (None, None) if rng is None else tuple(jax.random.split(rng))
    wrong_picture = draw(features[1], candidates[0], keys[0])
    return wrong_picture, draw(features[0], candidates[1], keys[1]), wrong.any(-1)


def gather_in_group(x: Array, index: Int[Array, "g n"]) -> Array:
    """Rows of ``x`` [g*n, ...] chosen inside each group, by a one-hot product: exact, and local to the group."""
    groups, size = index.shape
    chosen = jax.nn.one_hot(index, size, dtype=jnp.float32 if x.dtype == jnp.bool_ else x.dtype)
    grouped = x.reshape(groups, size, *x.shape[1:]).astype(chosen.dtype)
    rows = jnp.einsum("gij,gj...->gi...", chosen, grouped, precision=jax.lax.Precision.HIGHEST)
    return rows.reshape(x.shape).astype(x.dtype)


def vlm_loss(forward: ForwardPass, config: VlmConfig, smoothing: float = 0.0) -> LossOutput:
    """Two-way cross entropy over one true pair, one wrong picture and one wrong text per example."""
    model, batch = forward.model, forward.batch
    text, mask, visual = forward.text, batch["text_mask"], forward.visual
    group = config.group_size or text.shape[0]
    features, temperature = jax.lax.stop_gradient((forward.features, model.contrastive.temperature[...]))
    candidates = features if forward.teacher is None else jax.lax.stop_gradient(forward.teacher.features)
    wrong_picture, wrong_text, exists = hard_negatives(
        features, candidates, batch["example_id"], forward.example_weights, temperature, group,
        forward.key("vlm/negatives"),
    )  # fmt: skip

    # The true and the wrong text of a picture are two sequences over one memory; interleaved, they stay where it is.
    both = jnp.stack([text, gather_in_group(text, wrong_text)], axis=1).reshape(-1, *text.shape[1:])
    both_masks = jnp.stack([mask, gather_in_group(mask, wrong_text)], axis=1).reshape(-1, mask.shape[1])
    _, fused = model.fusion(both, both_masks, visual, rng=forward.key("vlm/texts"))
    by_text = model.matching(fused).reshape(-1, 2, 2)
    _, fused = model.fusion(text, mask, gather_in_group(visual, wrong_picture), rng=forward.key("vlm/picture"))
    logits = jnp.concatenate([by_text, model.matching(fused)[:, None]], axis=1)  # [b, (true, text, picture), 2]

    labels = jnp.asarray([1, 0, 0])
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    losses = label_cross_entropy(log_probs, jnp.broadcast_to(labels, logits.shape[:2]), smoothing)
    usable = jnp.stack([jnp.ones_like(exists), exists, exists], axis=-1).reshape(-1, 3)
    weights = usable * forward.example_weights[:, None]
    loss = weighted_mean(losses, weights)
    hit = (jnp.argmax(logits, -1) == labels).astype(jnp.float32)
    return LossOutput(loss, {"loss": loss, "accuracy": weighted_mean(hit, weights)})
