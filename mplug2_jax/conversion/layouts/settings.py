"""What others keep beside a CLIP or a BERT says what shapes do not: heads, activation, positions, epsilons.

Settings of a model that ours cannot compute are refused. What no file says is assumed, and told in words.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mplug2_jax.errors import UserError
from mplug2_jax.model.vision import PIXEL_MEAN, PIXEL_STD

HUGGING_FACE, OPEN_CLIP, GOOGLE = "config.json", "open_clip_config.json", "bert_config.json"
PIXELS, WORDS = "preprocessor_config.json", "tokenizer_config.json"
_HEAD = 64  # columns of a head, where nothing says another number
_WIDER_HEADS = {1280: 80, 1408: 88, 1664: 104}  # ViT-H, -g and -G, of all CLIPs that are published

_OF_TOWERS, _OF_BERT = ("patch_size", "vision_config"), ("num_attention_heads", "hidden_size", "model_type")

# What the libraries take for fields that are absent, and all that our model computes.
_CLIP_DEFAULTS: Mapping[str, Any] = {"num_attention_heads": 12, "hidden_act": "quick_gelu"}
_CLIP_COMPUTED: Mapping[str, tuple[Any, ...]] = {"hidden_act": ("quick_gelu", "gelu"), "layer_norm_eps": (1e-5,)}
_PIXELS: Mapping[str, tuple[Any, ...]] = {"image_mean": (list(PIXEL_MEAN),), "image_std": (list(PIXEL_STD),)}
_BERT_DEFAULTS: Mapping[str, Any] = {"num_attention_heads": 12, "hidden_act": "gelu"}
_BERT_COMPUTED: Mapping[str, tuple[Any, ...]] = {
    "model_type": ("bert",), "hidden_act": ("gelu", "gelu_python"), "position_embedding_type": ("absolute",),
    "layer_norm_eps": (1e-12,), "is_decoder": (False,),
}  # fmt: skip


class Architecture(NamedTuple):
    """What is known of a model beside its shapes; ``assumed`` are sentences about what no file says."""

    heads: int
    activation: str
    assumed: tuple[str, ...] = ()


def read_settings(path: Path) -> Mapping[str, Any] | None:
    """The object in a JSON file; None where there is no file, or something other in it.

    Raises:
        UserError: the file is damaged.
    """
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); mend or remove it") from error
    return settings if isinstance(settings, dict) else None


def clip_architecture(weights: Path, sizes: Mapping[str, Any], *, openai: bool) -> Architecture:
    """Heads and activation of a vision tower of these sizes.

    Args:
        weights: the file or folder that the tower is in.
        sizes: the fields of our sizes that its shapes tell.
        openai: whether its names are OpenAI's, which open_clip writes; its settings then come first.

    Raises:
        UserError: settings of another model, or of one that ours does not compute.
    """
    theirs = {
        "hidden_size": sizes["vision_width"], "num_hidden_layers": sizes["vision_layers"],
        "patch_size": sizes["patch_size"],
    }  # fmt: skip
    _check(_folder(weights) / PIXELS, read_settings(_folder(weights) / PIXELS) or {}, _PIXELS)
    kinds = {HUGGING_FACE: _of_hugging_face_clip, OPEN_CLIP: _of_open_clip}
    for name in sorted(kinds, reverse=openai):
        if (said := kinds[name](read_settings(_folder(weights) / name))) is not None:
            return _architecture(_folder(weights) / name, said, theirs, _CLIP_DEFAULTS, {**_CLIP_COMPUTED, **_PIXELS})
    return _assumed(weights, sizes["vision_width"], "quick_gelu", "QuickGELU", (HUGGING_FACE, OPEN_CLIP))


def bert_architecture(weights: Path, sizes: Mapping[str, Any]) -> Architecture:
    """Heads of a BERT of these sizes, whose other settings are those that ours computes.

    Raises:
        UserError: as :func:`clip_architecture`.
    """
    theirs = {
        "hidden_size": sizes["width"], "num_hidden_layers": sizes["text_layers"] + sizes["universal_layers"],
        "intermediate_size": sizes["mlp_width"], "max_position_embeddings": sizes["max_positions"],
    }  # fmt: skip
    for name in (HUGGING_FACE, GOOGLE):
        said = read_settings(_folder(weights) / name) or {}
        if said.keys().isdisjoint(_OF_TOWERS) and not said.keys().isdisjoint(_OF_BERT):
            told = _architecture(_folder(weights) / name, said, theirs, _BERT_DEFAULTS, _BERT_COMPUTED)
            break
    else:
        told = _assumed(weights, sizes["width"], "gelu", "exact GELU, absolute positions", (HUGGING_FACE,))
    if (read_settings(_folder(weights) / WORDS) or {}).get("do_lower_case") is False:
        cased = f"{WORDS} says do_lower_case=false: our word pieces are in lower case, so that words in capitals differ"
        told = told._replace(assumed=(*told.assumed, cased))
    return told


def _folder(weights: Path) -> Path:
    return weights if weights.is_dir() else weights.parent


def _of_hugging_face_clip(settings: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """A tower's own settings, or those inside a whole CLIP's; older files have them twice, and the second counts."""
    settings = settings or {}
    both = [settings[name] for name in ("vision_config", "vision_config_dict") if isinstance(settings.get(name), dict)]
    if both:
        return {name: value for part in both for name, value in part.items()}
    return settings if "patch_size" in settings else None


def _of_open_clip(settings: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """open_clip's settings in Hugging Face's words; its own default is exact GELU, and heads of 64."""
    model = (settings or {}).get("model_cfg", settings)
    vision = model.get("vision_cfg") if isinstance(model, dict) else None
    if not isinstance(model, dict) or not isinstance(vision, dict):
        return None
    width, head, norm = vision.get("width", 768), vision.get("head_width", _HEAD), vision.get("norm_kwargs")
    seen = (settings or {}).get("preprocess_cfg")
    whole = type(width) is int and type(head) is int and head > 0
    return {
        "hidden_act": "quick_gelu" if model.get("quick_gelu") else "gelu",
        "hidden_size": width,
        "num_hidden_layers": vision.get("layers"),
        "patch_size": vision.get("patch_size"),
        "num_attention_heads": width // head if whole else head,
        "layer_norm_eps": norm.get("eps") if isinstance(norm, dict) else None,
        "image_mean": seen.get("mean") if isinstance(seen, dict) else None,
        "image_std": seen.get("std") if isinstance(seen, dict) else None,
    }


def _architecture(
    path: Path, said: Mapping[str, Any], theirs: Mapping[str, int], defaults: Mapping[str, Any],
    computed: Mapping[str, tuple[Any, ...]],
) -> Architecture:  # fmt: skip
    """What a file says, held against the shapes and what our model computes."""
    said = {name: value for name, value in said.items() if value is not None}
    _check(path, said, computed)
    for name, value in theirs.items():
        if said.get(name, value) != value:
            raise UserError(
                f"{path}: {name}={said[name]!r}, but the weights have {value}; put the settings beside them that "
                "they were made with"
            )
    settings = {**defaults, **said}
    heads, width = settings["num_attention_heads"], theirs["hidden_size"]
    if type(heads) is not int or heads < 1 or width % heads:
        raise UserError(f"{path}: num_attention_heads={heads!r} does not divide {width} columns; mend it")
    absent = [name for name in defaults if name not in said]
    assumed = (f"{name}={defaults[name]!r}: {path.name} does not say, and it is the library's own" for name in absent)
    return Architecture(heads, settings["hidden_act"], tuple(assumed))


def _check(path: Path, said: Mapping[str, Any], computed: Mapping[str, tuple[Any, ...]]) -> None:
    """Refuses what our model does not compute."""
    for name, known in computed.items():
        if said.get(name) is not None and _short(said[name]) not in map(_short, known):
            raise UserError(
                f"{path}: {name}={said[name]!r} is not what mPLUG-2 computes, which is "
                f"{' or '.join(map(repr, known))}; import a model of that"
            )


def _short(value: Any) -> Any:
    """Lists of numbers to three digits, as some write the colours' means."""
    numbers = isinstance(value, list) and all(isinstance(x, int | float) for x in value)
    return [round(x, 3) for x in value] if numbers else value


def _assumed(weights: Path, width: int, activation: str, words: str, files: Iterable[str]) -> Architecture:
    """What is taken for granted of weights alone."""
    head = _WIDER_HEADS.get(width, _HEAD)
    if width % head:
        raise UserError(
            f"{weights}: {width} columns are no whole number of heads of {head}; put the {' or '.join(files)} that the "
            "weights were made with beside them"
        )
    where = f"no {' or '.join(files)} beside {weights.name} says otherwise"
    return Architecture(width // head, activation, (f"heads of {head} columns, {words}: {where}",))
