"""The shared decoder: causal self attention, cross attention to a memory, MLP; an output head tied to its embeddings.

Several sequences may share one memory (the answers to a question, the beams of a clip): ids are [b*r, m], the memory is
[b, s, d], and the memory's keys and values are projected once for all r.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, Shaped

from mplug2_jax.errors import UserError
from mplug2_jax.model.config import ModelConfig
from mplug2_jax.model.layers import BertLayer, scan_layers, split_rng, stack_layers
from mplug2_jax.model.sequence import AttentionSharding
from mplug2_jax.model.taps import Taps, tap
from mplug2_jax.model.text import Embeddings, MlmHead
from mplug2_jax.parallel.sharding import constrain


class DecoderCache(NamedTuple):
    """Keys and values of earlier tokens and of the memory, with a leading layer axis ``i`` for the scan."""

    self_keys: Float[Array, "i br m h k"]
    self_values: Float[Array, "i br m h k"]
    cross_keys: Float[Array, "i b s h k"]
    cross_values: Float[Array, "i b s h k"]
    memory_mask: Bool[Array, "b s"]

    def reorder(self, parents: Int[Array, "b r"]) -> "DecoderCache":
        """Select the parents of each memory's sequences; what belongs to the memory is shared and unchanged."""
        keys, values = (jax.vmap(gather_beams, (0, None))(x, parents) for x in (self.self_keys, self.self_values))
        return self._replace(self_keys=keys, self_values=values)


def gather_beams(x: Shaped[Array, "br *n"], parents: Int[Array, "b r"]) -> Shaped[Array, "br *n"]:
    """Gather rows among the r of each memory, so that none moves to another chip."""
    groups = x.reshape(*parents.shape, *x.shape[1:])
    return jax.vmap(lambda group, rows: group[rows])(groups, parents).reshape(x.shape)


class Decoder(nnx.Module):
    """Embeddings, layers and output head."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        self.embeddings = Embeddings(config, rngs=rngs)
        self.layers = stack_layers(lambda r: BertLayer(config, cross=True, rngs=r), config.decoder_layers, rngs)
        self.head = MlmHead(config, rngs=rngs)
        self.config = config

    @jax.named_scope("decoder")
    def __call__(
        self,
        ids: Int[Array, "br m"],
        mask: Bool[Array, "br m"] | None,
        memory: Float[Array, "b s d"],
        memory_mask: Bool[Array, "b s"] | None = None,
        *,
        rng: PRNGKeyArray | None = None,
        taps: Taps | None = None,
    ) -> Float[Array, "br m v"]:
        """Compute logits with teacher forcing: at every position, for the token after it."""
        rng_embed, rng_layers = split_rng(rng, 2)
        x = constrain(self.embeddings(ids, rng=rng_embed), "batch", None, None)
        memory = constrain(memory, "batch", "visual", None)
        tap(taps, "decoder/embed", x)

        def body(layer: BertLayer, x: Array, key: PRNGKeyArray | None, _extra: None) -> tuple[Array, None]:
            x = layer(x, mask, memory, memory_mask, causal=True, rng=key, visual="memory")
            return constrain(x, "batch", None, None), None

        x, _ = scan_layers(
            self.layers, x, body, rng=rng_layers, remat=self.config.remat.decoder, unroll=self.config.scan_unroll,
            taps=taps, name="decoder/layer",
        )  # fmt: skip
        return self.head(x, self.embeddings.words[...])

    @jax.named_scope("decoder")
    def init_cache(
        self, memory: Float[Array, "b s d"], memory_mask: Bool[Array, "b s"], *, num_sequences: int, length: int
    ) -> DecoderCache:
        """Project the memory and make an empty cache for ``num_sequences`` per memory of up to ``length`` tokens.

        Raises:
            UserError: more tokens than rows of the position table.
        """
        if length > self.config.max_positions:
            raise UserError(
                f"generating {length} tokens exceeds config.model.max_positions={self.config.max_positions}; lower "
                "config.tasks.search.max_length or raise config.model.max_positions"
            )

        def body(
            layer: BertLayer, x: Array, _key: PRNGKeyArray | None, _extra: None
        ) -> tuple[Array, tuple[Array, ...]]:
            return x, layer.cross_attention.project(x)

        memory = constrain(memory, "batch", "visual", None)
        _, (keys, values) = scan_layers(self.layers, memory, body, unroll=self.config.scan_unroll)
        rows = memory.shape[0] * num_sequences
        empty = jnp.zeros((keys.shape[0], rows, length, *keys.shape[3:]), keys.dtype)
        empty = constrain(empty, None, "batch", None, "heads", None)
        return DecoderCache(empty, empty, keys, values, memory_mask)

    @jax.named_scope("decoder")
    def decode_step(
        self, tokens: Int[Array, " br"], position: Int[Array, ""], cache: DecoderCache
    ) -> tuple[Float[Array, "br v"], DecoderCache]:
        """Decode one token per sequence: return logits for the next one, and the updated cache."""
        x = self.embeddings(tokens[:, None], offset=position)
        past = jnp.broadcast_to(jnp.arange(cache.self_keys.shape[2]) <= position, cache.self_keys.shape[1:3])

        def body(
            layer: BertLayer, x: Array, _key: PRNGKeyArray | None, extra: tuple[Array, Array, Array, Array]
        ) -> tuple[Array, tuple[Array, Array]]:
            self_keys, self_values, cross_keys, cross_values = extra
            key, value = layer.self_attention.project(x)
            self_keys = jax.lax.dynamic_update_slice_in_dim(self_keys, key, position, axis=1)
            self_values = jax.lax.dynamic_update_slice_in_dim(self_values, value, position, axis=1)
            x = layer.add_self(x, layer.self_attention.attend(x, self_keys, self_values, past), None)
            update = layer.cross_attention.attend(
                x, cross_keys, cross_values, cache.memory_mask, sharding=AttentionSharding(keys="visual")
            )
            return layer.add_mlp(layer.add_cross(x, update, None), None), (self_keys, self_values)

        per_layer = (cache.self_keys, cache.self_values, cache.cross_keys, cache.cross_values)
        x, (self_keys, self_values) = scan_layers(
            self.layers, x, body, per_layer=per_layer, unroll=self.config.scan_unroll
        )
        logits = self.head(x, self.embeddings.words[...])[:, 0]
        return logits, cache._replace(self_keys=self_keys, self_values=self_values)
