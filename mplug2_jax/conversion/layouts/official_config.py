"""Sizes of official weights: from the settings next to them, the release's or an export's, or from their shapes."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from mplug2_jax.config import build
from mplug2_jax.conversion.files.sources import TensorSource
from mplug2_jax.conversion.layouts.clip import openai_sizes
from mplug2_jax.errors import UserError
from mplug2_jax.model.config import SIZES, ModelConfig, SpecialTokens

EXPORTED_SIZES = (
    "vision_width", "vision_layers", "vision_heads", "vision_activation", "patch_size", "image_size",
    "temporal_downsampling", "width", "heads", "mlp_width", "text_layers", "universal_layers", "num_latents",
    "fusion_start", "fusion_layers", "fusion_stride", "decoder_layers", "vocab_size", "max_positions", "dropout",
    "attention_dropout",
)  # fmt: skip
"""The model sizes in the ``config.json`` of an export."""


def sizes_from_settings(settings: Mapping[str, Any], source: TensorSource) -> tuple[ModelConfig, int]:
    """Return our sizes and the first fusion layer in use, from the release's settings and the weights' table sizes.

    Raises:
        UserError: a setting is missing.
    """
    try:
        vision, bert = settings["vision"], settings["bert"]
        names = set(source.names())
        patch = vision["patch_size"]
        table = source.info("visual_encoder.visual.positional_embedding").shape[0]
        universal = bert.get("num_uni_layer", 0)
        latents = f"text_encoder.encoder.layer.{bert['text_encoder_layers'] - universal}.latents"
        fusion_start = max(0, bert["num_hidden_layers"] - bert["fusion_layers"])
        config = ModelConfig(
            vision_width=vision["width"],
            vision_layers=vision["layers"],
            vision_heads=vision["heads"],
            patch_size=patch,
            image_size=round((table - 1) ** 0.5) * patch,
            temporal_downsampling=bool(settings.get("temporal_downsampling", False)),
            width=bert["hidden_size"],
            heads=bert["num_attention_heads"],
            mlp_width=bert["intermediate_size"],
            text_layers=bert["text_encoder_layers"] - universal,
            universal_layers=universal,
            num_latents=source.info(latents).shape[0] if latents in names else 1,
            fusion_layers=bert["num_hidden_layers"] - fusion_start,
            fusion_stride=bert["stride_layer"] if bert["stride_layer"] < bert["fusion_layers"] else 0,
            decoder_layers=bert["text_decode_layers"],
            vocab_size=bert["vocab_size"],
            max_positions=bert["max_position_embeddings"],
            contrastive_width=settings.get("embed_dim", 256),
            dropout=bert["hidden_dropout_prob"],
            attention_dropout=bert["attention_probs_dropout_prob"],
        )
    except KeyError as error:
        raise UserError(
            f"config.json next to the weights lacks {error}; use the one that they were trained with"
        ) from error
    return config, fusion_start


def sizes_from_shapes(source: TensorSource) -> tuple[ModelConfig, int]:
    """Return sizes from the weights alone, as in the release: head width 64, its number of fusion layers.

    Raises:
        UserError: the text width is not the release's, so the number of fusion layers in use is unknown.
    """
    names = set(source.names())

    def depth(prefix: str) -> int:
        return next(i for i in range(len(names)) if f"{prefix}{i}.attention.self.query.weight" not in names)

    words = source.info("text_decoder.bert.embeddings.word_embeddings.weight").shape
    sizes = next((s for s in SIZES.values() if s["width"] == words[1] and "decoder_layers" in s), None)
    if sizes is None or words[1] < 768:
        raise UserError(
            f"these weights have width={words[1]}, expected one of the release's (768, 1024); put the config.json that "
            "they were trained with next to them"
        )
    text, layer = depth("text_encoder.encoder.layer."), "text_encoder.encoder.layer."
    first = next((i for i in range(text) if f"{layer}{i}.latents" in names), text)
    fusion_start = depth("fusion_encoder.encoder.layer.") - sizes["fusion_layers"]
    tower = openai_sizes(source, "visual_encoder.visual")
    config = ModelConfig(
        **tower,
        vision_heads=tower["vision_width"] // 64,
        width=words[1],
        heads=words[1] // 64,
        mlp_width=source.info(f"{layer}0.intermediate.dense.weight").shape[0],
        text_layers=first,
        universal_layers=text - first,
        num_latents=source.info(f"{layer}{first}.latents").shape[0] if first < text else 1,
        fusion_layers=sizes["fusion_layers"],
        decoder_layers=depth("text_decoder.bert.encoder.layer."),
        vocab_size=words[0],
        max_positions=source.info("text_decoder.bert.embeddings.position_embeddings.weight").shape[0],
    )
    return config, max(0, fusion_start)


def to_config_json(
    config: ModelConfig, fusion_start: int, *, task: str, teacher: bool, tokens: SpecialTokens | None = None
) -> dict[str, Any]:
    """Return the ``config.json`` of an export: sizes by our names, which the PyTorch runtime reads too.

    ``tokens`` are the special ids of its tokenizer; without them the runtime uses BERT's.
    """
    sizes = dataclasses.asdict(config) | {"fusion_start": fusion_start}
    architecture = "VideoQA" if task == "videoqa" else "Caption"
    header = {"model_type": "mplug2", "architectures": [architecture], "task": task, "teacher": teacher}
    ids = {} if tokens is None else {"bos_token_id": tokens.begin, "eos_token_id": tokens.end}
    return header | {name: sizes[name] for name in EXPORTED_SIZES} | ids


def sizes_from_export(settings: Mapping[str, Any]) -> tuple[ModelConfig, int]:
    """Return our sizes and the first fusion layer in use, from what :func:`to_config_json` returned.

    Raises:
        UserError: sizes are missing or invalid.
    """
    missing = [name for name in EXPORTED_SIZES if name not in settings and name != "vision_activation"]
    if missing:  # older exports lack the activation, and have the release's
        raise UserError(f"config.json next to the weights lacks {', '.join(missing)}; export the weights again")
    sizes = {name: settings[name] for name in EXPORTED_SIZES if name != "fusion_start" and name in settings}
    return build(ModelConfig, sizes, "config.json: model"), int(settings["fusion_start"])
