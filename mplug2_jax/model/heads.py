"""Small heads on top of the towers: contrast, matching, classification."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from mplug2_jax.model.config import ModelConfig
from mplug2_jax.model.layers import Linear, kernel_init, make_param


class ContrastiveHead(nnx.Module):
    """Projections of both modalities onto one unit sphere, and the temperature that divides their similarities."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        def make_projection() -> Linear:
            return Linear(
                config.width, config.contrastive_width, ("embed", "feature"), dtype="float32",
                kernel_init=kernel_init(config), rngs=rngs,
            )  # fmt: skip

        self.visual, self.text = make_projection(), make_projection()
        self.temperature = make_param(rngs, nnx.initializers.constant(0.07), (), ())

    @jax.named_scope("contrastive")
    def visual_features(self, tokens: Float[Array, "b s d"]) -> Float[Array, "b e"]:
        """Return unit vectors of images or video clips, from visual token 0."""
        return l2_normalize(self.visual(tokens[:, 0].astype(jnp.float32)))

    @jax.named_scope("contrastive")
    def text_features(self, tokens: Float[Array, "b l d"]) -> Float[Array, "b e"]:
        """Return unit vectors of texts, from [CLS]."""
        return l2_normalize(self.text(tokens[:, 0].astype(jnp.float32)))


def l2_normalize(x: Float[Array, "b e"]) -> Float[Array, "b e"]:
    """Scale each row to unit length."""
    # Clamping the squared norm (norm >= 1e-12, as torch's normalize) also keeps the gradient finite at 0.
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, -1, keepdims=True), 1e-24))


class ClassHead(nnx.Module):
    """Linear classifier on the first token, in float32, without dropout."""

    def __init__(self, config: ModelConfig, classes: int, *, rngs: nnx.Rngs) -> None:
        init = kernel_init(config)
        self.dense = Linear(config.width, classes, ("embed", "class"), dtype="float32", kernel_init=init, rngs=rngs)

    @jax.named_scope("class_head")
    def __call__(self, tokens: Float[Array, "b l d"]) -> Float[Array, "b c"]:
        """Return the logits of each class."""
        return self.dense(tokens[:, 0].astype(jnp.float32))
