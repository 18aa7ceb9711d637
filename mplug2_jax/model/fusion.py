"""Fusion: text attends to itself, then to visual tokens; every stride-th layer may be joint self attention."""

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
    """Return the indices of the joint attention layers: every stride-th except the first; none with stride 0."""
    return tuple(j for j in range(1, depth) if j % stride == 0) if stride else ()


class Fusion(nnx.Module):
    """Two stacks: cross attention to visual tokens, and joint attention over both streams (none in released sizes)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        num_joint = len(joint_attention_layers(config.fusion_layers, config.fusion_stride))
        num_cross = config.fusion_layers - num_joint
        self.layers = stack_layers(lambda r: BertLayer(config, cross=True, rngs=r), num_cross, rngs)
        if num_joint:  # "mixing" is a key of the parameter tree
            self.mixing = stack_layers(lambda r: BertLayer(config, cross=False, rngs=r), num_joint, rngs)
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
        """Return the visual stream (changed by joint layers only, and then one per text) and the fused text."""
        config = self.config
        joint = joint_attention_layers(config.fusion_layers, config.fusion_stride)
        if joint:
            visual = jnp.repeat(visual, text.shape[0] // visual.shape[0], axis=0)
        bounds = [-1, *joint, config.fusion_layers]
        keys = split_rng(rng, 2 * len(bounds))
        num_done = 0  # cross attention layers
        for i, (joint_layer, stop) in enumerate(itertools.pairwise(bounds)):
            if joint_layer >= 0:
                visual, text = self._joint_attention(
                    slice_layers(self.mixing, i - 1), visual, text, text_mask, keys[2 * i]
                )
                tap(taps, f"fusion/layer{joint_layer}", text)
            count = stop - joint_layer - 1
            if count:
                layers = slice_layers(self.layers, slice(num_done, num_done + count))
                text = self._cross_attention(layers, visual, text, text_mask, keys[2 * i + 1], taps, joint_layer + 1)
                num_done += count
        return visual, text

    def _cross_attention(
        self,
        layers: BertLayer,
        visual: Array,
        text: Array,
        text_mask: Array,
        rng: PRNGKeyArray | None,
        taps: Taps | None,
        first_layer: int,
    ) -> Array:
        def body(layer: BertLayer, x: Array, key: PRNGKeyArray | None, _extra: None) -> tuple[Array, None]:
            return constrain(layer(x, text_mask, visual, rng=key, visual="memory"), "batch", None, None), None

        return scan_layers(
            layers, text, body, rng=rng, remat=self.config.remat.fusion, unroll=self.config.scan_unroll, taps=taps,
            name=f"fusion/layers_from{first_layer}",
        )[0]  # fmt: skip

    @staticmethod
    def _joint_attention(
        layer: BertLayer, visual: Array, text: Array, text_mask: Array, rng: PRNGKeyArray | None
    ) -> tuple[Array, Array]:
        """Apply self attention over both; as in the release, the output is added to visual tokens but replaces text."""
        num_visual = visual.shape[1]
        mask = jnp.concatenate([jnp.ones(visual.shape[:2], bool), text_mask], axis=1)
        both = layer(
            constrain(jnp.concatenate([visual, text], axis=1), "batch", "visual", None), mask, rng=rng, visual="x"
        )
        return constrain(visual + both[:, :num_visual], "batch", "visual", None), constrain(
            both[:, num_visual:], "batch", None, None
        )
