"""Settings files next to a CLIP or a BERT: what its shapes do not determine (heads, activation, positions, epsilons).

Rejects settings that our model cannot compute. What no file says is assumed, and reported.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mplug2_jax.errors import UserError
from mplug2_jax.model.vision import PIXEL_MEAN, PIXEL_STD

HUGGING_FACE, OPEN_CLIP, GOOGLE = "config.json", "open_clip_config.json", "bert_config.json"
PREPROCESSOR, TOKENIZER = "preprocessor_config.json", "tokenizer_config.json"
_HEAD_WIDTH = 64  # unless a file says another
_WIDER_HEADS = {1280: 80, 1408: 88, 1664: 104}  # by width: ViT-H, -g and -G of all published CLIPs

_TOWER_KEYS, _BERT_KEYS = ("patch_size", "vision_config"), ("num_attention_heads", "hidden_size", "model_type")

# The libraries' defaults for absent fields, and the values that our model supports.
_CLIP_DEFAULTS: Mapping[str, Any] = {"num_attention_heads": 12, "hidden_act": "quick_gelu"}
_CLIP_SUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("quick_gelu", "gelu"), "layer_norm_eps": (1e-5,), "act_kwargs": ({},),
    "final_ln_after_pool": (False,),
}  # fmt: skip
_PIXELS_SUPPORTED: Mapping[str, tuple[Any, ...]] = {"image_mean": (list(PIXEL_MEAN),), "image_std": (list(PIXEL_STD),)}
_BERT_DEFAULTS: Mapping[str, Any] = {"num_attention_heads": 12, "hidden_act": "gelu"}
_BERT_SUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "model_type": ("bert",), "hidden_act": ("gelu", "gelu_python"), "position_embedding_type": ("absolute",),
    "layer_norm_eps": (1e-12,), "is_decoder": (False,),
}  # fmt: skip


class Architecture(NamedTuple):
    """Settings of a model that its shapes do not tell; ``assumptions`` are sentences about those that no file has."""

    heads: int
    activation: str
    assumptions: tuple[str, ...] = ()


def read_settings(path: Path) -> Mapping[str, Any]:
    """Return the object in a JSON file; an empty one if there is no file, or it holds no object.

    Raises:
        UserError: the file is damaged.
    """
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); fix or remove it") from error
    return settings if isinstance(settings, dict) else {}


def clip_architecture(weights: Path, sizes: Mapping[str, Any], *, openai: bool) -> Architecture:
    """Return heads and activation of a vision tower of these sizes.

    Args:
        weights: the tower's file or folder.
        sizes: the ModelConfig fields that its shapes determine.
        openai: whether its names are OpenAI's, as open_clip writes them; its settings then take precedence.

    Raises:
        UserError: the settings are of another model, or of one that ours does not support.
    """
    expected = {
        "hidden_size": sizes["vision_width"], "num_hidden_layers": sizes["vision_layers"],
        "patch_size": sizes["patch_size"],
    }  # fmt: skip
    folder = settings_folder(weights)
    _check(folder / PREPROCESSOR, read_settings(folder / PREPROCESSOR), _PIXELS_SUPPORTED)
    parsers = {HUGGING_FACE: _parse_hugging_face_clip, OPEN_CLIP: _parse_open_clip}
    for name in sorted(parsers, reverse=openai):
        if (settings := parsers[name](read_settings(folder / name))) is not None:
            supported = {**_CLIP_SUPPORTED, **_PIXELS_SUPPORTED}
            return _architecture(folder / name, settings, expected, _CLIP_DEFAULTS, supported)
    return _assume(weights, sizes["vision_width"], "quick_gelu", "QuickGELU", (HUGGING_FACE, OPEN_CLIP))


def bert_architecture(weights: Path, sizes: Mapping[str, Any]) -> Architecture:
    """Return the heads of a BERT of these sizes, and check that our model supports its other settings.

    Raises:
        UserError: as :func:`clip_architecture`.
    """
    expected = {
        "hidden_size": sizes["width"], "num_hidden_layers": sizes["text_layers"] + sizes["universal_layers"],
        "intermediate_size": sizes["mlp_width"], "max_position_embeddings": sizes["max_positions"],
    }  # fmt: skip
    folder = settings_folder(weights)
    for name in (HUGGING_FACE, GOOGLE):
        settings = read_settings(folder / name)
        if settings.keys().isdisjoint(_TOWER_KEYS) and not settings.keys().isdisjoint(_BERT_KEYS):
            architecture = _architecture(folder / name, settings, expected, _BERT_DEFAULTS, _BERT_SUPPORTED)
            break
    else:
        architecture = _assume(weights, sizes["width"], "gelu", "exact GELU, absolute positions", (HUGGING_FACE,))
    if read_settings(folder / TOKENIZER).get("do_lower_case") is False:
        cased = f"{TOKENIZER} has do_lower_case=false, but our word pieces are lower case: words in capitals differ"
        architecture = architecture._replace(assumptions=(*architecture.assumptions, cased))
    return architecture


def settings_folder(weights: Path) -> Path:
    """Return the folder that holds the settings of weights: theirs, or the one that they are."""
    return weights if weights.is_dir() else weights.parent


def _parse_hugging_face_clip(settings: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return a tower's settings, or those in a whole CLIP's; of two sections in older files, the second overrides."""
    sections = [
        settings[name] for name in ("vision_config", "vision_config_dict") if isinstance(settings.get(name), dict)
    ]
    if sections:
        return {name: value for section in sections for name, value in section.items()}
    return settings if "patch_size" in settings else None


