"""Sizes of the model, as in the ``config.json`` next to exported weights, and a table of the released ones."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import UserError, did_you_mean


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """All sizes of the model, named as in :class:`mplug2_jax.model.config.ModelConfig`.

    Raises:
        UserError: a size is out of range, or does not fit another.
    """

    vision_width: int
    vision_layers: int
    vision_heads: int
    vision_activation: str = "quick_gelu"  # or the exact "gelu"
    patch_size: int
    image_size: int  # pixels; sets the grid of the position table, which is resized for other sizes
    temporal_downsampling: bool = False  # patches of 3 frames with stride 2; off in every released model
    width: int  # of everything but the vision tower
    heads: int
    mlp_width: int
    text_layers: int  # below the universal ones
    universal_layers: int = 2  # the last layers of the text encoder, shared with vision
    num_latents: int = 50  # learnable queries of the universal layers
    fusion_start: int  # the release numbers fusion layers from 0 and uses the last ones; the first of these
    fusion_layers: int  # in use
    fusion_stride: int = 0  # every stride-th layer has joint self attention over image and text; 0 = none
    decoder_layers: int
    vocab_size: int = 30522
    max_positions: int = 512
    dropout: float = 0.1  # of hidden states outside the vision tower, in train mode
    attention_dropout: float = 0.1  # of attention probabilities outside the vision tower
    bos_token_id: int = 101  # generated texts begin and end with these ids of the tokenizer; default: BERT's
    eos_token_id: int = 102

    def __post_init__(self) -> None:
        """Check every field."""
        _check(vars(self))

    @property
    def joint_attention_layers(self) -> tuple[int, ...]:
        """Return which fusion layers, counted from the first in use, attend jointly over image and text."""
        return tuple(range(self.fusion_stride, self.fusion_layers, self.fusion_stride)) if self.fusion_stride else ()


_OTHER_FIELDS = (  # of an export's config.json, or one that transformers saved
    "model_type", "architectures", "task", "teacher", "auto_map", "dtype", "torch_dtype", "is_encoder_decoder",
    "pad_token_id", "tie_word_embeddings", "transformers_version",
)  # fmt: skip
_MAY_BE_ZERO = ("text_layers", "fusion_start", "fusion_layers", "fusion_stride", "bos_token_id", "eos_token_id")
_ACTIVATIONS = ("quick_gelu", "gelu")


def _check(sizes: Mapping[str, Any]) -> None:
    """Raise UserError for sizes that are out of range or do not fit together; those with a default may be absent."""
    for field in dataclasses.fields(Config):
        value = sizes.get(field.name, field.default)
        if field.type is bool:
            valid, expected = isinstance(value, bool), "true or false"
        elif field.type is str:
            valid, expected = value in _ACTIVATIONS, " or ".join(_ACTIVATIONS)
        elif field.type is float:
            valid, expected = type(value) in (int, float) and 0 <= value < 1, "a number from 0 to below 1"
        else:
            minimum = 0 if field.name in _MAY_BE_ZERO else 1
            valid, expected = type(value) is int and value >= minimum, f"an integer of at least {minimum}"
        if not valid:
            raise UserError(f"{field.name}={value!r} must be {expected}")
    for width, heads in (("vision_width", "vision_heads"), ("width", "heads")):
        if sizes[width] % sizes[heads]:
            raise UserError(f"{width}={sizes[width]} is not a multiple of {heads}={sizes[heads]}")
    if sizes["image_size"] % sizes["patch_size"]:
        raise UserError(f"image_size={sizes['image_size']} is not a multiple of patch_size={sizes['patch_size']}")


SIZES: Mapping[str, Config] = {
    "base": Config(
        vision_width=768, vision_layers=12, vision_heads=12, patch_size=16, image_size=224,
        width=768, heads=12, mlp_width=3072, text_layers=10, fusion_start=9, fusion_layers=3, decoder_layers=12,
    ),
    "large": Config(
        vision_width=1024, vision_layers=24, vision_heads=16, patch_size=14, image_size=224,
        width=1024, heads=16, mlp_width=4096, text_layers=22, fusion_start=18, fusion_layers=6, decoder_layers=12,
    ),
}  # fmt: skip


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """Read the object in a JSON file. Raises UserError, with the remedy, if it is missing or is not an object."""
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; {remedy}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}; {remedy}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, expected an object; {remedy}")
    return content


def read_config(path: Path) -> Config:
    """Read the sizes in a JSON file: an object with the fields of :class:`Config`; those with a default may be absent.

    Raises:
        UserError: the file is missing or invalid, a field is unknown or missing, or sizes do not fit.
    """
    sizes = read_json(path, "write one, or pass a config, such as SIZES['large']")
    sizes = {name: value for name, value in sizes.items() if name not in _OTHER_FIELDS}
    fields = {field.name: field for field in dataclasses.fields(Config)}
    for name in sizes:
        if name not in fields:
            raise UserError(f"{path}: {name} is not a size of the model: {did_you_mean(name, fields)}")
    missing = [n for n, field in fields.items() if n not in sizes and field.default is dataclasses.MISSING]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}; add the sizes that the model was trained with")
    try:
        _check(sizes)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return Config(**sizes)
