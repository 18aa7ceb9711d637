"""The official release's state dict, tensor by tensor, mapped to our parameter tree.

One list holds everything: a :class:`TensorMapping` for each official tensor (or third of one) that our model uses. A
tensor that is not in the list must be explained by a pattern (tied, ignored, the teacher's), or loading fails.
"""

import dataclasses
import re
from collections.abc import Iterator, Sequence

import numpy as np
from flax.traverse_util import unflatten_dict

from mplug2_jax.conversion.files.sources import HostArray, TensorSource
from mplug2_jax.conversion.layouts.bert import HEAD, map_embeddings, map_head, map_layer, map_layers
from mplug2_jax.conversion.layouts.clip import map_vision
from mplug2_jax.conversion.layouts.name_mapping import (
    LoadReport,
    NameMapping,
    NamePatterns,
    compile_patterns,
    first_few,
    match_names,
    strip_wrappers,
)
from mplug2_jax.conversion.layouts.tensor_mapping import (
    ParamPath,
    TensorMapping,
    get_leaf,
    get_param,
    group_by_name,
    map_linear,
    map_norm,
    param_shape,
)
from mplug2_jax.errors import UserError
from mplug2_jax.model.config import ModelConfig
from mplug2_jax.model.fusion import joint_attention_layers
from mplug2_jax.model.mplug2 import ModelDef, Params

CAPTION_PARTS = ("vision", "temporal", "universal", "decoder")
QUESTION_PARTS = ("vision", "temporal", "text", "universal", "fusion", "decoder")
TASK_PARTS = {"videoqa": QUESTION_PARTS, "caption": CAPTION_PARTS}
"""The parts of the release's two models; the larger first."""

TIED = {
    "text_decoder.cls.predictions.decoder.weight": "text_decoder.bert.embeddings.word_embeddings.weight",
    "text_decoder.cls.predictions.decoder.bias": "text_decoder.cls.predictions.bias",
}

_MODULES = (
    "visual_encoder", "text_encoder", "fusion_encoder", "text_decoder", "visn_emb_norm", "visn_fc", "visn_layer_norm",
    "vision_proj", "text_proj",
)  # fmt: skip


def default_fusion_start(config: ModelConfig) -> int:
    """Return the first fusion layer in use, if fusion and text encoder are equally deep, as in the release."""
    return max(0, config.text_layers + config.universal_layers - config.fusion_layers)


def map_tensors(config: ModelConfig, parts: Sequence[str], fusion_start: int) -> list[TensorMapping]:
    """Map every official tensor that a model of these parts uses. ``fusion_start``: the first fusion layer in use."""
    mappings: list[TensorMapping] = []
    text = "text_encoder.encoder.layer"
    if "vision" in parts:
        mappings += map_vision("visual_encoder.visual", config.vision_layers, temporal="temporal" in parts)
        if config.vision_width != config.width:
            mappings += map_linear("visn_fc", ("vision_projection", "dense"))
            mappings += map_norm("visn_layer_norm", ("vision_projection", "norm"))
    if "text" in parts:
        mappings += map_embeddings("text_encoder.embeddings", ("text", "embeddings"))
        mappings += map_layers(text, range(config.text_layers), ("text", "layers"), cross=False)
    if "universal" in parts:
        cross = "vision" in parts
        universal = range(config.text_layers, config.text_layers + config.universal_layers)
        mappings += map_layers(text, universal, ("universal", "layers"), cross=cross)
        if cross:
            name = f"{text}.{config.text_layers}.latents"
            mappings.append(TensorMapping(name, ("universal", "latents"), transform="identity"))
            mappings += map_norm("visn_emb_norm", ("universal", "visual_norm"))
    if "fusion" in parts:
        mappings += _fusion(config, fusion_start)
    if "decoder" in parts:
        mappings += map_embeddings("text_decoder.bert.embeddings", ("decoder", "embeddings"))
        layers = range(config.decoder_layers)
        mappings += map_layers("text_decoder.bert.encoder.layer", layers, ("decoder", "layers"), cross=True)
        mappings += map_head(f"text_decoder.{HEAD}", ("decoder", "head"))
    if "contrastive" in parts:
        mappings += map_linear("vision_proj", ("contrastive", "visual"))
        mappings += map_linear("text_proj", ("contrastive", "text"))
        mappings.append(TensorMapping("temp", ("contrastive", "temperature"), transform="identity"))
    if "matching" in parts:
        mappings += map_linear("itm_head", ("matching", "dense"))
    return mappings


