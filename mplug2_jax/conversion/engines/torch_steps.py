"""The programs as modules of the PyTorch runtime, with shapes that ``torch.export`` can trace.

The cache has a fixed length and is written at ``position``: the runtime's own grows by a token per step, which would be
another program for each.
"""

import torch
from torch import Tensor, nn

from mplug2_jax.conversion.torch_runtime import Caption, VideoQA, normalize_pixels
from mplug2_jax.conversion.torch_runtime.decoder import TextDecoder
from mplug2_jax.conversion.torch_runtime.layers import Embeddings, broadcast_mask


class Encode(nn.Module):
    """Pixels, and a question's token ids if the model reads one -> the decoder's memory, its keys, values and mask."""

    def __init__(self, model: Caption | VideoQA) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, frames: Tensor, question: Tensor | None = None, question_mask: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Encode frames, uint8 [b, t, y, x, 3], and a question [b, l]."""
        pixels = normalize_pixels(frames)
        if isinstance(self.model, VideoQA):
            assert question is not None
            assert question_mask is not None
            memory, mask = self.model.instruction_memory(pixels, question, question_mask)
        else:
            memory = self.model.encode_visual(pixels)
            mask = torch.ones(memory.shape[:2], dtype=torch.bool, device=memory.device)
        layers = self.model.text_decoder.bert.encoder.layers
        keys, values = zip(*(layer.crossattention.project(memory) for layer in layers), strict=True)
        return memory, torch.stack(keys), torch.stack(values), mask


class DecodeStep(nn.Module):
    """One token per sequence -> logits for the next one, and the cache with this token's keys and values."""

    def __init__(self, decoder: TextDecoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(
        self, tokens: Tensor, position: Tensor, past_keys: Tensor, past_values: Tensor, memory_keys: Tensor,
        memory_values: Tensor, memory_mask: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Decode tokens [b, r] at a position [], with a cache [i, b, r, h, m, k] and a memory [i, b, h, s, k]."""
        positions = torch.arange(past_keys.shape[4], device=tokens.device)
        is_current, is_seen = (positions == position)[:, None], (positions <= position)[None, None, None]
        x = _embed(self.decoder.bert.embeddings, tokens.flatten()[:, None], position)
        new_keys, new_values = [], []
        for i, layer in enumerate(self.decoder.bert.encoder.layers):
            key, value = layer.attention.project(x)
            keys = torch.where(is_current, key, past_keys[i].flatten(0, 1))
            values = torch.where(is_current, value, past_values[i].flatten(0, 1))
            x = layer.attention.attend(x, (keys, values), is_seen)
            x = layer.crossattention.attend(x, (memory_keys[i], memory_values[i]), broadcast_mask(memory_mask))
            x = layer.mlp(x)
            new_keys.append(keys)
            new_values.append(values)
        logits = self.decoder.cls.predictions(x)[:, 0].float()
        return (
            logits.unflatten(0, tokens.shape), torch.stack(new_keys).reshape(past_keys.shape),
            torch.stack(new_values).reshape(past_values.shape),
        )  # fmt: skip


def _embed(embeddings: Embeddings, ids: Tensor, position: Tensor) -> Tensor:
    """Embed ids [b*r, 1] at a position that is an input of the program, not a number in it."""
    x = embeddings.word_embeddings(ids) + embeddings.position_embeddings(position)
    out: Tensor = embeddings.LayerNorm(x + embeddings.token_type_embeddings.weight[0])
    return out
