"""Small random models of the transformers library."""

from typing import Any

import pytest


def clip_model(**overrides: Any) -> Any:
    """Return a CLIP vision tower: 2 layers of width 128, images of 32 pixels in patches of 8."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed here")
    sizes = {
        "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": 32, "patch_size": 8, "projection_dim": 16,
    }  # fmt: skip
    return randomize_weights(transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**(sizes | overrides))))


def bert_model(*, head: bool, layers: int = 4, heads: int = 2) -> Any:
    """Return a BERT of width 128 with a vocabulary of 90."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed here")
    config = transformers.BertConfig(
        vocab_size=90, hidden_size=128, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=256,
        max_position_embeddings=24,
    )  # fmt: skip
    return randomize_weights(transformers.BertForMaskedLM(config) if head else transformers.BertModel(config))


def randomize_weights(model: Any) -> Any:
    """Move all weights away from their initialization, so that a missing bias or norm is detected."""
    import torch

    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()
