"""Universal layers: BERT's last S layers, whose self attention and MLP serve text and vision alike.

Text passes through them as through ordinary layers. Vision enters with learnable latents: they first gather from the
visual tokens, then the visual tokens attend to them, so that a video's tokens meet text's weights at the cost of K = 50
queries everywhere but in the last layer.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from mplug2_jax.model.config import ModelConfig
from mplug2_jax.model.layers import (
    BERT_EPS,
    BertLayer,
    LayerNorm,
    dropout,
    make_param,
    scan_layers,
    slice_layers,
    split_rng,
    stack_layers,
)  # fmt: skip
from mplug2_jax.model.taps import Taps, tap
from mplug2_jax.parallel.sharding import constrain, gather_param


class UniversalLayers(nnx.Module):
    """The shared layers; with ``visual`` also what only vision uses: latents, cross attention, the closing norm."""

    def __init__(self, config: ModelConfig, *, visual: bool, rngs: nnx.Rngs) -> None:
        self.layers = stack_layers(lambda r: BertLayer(config, cross=visual, rngs=r), config.universal_layers, rngs)
        if visual:
            init = nnx.initializers.normal(1.0)
            self.latents = make_param(rngs, init, (config.num_latents, config.width), ("latent", "embed"))
            self.visual_norm = LayerNorm(config.width, BERT_EPS, rngs=rngs)
        self.config = config

    @jax.named_scope("universal")
    def text(
        self,
        x: Float[Array, "b l d"],
        mask: Bool[Array, "b l"],
        *,
        rng: PRNGKeyArray | None = None,
        taps: Taps | None = None,
    ) -> Float[Array, "b l d"]:
        """Text mode: self attention and MLP only."""

        def body(layer: BertLayer, x: Array, key: PRNGKeyArray | None, _extra: None) -> tuple[Array, None]:
            return constrain(layer(x, mask, rng=key), "batch", None, None), None

        return scan_layers(
            self.layers, x, body, rng=rng, remat=self.config.remat.text, unroll=self.config.scan_unroll, taps=taps,
            name="universal/text",
        )[0]  # fmt: skip

    @jax.named_scope("universal")
    def visual(
        self,
        v: Float[Array, "b s d"],
        *,
        rng: PRNGKeyArray | None = None,
        taps: Taps | None = None,
    ) -> Float[Array, "b s d"]:
        """Visual mode: latents gather from ``v`` in every layer but the last, where ``v`` attends to the latents.

        The unprocessed ``v`` is what every layer reads; the residual around the whole stack is added here, normalised.
        With a single universal layer ``v`` attends to the raw latents.
        """
        depth = self.config.universal_layers
        keys = split_rng(rng, depth + 1)
        latents = gather_param(self.latents[...], ("latent", "embed")).astype(v.dtype)
        latents = constrain(jnp.broadcast_to(latents, (v.shape[0], *latents.shape)), "batch", None, None)
        for i in range(depth - 1):
            latents = constrain(self._run(i, latents, v, "memory", keys[i]), "batch", None, None)
            tap(taps, f"universal/visual{i}", latents)
        out = self._run(depth - 1, v, latents, "x", keys[depth - 1])
        tap(taps, f"universal/visual{depth - 1}", out)
        return constrain(dropout(self.visual_norm(v + out), self.config.dropout, keys[depth]), "batch", "visual", None)

    def _run(
        self, index: int, x: Array, memory: Array, visual: Literal["x", "memory"], rng: PRNGKeyArray | None
    ) -> Array:
        """One layer of the stack; layers play different roles, so they are not scanned."""

        def body(layer: BertLayer, x: Array, key: PRNGKeyArray | None, _extra: None) -> tuple[Array, None]:
            return layer(x, None, memory, rng=key, visual=visual), None

        one = slice_layers(self.layers, slice(index, index + 1))
        return scan_layers(one, x, body, rng=rng, remat=self.config.remat.text)[0]