def _parse_open_clip(settings: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return open_clip's settings under Hugging Face's names; its defaults are exact GELU and a head width of 64."""
    model = settings.get("model_cfg", settings)
    vision = model.get("vision_cfg") if isinstance(model, dict) else None
    if not isinstance(model, dict) or not isinstance(vision, dict):
        return None
    width, head_width, norm = vision.get("width", 768), vision.get("head_width", _HEAD_WIDTH), vision.get("norm_kwargs")
    preprocessing = settings.get("preprocess_cfg")
    valid = type(width) is int and type(head_width) is int and head_width > 0
    return {
        "hidden_act": "quick_gelu" if model.get("quick_gelu") else "gelu",
        "hidden_size": width,
        "num_hidden_layers": vision.get("layers"),
        "patch_size": vision.get("patch_size"),
        "num_attention_heads": width // head_width if valid else head_width,
        "layer_norm_eps": norm.get("eps") if isinstance(norm, dict) else None,
        "act_kwargs": vision.get("act_kwargs"),
        "final_ln_after_pool": vision.get("final_ln_after_pool"),
        "image_mean": preprocessing.get("mean") if isinstance(preprocessing, dict) else None,
        "image_std": preprocessing.get("std") if isinstance(preprocessing, dict) else None,
    }


def _architecture(
    path: Path, settings: Mapping[str, Any], expected: Mapping[str, int], defaults: Mapping[str, Any],
    supported: Mapping[str, tuple[Any, ...]],
) -> Architecture:  # fmt: skip
    """Check a file's settings against the shapes and against what our model supports."""
    present = {name: value for name, value in settings.items() if value is not None}
    _check(path, present, supported)
    for name, value in expected.items():
        if present.get(name, value) != value:
            raise UserError(
                f"{path}: {name}={present[name]!r}, but the weights have {value}; put the settings that they were "
                "trained with next to them"
            )
    completed = {**defaults, **present}
    heads, width = completed["num_attention_heads"], expected["hidden_size"]
    if type(heads) is not int or heads < 1 or width % heads:
        raise UserError(f"{path}: num_attention_heads={heads!r} does not divide the width {width}; correct it")
    assumptions = (
        f"{name}={default!r}: not in {path.name}, the library's default"
        for name, default in defaults.items()
        if name not in present
    )
    return Architecture(heads, completed["hidden_act"], tuple(assumptions))


def _check(path: Path, settings: Mapping[str, Any], supported: Mapping[str, tuple[Any, ...]]) -> None:
    """Raise UserError for a setting that our model does not support."""
    for name, values in supported.items():
        if settings.get(name) is not None and _round(settings[name]) not in map(_round, values):
            raise UserError(
                f"{path}: {name}={settings[name]!r} is not supported, expected {' or '.join(map(repr, values))}; "
                "import another model"
            )


def _round(value: Any) -> Any:
    """Round lists of numbers to three digits, as some files write the mean color."""
    is_numbers = isinstance(value, list) and all(isinstance(x, int | float) for x in value)
    return [round(x, 3) for x in value] if is_numbers else value


def _assume(weights: Path, width: int, activation: str, description: str, files: Iterable[str]) -> Architecture:
    """Return the usual architecture, for weights without settings."""
    head_width = _WIDER_HEADS.get(width, _HEAD_WIDTH)
    if width % head_width:
        raise UserError(
            f"{weights}: the width {width} is not a multiple of the head width {head_width}; put the "
            f"{' or '.join(files)} that the weights were trained with next to them"
        )
    assumption = f"head width {head_width}, {description}: assumed without {' or '.join(files)} next to {weights.name}"
    return Architecture(width // head_width, activation, (assumption,))
