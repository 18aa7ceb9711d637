"""The shared decoder: causal self attention, cross attention to a memory, MLP; its head is tied to its word table.

Several sequences may share one memory (the candidate answers to a question, the beams of a video clip): ids are
[b*r, m], the memory is [b, s, d], and its keys and values are projected once for all r.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import Config
from .layers import (
    BERT_EPS,
    BertLayer,
    Embeddings,
    Encoder,
    Taps,
    broadcast_mask,
    tap,
)  # fmt: skip


class Bert(nn.Module):
    """Embeddings and layers, under the release's name."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(BertLayer(config, cross=True) for _ in range(config.decoder_layers))


class Transform(nn.Module):
    """Dense -> GELU -> LayerNorm, before the logits."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.LayerNorm = nn.LayerNorm(width, BERT_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """Transform [b, m, d]."""
        out: Tensor = self.LayerNorm(F.gelu(self.dense(x)))
        return out


class Predictions(nn.Module):
    """Logits over the vocabulary. The word table and the bias have two names, but are one parameter each."""

    def __init__(self, words: Tensor) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(words.shape[0]))
        self.transform = Transform(words.shape[1])
        self.decoder = nn.Linear(words.shape[1], words.shape[0])
        self.decoder.weight, self.decoder.bias = words, self.bias

    def forward(self, x: Tensor) -> Tensor:
        """Map [b, m, d] to logits [b, m, v]."""
        out: Tensor = self.decoder(self.transform(x))
        return out


class Cls(nn.Module):
    """The head, under the release's name."""

    def __init__(self, words: Tensor) -> None:
        super().__init__()
        self.predictions = Predictions(words)


class DecoderMemory(NamedTuple):
    """The tokens that the decoder attends to, and the keys and values of its cross attention in every layer."""

    tokens: Tensor  # [b, s, d]
    keys: Tensor  # [i, b, h, s, k]
    values: Tensor
    mask: Tensor  # [b, s]


class TextDecoder(nn.Module):
    """Embeddings, layers and head."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.bert = Bert(config)
        self.cls = Cls(self.bert.embeddings.word_embeddings.weight)

    def forward(
        self, ids: Tensor, mask: Tensor | None, memory: Tensor, memory_mask: Tensor | None = None,
        taps: Taps | None = None,
    ) -> Tensor:  # fmt: skip
        """Return logits [b*r, m, v] with teacher forcing: at every position of ids [b*r, m], for the token after it."""
        x = self.bert.embeddings(ids)
        tap(taps, "decoder/embed", x)
        causal_mask = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).tril()
        if mask is not None:
            causal_mask = causal_mask & broadcast_mask(mask)
        cross_mask = None if memory_mask is None else broadcast_mask(memory_mask)
        for i, layer in enumerate(self.bert.encoder.layers):
            x = layer(x, causal_mask, memory, cross_mask)
            tap(taps, "decoder/layer", x, layer=i)
        logits: Tensor = self.cls.predictions(x)
        return logits

    def project(self, tokens: Tensor, mask: Tensor) -> DecoderMemory:
        """Project tokens [b, s, d] to keys and values, once for all tokens that are generated."""
        layers = self.bert.encoder.layers
        keys, values = zip(*(layer.crossattention.project(tokens) for layer in layers), strict=True)
        return DecoderMemory(tokens, torch.stack(keys), torch.stack(values), mask)


class DecodeStep(nn.Module):
    """One token per sequence -> logits for the next one, and the cache with this token's keys and values.

    The cache has a fixed length and is written at ``position``, so ``torch.export`` and ``torch.compile`` make one
    program for all tokens.
    """

    def __init__(self, decoder: TextDecoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(
        self, tokens: Tensor, position: Tensor, past_keys: Tensor, past_values: Tensor, memory_keys: Tensor,
        memory_values: Tensor, memory_mask: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Decode tokens [b, r] at a position [], with a cache [i, b, r, h, m, k] and a memory [i, b, h, s, k]."""
        positions = torch.arange(past_keys.shape[4], device=tokens.device)
        is_current, is_visible = (positions == position)[:, None], (positions <= position)[None, None, None]
        x = self.decoder.bert.embeddings(tokens.flatten()[:, None], position)
        new_keys, new_values = [], []
        for i, layer in enumerate(self.decoder.bert.encoder.layers):
            key, value = layer.attention.project(x)
            keys = torch.where(is_current, key, past_keys[i].flatten(0, 1))
            values = torch.where(is_current, value, past_values[i].flatten(0, 1))
            x = layer.attention.attend(x, (keys, values), is_visible)
            x = layer.crossattention.attend(x, (memory_keys[i], memory_values[i]), broadcast_mask(memory_mask))
            x = layer.mlp(x)
            new_keys.append(keys)
            new_values.append(values)
        logits = self.decoder.cls.predictions(x)[:, 0].float()
        return (
            logits.unflatten(0, tokens.shape), torch.stack(new_keys).reshape(past_keys.shape),
            torch.stack(new_values).reshape(past_values.shape),
        )  # fmt: skip


DecodeFn = Callable[..., tuple[Tensor, Tensor, Tensor]]
"""A :class:`DecodeStep`, compiled or not."""


class DecoderCache:
    """The decoder, one token at a time: a :class:`~mplug2_jax.conversion.torch_runtime.search.IncrementalDecoder`.

    Args:
        step: computes a token.
        memory: what the sequences attend to.
        num_sequences: of each example.
        length: of the cache, in tokens.
    """

    def __init__(self, step: DecodeFn, memory: DecoderMemory, num_sequences: int, length: int) -> None:
        self._step, self._memory = step, memory
        layers, b, h, _, k = memory.keys.shape
        self._keys, self._values = (memory.keys.new_zeros(layers, b, num_sequences, h, length, k) for _ in range(2))
        self._position = 0

    def step(self, tokens: Tensor) -> Tensor:
        """Append a token to each sequence [b*r], and return logits [b*r, v] for the next one."""
        position = torch.tensor(self._position, device=tokens.device)
        memory = (self._memory.keys, self._memory.values, self._memory.mask)
        tokens = tokens.unflatten(0, self._keys.shape[1:3])
        logits, self._keys, self._values = self._step(tokens, position, self._keys, self._values, *memory)
        self._position += 1
        return logits.flatten(0, 1)

    def reorder(self, rows: Tensor) -> None:
        """Replace the sequences by ``rows`` of them [b*r]; the memory is shared by the rows of an example."""
        self._keys, self._values = (
            cache.flatten(1, 2)[:, rows].reshape(cache.shape) for cache in (self._keys, self._values)
        )
