"""Building blocks of the BERT-like towers, under the release's attribute names, and taps.

Axis letters as in the whole project: b batch, l text length (and any queries), m target length, s visual sequence (and
any keys), d width, h heads, k head width, r sequences per memory. Masks are True for valid tokens.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import UserError
from .config import Config

BERT_EPS = 1e-12
KeysValues = tuple[Tensor, Tensor]  # [b, h, s, k] each


class Taps(dict[str, Tensor]):
    """Collects the intermediates named at construction, or all of them; those of layers are stacked over depth.

    Example:
        ``taps = Taps(["vision/out"]); model.visual_tokens(frames, taps); taps["vision/out"]``
    """

    def __init__(self, names: Iterable[str] | None = None) -> None:
        super().__init__()
        self._names = None if names is None else frozenset(names)

    def wants(self, name: str) -> bool:
        """Return whether this name is collected."""
        return self._names is None or name in self._names


def tap(taps: Taps | None, name: str, x: Tensor, layer: int | None = None) -> None:
    """Collect one intermediate, if ``taps`` wants it. Outputs of ``layer`` 0, 1, ... are stacked."""
    if taps is None or not taps.wants(name):
        return
    if layer is None:
        taps[name] = x
    else:
        taps[name] = x[None] if layer == 0 else torch.cat([taps[name], x[None]])


def broadcast_mask(mask: Tensor) -> Tensor:
    """Broadcast a key mask [b, s] over heads and queries: [b, 1, 1, s]."""
    return mask[:, None, None, :]


class QueryKeyValue(nn.Module):
    """The three projections of an attention."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))


class AddNorm(nn.Module):
    """The end of every sub-layer: dense -> dropout -> residual -> LayerNorm."""

    def __init__(self, in_dim: int, config: Config) -> None:
        super().__init__()
        self.dense = nn.Linear(in_dim, config.width)
        self.LayerNorm = nn.LayerNorm(config.width, BERT_EPS)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, update: Tensor, x: Tensor) -> Tensor:
        """Add ``update`` [b, l, in_dim] to ``x`` [b, l, d]."""
        out: Tensor = self.LayerNorm(x + self.dropout(self.dense(update)))
        return out


class BertAttention(nn.Module):
    """Multi-head self attention, or cross attention to a memory, with its residual."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.self = QueryKeyValue(config.width)  # the release's name
        self.output = AddNorm(config.width, config)
        self.heads, self.dropout = config.heads, config.attention_dropout

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def project(self, memory: Tensor) -> KeysValues:
        """Project a memory [b, s, d] to keys and values, for many queries."""
        return self._split(self.self.key(memory)), self._split(self.self.value(memory))

    def attend(self, x: Tensor, keys_values: KeysValues, mask: Tensor | None = None) -> Tensor:
        """Attend from ``x`` [b*r, l, d] to projected keys and values of b memories.

        The r sequences of a memory are concatenated to one sequence of queries, so that keys and values are never
        copied; ``mask`` is then the same for all queries (see :func:`broadcast_mask`).
        """
        keys, values = keys_values
        query = self._split(self.self.query(x).reshape(keys.shape[0], -1, x.shape[-1]))
        rate = self.dropout if self.training else 0.0
        # The release adds -1e4 (self) or -1e9 (cross) to masked scores; with any valid key the softmax is the same.
        out = F.scaled_dot_product_attention(query, keys, values, mask, dropout_p=rate)
        return self.output(out.transpose(1, 2).reshape(x.shape), x)

    def forward(self, x: Tensor, memory: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Compute self attention of ``x`` [b*r, l, d], or cross attention if a memory [b, s, d] is given."""
        return self.attend(x, self.project(x if memory is None else memory), mask)


class Intermediate(nn.Module):
    """The first half of the MLP, with exact GELU."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.dense = nn.Linear(config.width, config.mlp_width)

    def forward(self, x: Tensor) -> Tensor:
        """Map [b, l, d] to [b, l, mlp width]."""
        return F.gelu(self.dense(x))


class BertLayer(nn.Module):
    """BERT's post-norm layer: self attention, cross attention if it has one and is given a memory, MLP.

    The first universal layer also holds the latents, as in the release.
    """

    def __init__(self, config: Config, *, cross: bool, latents: bool = False) -> None:
        super().__init__()
        self.attention = BertAttention(config)
        if cross:
            self.crossattention = BertAttention(config)
        self.intermediate = Intermediate(config)
        self.output = AddNorm(config.mlp_width, config)
        if latents:
            self.latents = nn.Parameter(torch.randn(config.num_latents, config.width))

    def forward(
        self, x: Tensor, mask: Tensor | None = None, memory: Tensor | None = None, memory_mask: Tensor | None = None
    ) -> Tensor:
        """Run the layer on ``x`` [b*r, l, d] and ``memory`` [b, s, d]; masks broadcast to [b, h, queries, keys]."""
        x = self.attention(x, None, mask)
        if memory is not None:
            x = self.crossattention(x, memory, memory_mask)
        return self.mlp(x)

    def mlp(self, x: Tensor) -> Tensor:
        """Apply the MLP with its residual."""
        return self.output(self.intermediate(x), x)


class Encoder(nn.Module):
    """A tower's layers as ``layer.i``; ``first`` is the first index, if the release has unused layers below."""

    def __init__(self, layers: Iterable[BertLayer], first: int = 0) -> None:
        super().__init__()
        self.layer = nn.ModuleDict({str(first + i): layer for i, layer in enumerate(layers)})

    @property
    def layers(self) -> list[BertLayer]:
        """Return the layers in order."""
        return [layer for layer in self.layer.values() if isinstance(layer, BertLayer)]


class Embeddings(nn.Module):
    """Word + position + type embeddings, normalized. The text encoder and the decoder do not share theirs."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        # The padding row gets no gradient from the lookup.
        self.word_embeddings = nn.Embedding(config.vocab_size, config.width, padding_idx=0)
        self.position_embeddings = nn.Embedding(config.max_positions, config.width)
        self.token_type_embeddings = nn.Embedding(2, config.width)  # only row 0 is used
        self.LayerNorm = nn.LayerNorm(config.width, BERT_EPS)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, ids: Tensor, position: Tensor | None = None) -> Tensor:
        """Embed ids [b, l] at positions 0, 1, ..., or all at one position [] -> [b, l, d].

        Raises:
            UserError: the text is longer than the position table.
        """
        length, rows = ids.shape[1], self.position_embeddings.num_embeddings
        if length > rows:
            raise UserError(f"a text of {length} tokens exceeds max_positions={rows}; truncate it")
        table = self.position_embeddings.weight[:length] if position is None else self.position_embeddings(position)
        x = self.word_embeddings(ids) + table
        out: Tensor = self.dropout(self.LayerNorm(x + self.token_type_embeddings.weight[0]))
        return out
