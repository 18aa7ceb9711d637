"""mPLUG-2 as a composition of parts, and the model definition that training and inference use.

A model is a :class:`ModelDef` (its layers) and a plain nested dict of float32 arrays (its parameters). Inside a
compiled function the two are bound to an :class:`Mplug2`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt8

from mplug2_jax.model.config import ModelConfig, check_parts
from mplug2_jax.model.decoder import Decoder
from mplug2_jax.model.fusion import Fusion
from mplug2_jax.model.heads import ClassHead, ContrastiveHead
from mplug2_jax.model.layers import BERT_EPS, LayerNorm, Linear, dropout, split_rng, uniform_fan_in
from mplug2_jax.model.taps import Taps, tap
from mplug2_jax.model.text import MlmHead, TextEncoder
from mplug2_jax.model.universal import UniversalLayers
from mplug2_jax.model.vision import VisionTower, normalize_pixels
from mplug2_jax.parallel.sharding import constrain

Params = dict[str, Any]
Frames = UInt8[Array, "b t y x 3"] | Float[Array, "b t y x 3"]


class VisionProjection(nnx.Module):
    """Projection of visual tokens to the model's width, where the tower's width differs."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        init = uniform_fan_in(config.vision_width)  # as in the release: torch's default
        self.dense = Linear(
            config.vision_width, config.width, ("embed", "mlp"), dtype=config.dtype, kernel_init=init, bias_init=init,
            rngs=rngs,
        )  # fmt: skip
        self.norm = LayerNorm(config.width, BERT_EPS, rngs=rngs)
        self.dropout = config.dropout

    @jax.named_scope("vision_projection")
    def __call__(self, x: Float[Array, "b s w"], rng: PRNGKeyArray | None) -> Float[Array, "b s d"]:
        """Project and normalize."""
        return dropout(self.norm(self.dense(x)), self.dropout, rng)


class Mplug2(nnx.Module):
    """Selected parts of the model, and the paths through them. Parts that are not selected have no parameters."""

    def __init__(self, config: ModelConfig, parts: tuple[str, ...], *, rngs: nnx.Rngs) -> None:
        check_parts(parts, config)
        if "vision" in parts:
            self.vision = VisionTower(config, temporal="temporal" in parts, rngs=rngs)
            if config.vision_width != config.width:
                self.vision_projection = VisionProjection(config, rngs=rngs)
        if "text" in parts:
            self.text = TextEncoder(config, rngs=rngs)
        if "universal" in parts:
            self.universal = UniversalLayers(config, visual="vision" in parts, rngs=rngs)
        if "fusion" in parts:
            self.fusion = Fusion(config, rngs=rngs)
        if "decoder" in parts:
            self.decoder = Decoder(config, rngs=rngs)
        if "mlm" in parts:
            self.mlm = MlmHead(config, rngs=rngs)
        if "contrastive" in parts:
            self.contrastive = ContrastiveHead(config, rngs=rngs)
        if "matching" in parts:
            self.matching = ClassHead(config, 2, rngs=rngs)
        if "classifier" in parts:
            self.classifier = ClassHead(config, config.num_classes, rngs=rngs)
        self.config, self.parts = config, parts

    def encode_visual(
        self, frames: Frames, *, rng: PRNGKeyArray | None = None, taps: Taps | None = None
    ) -> Float[Array, "b s d"]:
        """Encode images (t = 1) or video clips to visual tokens [b, 1 + t*n, d], including any universal layers.

        uint8 frames are normalized here, on the device; float frames must be normalized already.
        """
        rng_tower, rng_projection, rng_universal = split_rng(rng, 3)
        if frames.dtype == jnp.uint8:
            frames = normalize_pixels(frames)
        v = self.vision(frames, rng=rng_tower, taps=taps)
        if self.config.vision_width != self.config.width:
            v = constrain(self.vision_projection(v, rng_projection), "batch", "visual", None)
        tap(taps, "visual/in", v)
        if "universal" in self.parts:
            v = self.universal.visual(v, rng=rng_universal, taps=taps)
        tap(taps, "visual/out", v)
        return v

    def encode_text(
        self, ids: Int[Array, "b l"], mask: Bool[Array, "b l"], *, rng: PRNGKeyArray | None = None,
        taps: Taps | None = None,
    ) -> Float[Array, "b l d"]:  # fmt: skip
        """Encode token ids to text tokens, including any universal layers."""
        rng_text, rng_universal = split_rng(rng, 2)
        x = self.text(ids, mask, rng=rng_text, taps=taps)
        if "universal" in self.parts:
            x = self.universal.text(x, mask, rng=rng_universal, taps=taps)
        tap(taps, "text/out", x)
        return x

    def mlm_logits(self, tokens: Float[Array, "b l d"]) -> Float[Array, "b l v"]:
        """Compute logits over the vocabulary at every text token."""
        return self.mlm(tokens, self.text.embeddings.words[...])


@dataclasses.dataclass(frozen=True)
class ModelDef:
    """Structure of a model, without parameter values."""

    config: ModelConfig
    parts: tuple[str, ...]
    shapes: Params  # tree of jax.ShapeDtypeStruct
    logical_axes: Params  # tree of tuples of names, one per dimension
    graphdef: Any

    def init(self, key: PRNGKeyArray) -> Params:
        """Initialize parameters. Under ``jax.jit`` with output shardings each device initializes its shards only."""
        with nnx.use_eager_sharding(False):
            return params_to_dict(Mplug2(self.config, self.parts, rngs=nnx.Rngs(params=key)))

    def bind(self, params: Params) -> Mplug2:
        """Bind parameters to a model, for use inside a compiled function."""
        model: Mplug2 = nnx.merge(self.graphdef, params)
        return model

    def with_precision(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that computes its matmuls, and those of its gradient, in the config's precision.

        TPUs round operands of float32 matmuls to bfloat16 by default, GPUs to TF32. Use it around what is compiled.
        """
        precision = self.config.matmul_precision
        if precision == "default":
            return fn  # the environment may set another: JAX_DEFAULT_MATMUL_PRECISION
        return jax.default_matmul_precision(precision)(fn)

    def num_params(self) -> int:
        """Return the number of parameters."""
        return sum(s.size for s in jax.tree.leaves(self.shapes))


def params_to_dict(model: nnx.Module) -> Params:
    """Return a module's parameters as a plain nested dict of arrays."""
    params: Params = nnx.to_pure_dict(nnx.as_pure(nnx.state(model, nnx.Param)))
    return params


@functools.lru_cache(maxsize=64)  # abstract construction takes seconds, and commands repeat it
def define_model(config: ModelConfig, parts: tuple[str, ...]) -> ModelDef:
    """Define a model from its config and parts without allocating arrays. The result is cached: do not modify it.

    Raises:
        UserError: parts that do not make a model.
    """
    init: Callable[[Any], Mplug2] = lambda key: Mplug2(config, parts, rngs=nnx.Rngs(params=key))  # noqa: E731
    with nnx.use_eager_sharding(False):
        abstract = nnx.eval_shape(init, jax.eval_shape(lambda: jax.random.key(0)))
        graphdef, state = nnx.split(abstract, nnx.Param)
    logical_axes = jax.tree.map(
        lambda v: tuple(v.get_metadata("out_sharding")), nnx.to_pure_dict(state, lambda v: v), is_leaf=_is_variable
    )
    return ModelDef(config, parts, params_to_dict(abstract), logical_axes, graphdef)


def _is_variable(x: Any) -> bool:
    return isinstance(x, nnx.Variable)
