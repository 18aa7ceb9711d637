"""The shared decoder: causal self attention, cross attention to a memory, MLP; its head is tied to its word table.

Several sequences may share one memory (the candidate answers to a question, the beams of a video clip): ids are
[b*r, m], the memory is [b, s, d], and its keys and values are projected once for all r.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import Config
from .layers import (
    BERT_EPS,
    BertLayer,
    Embeddings,
    Encoder,
    KeysValues,
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
        seen = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).tril()
        if mask is not None:
            seen = seen & broadcast_mask(mask)
        memory_seen = None if memory_mask is None else broadcast_mask(memory_mask)
        for i, layer in enumerate(self.bert.encoder.layers):
            x = layer(x, seen, memory, memory_seen)
            tap(taps, "decoder/layer", x, layer=i)
        logits: Tensor = self.cls.predictions(x)
        return logits


class DecoderCache:
    """The decoder, one token at a time: a :class:`~mplug2_jax.conversion.torch_runtime.search.IncrementalDecoder`."""

    def __init__(self, decoder: TextDecoder, memory: Tensor, memory_mask: Tensor) -> None:
        """Project the memory [b, s, d] once for all tokens."""
        self._decoder, self._memory_seen = decoder, broadcast_mask(memory_mask)
        self._memory = [layer.crossattention.project(memory) for layer in decoder.bert.encoder.layers]
        self._past: list[KeysValues | None] = [None] * len(self._memory)
        self._length = 0

    def step(self, tokens: Tensor) -> Tensor:
        """Append a token to each sequence [b*r], and return logits [b*r, v] for the next one."""
        x = self._decoder.bert.embeddings(tokens[:, None], start=self._length)
        for i, layer in enumerate(self._decoder.bert.encoder.layers):
            x, self._past[i] = layer.step(x, self._past[i], self._memory[i], self._memory_seen)
        self._length += 1
        logits: Tensor = self._decoder.cls.predictions(x)[:, 0]
        return logits

    def reorder(self, rows: Tensor) -> None:
        """Replace the sequences by ``rows`` of them [b*r]; the memory is shared by the rows of an example."""
        self._past = [past and (past[0][rows], past[1][rows]) for past in self._past]