def _fusion(config: ModelConfig, fusion_start: int) -> Iterator[TensorMapping]:
    mixing = joint_attention_layers(config.fusion_layers, config.fusion_stride)
    num_plain = num_mixing = 0
    for j in range(config.fusion_layers):
        name = f"fusion_encoder.encoder.layer.{fusion_start + j}"
        if j in mixing:
            yield from map_layer(name, ("fusion", "mixing"), num_mixing, cross=False)
            num_mixing += 1
        else:
            yield from map_layer(name, ("fusion", "layers"), num_plain, cross=True)
            num_plain += 1


def teacher_name(name: str) -> str:
    """Return the teacher's name of a student's tensor: with ``_m`` after the module; bare tensors have one copy."""
    module, dot, suffix = name.partition(".")
    return f"{module}_m{dot}{suffix}" if module in _MODULES else name


def student_name(name: str) -> str:
    """Return the student's name of a teacher's tensor, and any other name unchanged."""
    module, dot, suffix = name.partition(".")
    return f"{module[:-2]}{dot}{suffix}" if module.endswith("_m") and module[:-2] in _MODULES else name


def canonical_names(names: Sequence[str]) -> dict[str, str]:
    """Return the names that the release's models have, ``{canonical: stored}``.

    Removes the prefixes of wrappers (``module.``) and of its pretraining checkpoints (``text_encoder.bert.``,
    ``fusion_encoder.bert.``, ``fusion_encoder.fusion.``).

    Raises:
        UserError: two tensors have one canonical name.
    """
    pretraining = r"^(text_encoder(?:_m)?)\.bert\.|^(fusion_encoder(?:_m)?)\.(?:bert|fusion)\."
    modules = {*_MODULES, *(f"{module}_m" for module in _MODULES)}
    return strip_wrappers(names, modules, lambda name: re.sub(pretraining, r"\1\2.", name))


def is_official(names: Sequence[str]) -> bool:
    """Return whether canonical names are the release's."""
    return "visual_encoder.visual.conv1.weight" in names and any(name.startswith("text_decoder.") for name in names)


def _ignored_patterns(config: ModelConfig, parts: Sequence[str], fusion_start: int) -> NamePatterns:
    """Return patterns of the tensors that the model ignores, with the reason for each."""
    patterns: list[tuple[str, str]] = [
        (r".*\.position_ids", "buffer: the positions 0, 1, 2, ..."),
        (r"visual_encoder\.visual\.proj", "CLIP's projection, never called"),
        (r"visual_encoder\.(?!visual\.).*", "CLIP's text tower, never called"),
        (r".*\.(intermediate|output)_vision\..*", "separate vision MLP, commented out in the release"),
        (r"text_decoder\..*\.latents", "latents of the layer class, never read in the decoder"),
        (r"fusion_encoder\.embeddings\..*", "fusion starts from encoded text, never from ids"),
        (r"(image|text|idx)_queue|queue_ptr", "state of the contrastive queue"),
    ]
    if fusion_start:
        layers = "|".join(str(i) for i in range(fusion_start))
        patterns.append((rf"fusion_encoder\.encoder\.layer\.({layers})\..*", "fusion layer below the first in use"))
    for j in joint_attention_layers(config.fusion_layers, config.fusion_stride):
        name = rf"fusion_encoder\.encoder\.layer\.{fusion_start + j}\.crossattention\..*"
        patterns.append((name, "cross attention of a fusion layer that mixes instead"))
    if "fusion" not in parts:
        patterns.append((r"fusion_encoder\..*", "no fusion in this model"))
    if "text" not in parts:
        patterns.append((r"text_encoder\.embeddings\..*", "no text encoder in this model"))
        layers = "|".join(str(i) for i in range(config.text_layers))
        patterns.append((rf"text_encoder\.encoder\.layer\.({layers})\..*", "no text encoder in this model"))
    if "contrastive" not in parts:
        patterns.append((r"(vision|text)_proj\..*|temp", "no contrastive head in this model"))
    if "matching" not in parts:
        patterns.append((r"itm_head\..*", "no matching head in this model"))
    if "temporal" not in parts:
        patterns.append((r"visual_encoder\.visual\..*\.lmhra[12]\..*", "no temporal units in this model"))
    return compile_patterns(*patterns)


