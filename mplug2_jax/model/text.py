"""Text encoder: BERT's embeddings and the layers below the universal layers."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from mplug2_jax.errors import UserError
from mplug2_jax.model.config import ModelConfig
from mplug2_jax.model.layers import (
    BERT_EPS,
    EMBEDDING_INIT,
    BertLayer,
    LayerNorm,
    Linear,
    dropout,
    gelu,
    kernel_init,
    make_param,
    matmul,
    scan_layers,
    split_rng,
    stack_layers,
)  # fmt: skip
from mplug2_jax.model.taps import Taps, tap
from mplug2_jax.parallel.sharding import constrain, gather_param

PAD_ID = 0


class Embeddings(nnx.Module):
    """Sum of word, position and type embeddings, normalized. The text encoder and the decoder do not share it."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        width = config.width
        self.words = make_param(rngs, EMBEDDING_INIT, (config.vocab_size, width), ("vocab", "embed"))
        self.positions = make_param(rngs, EMBEDDING_INIT, (config.max_positions, width), ("position", "embed"))
        # Two rows, so that BERT's checkpoints fit; only row 0 is used.
        self.types = make_param(rngs, EMBEDDING_INIT, (2, width), (None, "embed"))
        self.norm = LayerNorm(width, BERT_EPS, rngs=rngs)
        self.dropout, self.dtype = config.dropout, config.dtype

    @jax.named_scope("embeddings")
    def __call__(
        self, ids: Int[Array, "b l"], *, offset: Int[Array, ""] | int = 0, rng: PRNGKeyArray | None = None
    ) -> Float[Array, "b l d"]:
        """Embed token ids at positions ``offset``, ``offset + 1``, ...

        Raises:
            UserError: a text longer than the position table.
        """
        rows, length = self.positions[...].shape[0], ids.shape[1]
        if length > rows:
            raise UserError(
                f"a text of {length} tokens exceeds config.model.max_positions={rows}; truncate the text or raise it"
            )
        x = constrain(gather_param(self.words[...], ("vocab", "embed"))[ids], "batch", None, None)
        # As in torch, the pad row gets no gradient through the lookup.
        x = jnp.where((ids == PAD_ID)[..., None], jax.lax.stop_gradient(x), x)
        x = x + gather_param(self.types[...], (None, "embed"))[0]
        x = x + jax.lax.dynamic_slice_in_dim(gather_param(self.positions[...], ("position", "embed")), offset, length)
        return dropout(self.norm(x).astype(self.dtype), self.dropout, rng)


class TextEncoder(nnx.Module):
    """Embeddings and the first N - S layers, which the universal layers follow."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        self.embeddings = Embeddings(config, rngs=rngs)
        if config.text_layers:
            self.layers = stack_layers(lambda r: BertLayer(config, cross=False, rngs=r), config.text_layers, rngs)
        self.config = config

    @jax.named_scope("text")
    def __call__(
        self, ids: Int[Array, "b l"], mask: Bool[Array, "b l"], *, rng: PRNGKeyArray | None = None,
        taps: Taps | None = None,
    ) -> Float[Array, "b l d"]:  # fmt: skip
        """Encode token ids, up to the universal layers."""
        rng_embed, rng_layers = split_rng(rng, 2)
        x = constrain(self.embeddings(ids, rng=rng_embed), "batch", None, None)
        tap(taps, "text/embed", x)
        if not self.config.text_layers:
            return x

        def body(layer: BertLayer, x: Array, key: PRNGKeyArray | None, _extra: None) -> tuple[Array, None]:
            return constrain(layer(x, mask, rng=key), "batch", None, None), None

        return scan_layers(
            self.layers, x, body, rng=rng_layers, remat=self.config.remat.text, unroll=self.config.scan_unroll,
            taps=taps, name="text/layer",
        )[0]  # fmt: skip


class MlmHead(nnx.Module):
    """Dense -> GELU -> LayerNorm -> tied word embeddings, plus a bias per word.

    The masked language modeling objective uses it with the text encoder's embeddings, the decoder with its own.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        self.dense = Linear(
            config.width, config.width, ("embed", "mlp"), dtype=config.dtype, kernel_init=kernel_init(config), rngs=rngs
        )  # fmt: skip
        self.norm = LayerNorm(config.width, BERT_EPS, rngs=rngs)
        self.bias = make_param(rngs, nnx.initializers.zeros, (config.vocab_size,), ("vocab",))

    @jax.named_scope("mlm")
    def __call__(self, x: Float[Array, "b l d"], words: Float[Array, "v d"]) -> Float[Array, "b l v"]:
        """Compute float32 logits over the vocabulary."""
        x = self.norm(gelu(self.dense(x)))
        logits = matmul(x, words, ("vocab", "embed"), tied=True).astype(jnp.float32) + self.bias[...]
        return constrain(logits, "batch", None, "vocab")
