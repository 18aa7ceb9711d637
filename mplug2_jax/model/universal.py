"""Universal layers: BERT's last S layers, whose self attention and MLP are shared by text and vision.

Text passes through them as through ordinary layers. Vision uses learnable latents: the latents attend to the visual
tokens in all layers but the last, where the visual tokens attend to the latents. So a video's tokens share text's
weights at the cost of K = 50 queries in all layers but the last.
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
    """Shared layers; with ``visual`` also the vision-only parameters: latents, cross attention and the final norm."""

    def __init__(self, config: ModelConfig, *, visual: bool, rngs: nnx.Rngs) -> None:
        self.layers = stack_layers(lambda r: BertLayer(config, cross=visual, rngs=r), config.universal_layers, rngs)
        if visual:
            init = nnx.initializers.normal(1.0)
            self.latents = make_param(rngs, init, (config.num_latents, config.width), ("latent", "embed"))
            self.visual_norm = LayerNorm(config.width, BERT_EPS, rngs=rngs)
        self.config = config

    @jax.named_scope("universal")
    def text(
        self, x: Float[Array, "b l d"], mask: Bool[Array, "b l"], *, rng: PRNGKeyArray | None = None,
        taps: Taps | None = None,
    ) -> Float[Array, "b l d"]:  # fmt: skip
        """Apply the layers to text: self attention and MLP only."""

        def body(layer: BertLayer, x: Array, key: PRNGKeyArray | None, _extra: None) -> tuple[Array, None]:
            return constrain(layer(x, mask, rng=key), "batch", None, None), None

        return scan_layers(
            self.layers, x, body, rng=rng, remat=self.config.remat.text, unroll=self.config.scan_unroll, taps=taps,
            name="universal/text",
        )[0]  # fmt: skip

    @jax.named_scope("universal")
    def visual(
        self, v: Float[Array, "b s d"], *, rng: PRNGKeyArray | None = None, taps: Taps | None = None
    ) -> Float[Array, "b s d"]:
        """Apply the layers to visual tokens: latents attend to ``v``; in the last layer ``v`` attends to the latents.

        Every layer reads the input ``v``; a normalized residual spans the whole stack. With a single universal layer
        ``v`` attends to the learned latents themselves.
        """
        depth = self.config.universal_layers
        keys = split_rng(rng, depth + 1)
        latents = gather_param(self.latents[...], ("latent", "embed")).astype(v.dtype)
        latents = constrain(jnp.broadcast_to(latents, (v.shape[0], *latents.shape)), "batch", None, None)
        for i in range(depth - 1):
            latents = constrain(self._apply_layer(i, latents, v, "memory", keys[i]), "batch", None, None)
            tap(taps, f"universal/visual{i}", latents)
        out = self._apply_layer(depth - 1, v, latents, "x", keys[depth - 1])
        tap(taps, f"universal/visual{depth - 1}", out)
        return constrain(dropout(self.visual_norm(v + out), self.config.dropout, keys[depth]), "batch", "visual", None)

    def _apply_layer(
        self, index: int, x: Array, memory: Array, visual: Literal["x", "memory"], rng: PRNGKeyArray | None
    ) -> Array:
        """Apply one layer of the stack; layers have different roles, so they are not scanned."""

        def body(layer: BertLayer, x: Array, key: PRNGKeyArray | None, _extra: None) -> tuple[Array, None]:
            return layer(x, None, memory, rng=key, visual=visual), None

        layer = slice_layers(self.layers, slice(index, index + 1))
        return scan_layers(layer, x, body, rng=rng, remat=self.config.remat.text)[0]
