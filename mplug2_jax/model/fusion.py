"""Fusion: text attends to itself, then to the visual tokens; every stride-th layer may mix the two in one attention."""

import itertools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from mplug2_jax.model.config import ModelConfig
from mplug2_jax.model.layers import BertLayer, scan_layers, slice_layers, split_rng, stack_layers
from mplug2_jax.model.taps import Taps, tap
from mplug2_jax.parallel.sharding import constrain


def joint_attention_layers(depth: int, stride: int) -> tuple[int, ...]:
    """Indices of the layers that mix: every stride-th but the first. With stride 0, none."""
    return tuple(j for j in range(1, depth) if j % stride == 0) if stride else ()


class Fusion(nnx.Module):
    """Two stacks: layers that read the visual tokens, and layers that mix both streams (none in released sizes)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        mixing = len(joint_attention_layers(config.fusion_layers, config.fusion_stride))
        reading = config.fusion_layers - mixing
        self.layers = stack_layers(lambda r: BertLayer(config, cross=True, rngs=r), reading, rngs)
        if mixing:
            self.mixing = stack_layers(lambda r: BertLayer(config, cross=False, rngs=r), mixing, rngs)
        self.config = config

    @jax.named_scope("fusion")
    def __call__(
        self,
        text: Float[Array, "br l d"],
        text_mask: Bool[Array, "br l"],
        visual: Float[Array, "b s d"],
        *,
        rng: PRNGKeyArray | None = None,
        taps: Taps | None = None,
    ) -> tuple[Float[Array, "bv s d"], Float[Array, "br l d"]]:
        """Returns the visual stream (changed by mixing layers only, and then one for each text) and the fused text."""
        config = self.config
        mixing = joint_attention_layers(config.fusion_layers, config.fusion_stride)
        if mixing:
            visual = jnp.repeat(visual, text.shape[0] // visual.shape[0], axis=0)
        bounds = [-1, *mixing, config.fusion_layers]
        keys = split_rng(rng, 2 * len(bounds))
        read = 0
        for i, (last, stop) in enumerate(itertools.pairwise(bounds)):
            if last >= 0:
                visual, text = self._mix(slice_layers(self.mixing, i - 1), visual, text, text_mask, keys[2 * i])
                tap(taps, f"fusion/layer{last}", text)
            count = stop - last - 1
            if count:
                layers = slice_layers(self.layers, slice(read, read + count))
                text = self._read(layers, visual, text, text_mask, keys[2 * i + 1], taps, last + 1)
                read += count
        return visual, text

    def _read(
        self,
        layers: BertLayer,
        visual: Array,
        text: Array,
        text_mask: Array,
        rng: PRNGKeyArray | None,
        taps: Taps | None,
        first: int,
    ) -> Array:
        def body(layer: BertLayer, x: Array, key: PRNGKeyArray | None, _extra: None) -> tuple[Array, None]:
            return constrain(layer(x, text_mask, visual, rng=key, visual="memory"), "batch", None, None), None

        return scan_layers(
            layers, text, body, rng=rng, remat=self.config.remat.fusion, unroll=self.config.scan_unroll, taps=taps,
            name=f"fusion/layers_from{first}",
        )[0]  # fmt: skip

    @staticmethod
    def _mix(
        layer: BertLayer, visual: Array, text: Array, text_mask: Array, rng: PRNGKeyArray | None
    ) -> tuple[Array, Array]:
        """One self attention over both; as in the release, the image's part is added to it, the text's replaces it."""
        cut = visual.shape[1]
        mask = jnp.concatenate([jnp.ones(visual.shape[:2], bool), text_mask], axis=1)
        both = layer(
            constrain(jnp.concatenate([visual, text], axis=1), "batch", "visual", None), mask, rng=rng, visual="x"
        )
        return constrain(visual + both[:, :cut], "batch", "visual", None), constrain(both[:, cut:], "batch", None, None)
