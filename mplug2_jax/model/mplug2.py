"""The composition: mPLUG-2 as a set of parts, and the definition that the rest of the stack handles.

A model that trains is three things: a :class:`ModelDef` (which layers there are), a plain nested dict of float32 arrays
(its parameters) and, inside a compiled function, the two bound together as a :class:`Mplug2`.
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
    """Carries visual tokens to the model's width where the tower has another one."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        init = uniform_fan_in(config.vision_width)  # outside the BERT classes of the release: torch's default
        self.dense = Linear(
            config.vision_width, config.width, ("embed", "mlp"), dtype=config.dtype, kernel_init=init, bias_init=init,
            rngs=rngs,
        )  # fmt: skip
        self.norm = LayerNorm(config.width, BERT_EPS, rngs=rngs)
        self.dropout = config.dropout

    @jax.named_scope("vision_projection")
    def __call__(self, x: Float[Array, "b s w"], rng: PRNGKeyArray | None) -> Float[Array, "b s d"]:
        """Projects and normalises."""
        return dropout(self.norm(self.dense(x)), self.dropout, rng)


class Mplug2(nnx.Module):
    """The parts that a task chose, and the paths through them. What was not chosen does not exist."""

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
        """Images (t = 1) or clips -> visual tokens [b, 1 + t*n, d], through the universal layers if there are any.

        Bytes are normalised here, on the device; float frames are taken as normalised already.
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
        self,
        ids: Int[Array, "b l"],
        mask: Bool[Array, "b l"],
        *,
        rng: PRNGKeyArray | None = None,
        taps: Taps | None = None,
    ) -> Float[Array, "b l d"]:
        """Token ids -> text tokens, through the universal layers if there are any."""
        rng_text, rng_universal = split_rng(rng, 2)
        x = self.text(ids, mask, rng=rng_text, taps=taps)
        if "universal" in self.parts:
            x = self.universal.text(x, mask, rng=rng_universal, taps=taps)
        tap(taps, "text/out", x)
        return x

    def mlm_logits(self, tokens: Float[Array, "b l d"]) -> Float[Array, "b l v"]:
        """Logits over the vocabulary at every text token."""
        return self.mlm(tokens, self.text.embeddings.words[...])


@dataclasses.dataclass(frozen=True)
class ModelDef:
    """What a model is made of, without its numbers."""

    config: ModelConfig
    parts: tuple[str, ...]
    shapes: Params  # of jax.ShapeDtypeStruct
    axes: Params  # of tuples of logical axis names, one name for each dimension
    graphdef: Any

    def init(self, key: PRNGKeyArray) -> Params:
        """Fresh parameters. Pure: under ``jax.jit`` with output shardings each shard is made where it lives."""
        with nnx.use_eager_sharding(False):
            return params_to_dict(Mplug2(self.config, self.parts, rngs=nnx.Rngs(params=key)))

    def bind(self, params: Params) -> Mplug2:
        """The live model, to be called inside a compiled function."""
        model: Mplug2 = nnx.merge(self.graphdef, params)
        return model

    def num_params(self) -> int:
        """Number of parameters."""
        return sum(s.size for s in jax.tree.leaves(self.shapes))


def params_to_dict(model: nnx.Module) -> Params:
    """The parameters of a module as a plain nested dict of arrays."""
    params: Params = nnx.to_pure_dict(nnx.as_pure(nnx.state(model, nnx.Param)))
    return params


@functools.lru_cache(maxsize=64)  # its layers are built, abstractly, for seconds; commands describe a model repeatedly
def define_model(config: ModelConfig, parts: tuple[str, ...]) -> ModelDef:
    """Describes a model abstractly; no array is made. The description is shared: it is not to be changed.

    Raises:
        UserError: parts that do not make a model.
    """
    make: Callable[[Any], Mplug2] = lambda key: Mplug2(config, parts, rngs=nnx.Rngs(params=key))  # noqa: E731
    with nnx.use_eager_sharding(False):
        abstract = nnx.eval_shape(make, jax.eval_shape(lambda: jax.random.key(0)))
        graphdef, state = nnx.split(abstract, nnx.Param)
    axes = jax.tree.map(
        lambda v: tuple(v.get_metadata("out_sharding")), nnx.to_pure_dict(state, lambda v: v), is_leaf=_is_variable
    )
    return ModelDef(config, parts, params_to_dict(abstract), axes, graphdef)


def _is_variable(x: Any) -> bool:
    return isinstance(x, nnx.Variable)