def map_official_names(
    config: ModelConfig, parts: Sequence[str], fusion_start: int, *, student: bool = True, teacher: bool = False
) -> NameMapping:
    """Map the release's names to a state with the trees ``params`` (the student) and ``teacher``, if requested."""
    mappings = map_tensors(config, parts, fusion_start)

    def with_tree(tree: str) -> list[TensorMapping]:
        rename = teacher_name if tree == "teacher" else str
        return [dataclasses.replace(m, name=rename(m.name), path=(tree, *m.path)) for m in mappings]

    requested = (with_tree("params") if student else []) + (with_tree("teacher") if teacher else [])
    unused: dict[str, str] = {}
    if not student:
        unused |= {m.name: "the student's copy" for m in mappings if teacher_name(m.name) != m.name}
    if not teacher:
        unused |= {teacher_name(m.name): "the teacher's copy" for m in mappings if teacher_name(m.name) != m.name}
    tied = {**TIED, **{teacher_name(a): teacher_name(b) for a, b in TIED.items()}}
    # What is tied to an unused tensor is unused too.
    unused |= {name: unused[target] for name, target in tied.items() if target in unused}
    return NameMapping(
        tuple(requested), tied, _ignored_patterns(config, parts, fusion_start), canonical=student_name, unused=unused
    )


def load_official(
    source: TensorSource, model_def: ModelDef, fusion_start: int, *, teacher: bool = False
) -> tuple[Params, LoadReport]:
    """Read official weights into our parameter tree, as float32 on the host, with a report of every tensor.

    With ``teacher``, loads the teacher's copy instead of the student's.

    Raises:
        UserError: tensors are unexpected, missing or misshapen; names all of them.
    """
    tree = "teacher" if teacher else "params"
    names = map_official_names(model_def.config, model_def.parts, fusion_start, student=not teacher, teacher=teacher)
    by_name, report = match_names(source.names(), names)
    shapes = {tree: model_def.shapes}
    check_shapes(source, names.mappings, shapes)
    loaded: dict[ParamPath, HostArray] = {}
    for name, mappings in by_name.items():
        tensor = source.read(name)
        for mapping in mappings:
            param, path = mapping.to_param(tensor), mapping.path
            if mapping.layer is None:
                loaded[path] = np.array(param, np.float32, order="C")
            else:
                loaded.setdefault(path, np.empty(get_leaf(shapes, path).shape, np.float32))[mapping.layer] = param
    return unflatten_dict(loaded)[tree], report


def check_shapes(source: TensorSource, mappings: Sequence[TensorMapping], shapes: Params) -> None:
    """Check every tensor's shape against that of its parameter.

    Raises:
        UserError: some do not fit; lists them.
    """
    wrong = []
    for mapping in mappings:
        stored, expected = source.info(mapping.name).shape, param_shape(shapes, mapping)
        if not stored:
            fits = expected == ()
        elif mapping.qkv_index is not None and stored[0] % 3:
            fits = False
        else:
            fits = mapping.to_param(np.broadcast_to(np.uint8(0), stored)).shape == expected
        if not fits:
            wrong.append(f"{mapping.name} {list(stored)} does not fit {'/'.join(mapping.path[1:])} {list(expected)}")
    if wrong:
        raise UserError(f"weights of another size: {first_few(wrong)}; check the model's sizes against the checkpoint")


def to_official(
    tree: Params, mappings: Sequence[TensorMapping], source: TensorSource
) -> Iterator[tuple[str, HostArray]]:
    """Yield official tensors from a tree shaped like the parameters, with the shapes that ``source`` has."""
    for name, group in group_by_name(mappings).items():
        shape = source.info(name).shape
        if group[0].qkv_index is not None:  # query, key and value fill a third each
            shape = (shape[0] // 3, *shape[1:])
        tensors = [mapping.to_tensor(get_param(tree, mapping), shape) for mapping in group]
        yield name, tensors[0] if len(tensors) == 1 else np.concatenate(tensors)
