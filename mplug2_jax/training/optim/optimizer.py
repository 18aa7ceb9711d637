"""AdamW and Muon with the release's parameter groups: {vision, others} x {decayed, not decayed}."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mplug2_jax.training.config import DecayMask, Dtype, OptimizerConfig
from mplug2_jax.training.optim.layer_decay import LAYERS
from mplug2_jax.training.optim.partition import LORA_KEY

MUON_RMS = 0.2
"""Root mean square of Muon's updates before the learning rate: what AdamW's have in practice (arXiv 2502.16982)."""


def is_vision(path: tuple[str, ...]) -> bool:
    """Return whether a parameter belongs to the vision tower, which has its own learning rate."""
    return path[0] == "vision"


def is_linear(path: tuple[str, ...]) -> bool:
    """Return whether a parameter is the kernel of a linear map; those of the temporal units' convolutions are not."""
    return path[-1] == "kernel" and len(path) > 1 and not path[-2].startswith("temporal_")


def is_decayed(path: tuple[str, ...], mask: DecayMask) -> bool:
    """Return whether weight decay acts on a parameter.

    ``kernels``: on the kernels of linear maps and their LoRA adapters alone. ``released``: on everything but biases and
    BERT's LayerNorm scales, because the release looks for the substrings "bias" and "LayerNorm.weight" in names; so
    CLIP's norms, the norms around the visual stream, latents and all embeddings are decayed.
    """
    if mask == "kernels":
        return is_linear(path) or LORA_KEY in path
    visual_norms = path[0] in ("vision", "vision_projection") or path[:2] == ("universal", "visual_norm")
    return path[-1] != "bias" and (path[-1] != "scale" or visual_norms)


def is_orthogonalized(path: tuple[str, ...]) -> bool:
    """Return whether Muon orthogonalizes a parameter's update: a kernel of a layer, [layers, i, o]."""
    return is_linear(path) and path[1] in LAYERS


def scale_by_adam(
    b1: float, b2: float, eps: float, mu_dtype: Dtype = "float32", nu_dtype: Dtype = "float32"
) -> optax.GradientTransformation:
    """Return Adam's transformation with optax's state, and bias corrections that are exact in float32.

    Moments are stored in the given dtypes; the arithmetic, that of their first step included, is float32.

    optax forms ``1 - b2**t`` in float32, which is off by 5e-5 in the first step (0.999 has no exact neighbour there);
    ``-expm1(t log b2)`` is not, and the release's losses after a step are met to 2e-6 instead of 4e-5.
    """
    cast = optax.tree.cast

    def init(params: optax.Params) -> optax.OptState:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), cast(zeros, mu_dtype), cast(zeros, nu_dtype))

    def update(
        gradients: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        del params
        assert isinstance(state, optax.ScaleByAdamState)
        old_mu, old_nu = cast(state.mu, "float32"), cast(state.nu, "float32")
        mu = jax.tree.map(lambda m, g: b1 * m + (1.0 - b1) * g, old_mu, gradients)
        nu = jax.tree.map(lambda v, g: b2 * v + (1.0 - b2) * g * g, old_nu, gradients)
        count = state.count + 1
        mu_scale, nu_scale = -jnp.expm1(count * math.log(b1)), -jnp.expm1(count * math.log(b2))
        direction = jax.tree.map(lambda m, v: (m / mu_scale) / (jnp.sqrt(v / nu_scale) + eps), mu, nu)
        return direction, optax.ScaleByAdamState(count, cast(mu, mu_dtype), cast(nu, nu_dtype))

    return optax.GradientTransformation(init, update)


def scale_by_muon(config: OptimizerConfig) -> optax.GradientTransformation:
    """Return Muon's transformation of kernels [*layers, i, o], each matrix on its own.

    The moment is orthogonalized by five Newton-Schulz iterations, which bring most of its singular values to 0.7 to
    1.2, and scaled to AdamW's RMS: an orthogonal [i, o] has 1 / sqrt(max(i, o)).

    Moments and iterates are float32 between products, as the small singular values grow 480-fold; the products
    themselves have ``config.model.matmul_precision``, which on TPUs is bfloat16 by default, as Muon was published.
    """

    def scale(updates: optax.Updates, _: optax.Params | None) -> optax.Updates:
        return jax.tree.map(lambda u: u * (MUON_RMS * math.sqrt(max(u.shape[-2:]))), updates)

    def dimensions(params: optax.Params) -> Any:
        return jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(-2, -1), params)

    muon = optax.contrib.scale_by_muon(
        beta=config.muon_momentum, eps=config.eps, mu_dtype=config.mu_dtype, weight_dimension_numbers=dimensions
    )
    return optax.chain(muon, optax.stateless(scale))


def clip_by_global_norm(limit: float) -> optax.GradientTransformation:
    """Return a transformation that scales gradients down to a global norm, by one factor that fuses into the update."""

    def clip(gradients: optax.Updates, _: optax.Params | None) -> optax.Updates:
        factor = jnp.minimum(1.0, limit / jnp.maximum(optax.tree.norm(gradients), 1e-12))
        return jax.tree.map(lambda g: g * factor, gradients)

    return optax.stateless(clip)


def scale_by_tree(scales: optax.Params) -> optax.GradientTransformation:
    """Return a transformation that scales each parameter's update by its own factors, which broadcast over it."""
    return optax.stateless(lambda updates, _: jax.tree.map(lambda u, s: u * s, updates, scales))


def make_optimizer(
    config: OptimizerConfig, learning_rate: optax.ScalarOrSchedule, vision_learning_rate: optax.ScalarOrSchedule,
    scales: optax.Params | None = None,
) -> Any:  # fmt: skip
    """Return the optimizer: clipping, Adam or Muon, decoupled weight decay, and a learning rate for the vision tower.

    ``scales`` are each parameter's factors of its learning rate, for the step and the weight decay alike.
    """

    def map_paths(tree: Any, fn: Any) -> Any:  # of parameters, or of optax's placeholder for them
        return jax.tree_util.tree_map_with_path(lambda p, _: fn(tuple(key.key for key in p)), tree)

    step = scale_by_adam(config.b1, config.b2, config.eps, config.mu_dtype, config.nu_dtype)
    if config.kind == "muon":
        step = optax.partition(  # these names are keys of the saved state
            {"muon": scale_by_muon(config), "adam": step},
            lambda p: map_paths(p, lambda path: "muon" if is_orthogonalized(path) else "adam"),
        )
    transforms = [
        step,
        optax.add_decayed_weights(
            config.weight_decay, lambda p: map_paths(p, lambda q: is_decayed(q, config.decay_mask))
        ),
        optax.partition(
            {  # these names are keys of the saved state
                "vision": optax.scale_by_learning_rate(vision_learning_rate),
                "rest": optax.scale_by_learning_rate(learning_rate),
            },
            lambda p: map_paths(p, lambda path: "vision" if is_vision(path) else "rest"),
        ),
    ]
    if config.clip_norm > 0:
        transforms.insert(0, clip_by_global_norm(config.clip_norm))
    if scales is not None:
        transforms.append(scale_by_tree(scales))
    return optax.chain(*transforms)
