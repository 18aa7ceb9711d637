"""Sizes of the official release: from its ``config.json``, from the shapes of its weights, and back."""

from collections.abc import Mapping
from typing import Any

from mplug2_jax.conversion.clip import openai_sizes
from mplug2_jax.conversion.sources import TensorSource
from mplug2_jax.errors import UserError
from mplug2_jax.model.config import SIZES, ModelConfig


def sizes_from_settings(settings: Mapping[str, Any], source: TensorSource) -> tuple[ModelConfig, int]:
    """Our sizes from the release's settings, and the first fusion layer in use. Weights tell the tables' sizes.

    Raises:
        UserError: settings that lack something.
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
        raise UserError(f"config.json beside the weights lacks {error}") from error
    return config, fusion_start


def sizes_from_shapes(source: TensorSource) -> tuple[ModelConfig, int]:
    """Our sizes from the weights alone, for the release's own sizes: 64 columns a head, its number of fusion layers.

    Raises:
        UserError: a text width that is not the release's, so that the number of fusion layers in use is not known.
    """
    names = set(source.names())

    def depth(prefix: str) -> int:
        return next(i for i in range(len(names)) if f"{prefix}{i}.attention.self.query.weight" not in names)

    words = source.info("text_decoder.bert.embeddings.word_embeddings.weight").shape
    sizes = next((s for s in SIZES.values() if s["width"] == words[1] and "decoder_layers" in s), None)
    if sizes is None or words[1] < 768:
        raise UserError(
            f"these weights are {words[1]} wide, which no size of the release is (768, 1024); put the config.json that "
            "they were made with beside them"
        )
    text, layer = depth("text_encoder.encoder.layer."), "text_encoder.encoder.layer."
    first = next((i for i in range(text) if f"{layer}{i}.latents" in names), text)
    fusion_start = depth("fusion_encoder.encoder.layer.") - sizes["fusion_layers"]
    config = ModelConfig(
        **openai_sizes(source, "visual_encoder.visual"),
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


def settings_of(config: ModelConfig, fusion_start: int, *, task: str, teacher: bool) -> dict[str, Any]:
    """The release's settings for our sizes: what :func:`sizes_from_settings` reads back."""
    return {
        "model_type": "mplug2",
        "task": task,
        "image_res": config.image_size,
        "temporal_downsampling": config.temporal_downsampling,
        "distill": teacher,
        "embed_dim": config.contrastive_width,
        "vision": {
            "width": config.vision_width,
            "layers": config.vision_layers,
            "heads": config.vision_heads,
            "patch_size": config.patch_size,
        },
        "bert": {
            "architectures": ["BertForMaskedLM"],
            "model_type": "bert",
            "hidden_size": config.width,
            "encoder_width": config.width,
            "num_attention_heads": config.heads,
            "intermediate_size": config.mlp_width,
            "hidden_act": "gelu",
            "hidden_dropout_prob": config.dropout,
            "attention_probs_dropout_prob": config.attention_dropout,
            "initializer_range": 0.02,
            "layer_norm_eps": 1e-12,
            "pad_token_id": 0,
            "type_vocab_size": 2,
            "vocab_size": config.vocab_size,
            "max_position_embeddings": config.max_positions,
            "text_encoder_layers": config.text_layers + config.universal_layers,
            "num_uni_layer": config.universal_layers,
            "num_hidden_layers": fusion_start + config.fusion_layers,
            "fusion_layers": config.fusion_layers,
            "text_decode_layers": config.decoder_layers,
            "stride_layer": config.fusion_stride or 1000,
        },
    }
