"""The official release's state dict, tensor by tensor, as places in our parameter tree.

One list says everything: a :class:`Slot` for each official tensor (or third of one) that our model uses. What is not in
the list must be explained by a rule (tied, dead, a buffer, the teacher's), or loading stops.
"""

import dataclasses
import re
from collections.abc import Iterator, Sequence

import numpy as np

from mplug2_jax.conversion.files.sources import HostArray, TensorSource
from mplug2_jax.conversion.layouts.bert import HEAD, embedding_slots, head_slots, layer_slots
from mplug2_jax.conversion.layouts.clip import vision_slots
from mplug2_jax.conversion.layouts.schemes import (
    Account,
    DeadRules,
    Scheme,
    account_for,
    dead_rules,
    examples,
    without_wrapper,
)
from mplug2_jax.conversion.layouts.slots import Slot, by_name, linear, norm, shape_at, take
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
    """The first fusion layer in use where the release's stack is as deep as its text encoder, as in all its sizes."""
    return max(0, config.text_layers + config.universal_layers - config.fusion_layers)


def slots(config: ModelConfig, parts: Sequence[str], fusion_start: int) -> list[Slot]:
    """Every official tensor that a model of these parts uses. ``fusion_start``: the first fusion layer in use."""
    found: list[Slot] = []
    if "vision" in parts:
        found += vision_slots("visual_encoder.visual", config.vision_layers, temporal="temporal" in parts)
        if config.vision_width != config.width:
            found += linear("visn_fc", ("vision_projection", "dense"))
            found += norm("visn_layer_norm", ("vision_projection", "norm"))
    if "text" in parts:
        found += embedding_slots("text_encoder.embeddings", ("text", "embeddings"))
        for i in range(config.text_layers):
            found += layer_slots(f"text_encoder.encoder.layer.{i}", ("text", "layers"), i, cross=False)
    if "universal" in parts:
        visual = "vision" in parts
        for i in range(config.universal_layers):
            name = f"text_encoder.encoder.layer.{config.text_layers + i}"
            found += layer_slots(name, ("universal", "layers"), i, cross=visual)
        if visual:
            name = f"text_encoder.encoder.layer.{config.text_layers}.latents"
            found.append(Slot(name, ("universal", "latents"), layout="same"))
            found += norm("visn_emb_norm", ("universal", "visual_norm"))
    if "fusion" in parts:
        found += _fusion(config, fusion_start)
    if "decoder" in parts:
        found += embedding_slots("text_decoder.bert.embeddings", ("decoder", "embeddings"))
        for i in range(config.decoder_layers):
            found += layer_slots(f"text_decoder.bert.encoder.layer.{i}", ("decoder", "layers"), i, cross=True)
        found += head_slots(f"text_decoder.{HEAD}", ("decoder", "head"))
    if "contrastive" in parts:
        found += linear("vision_proj", ("contrastive", "visual"))
        found += linear("text_proj", ("contrastive", "text"))
        found.append(Slot("temp", ("contrastive", "temperature"), layout="same"))
    if "matching" in parts:
        found += linear("itm_head", ("matching", "dense"))
    return found


def _fusion(config: ModelConfig, fusion_start: int) -> Iterator[Slot]:
    mixing = joint_attention_layers(config.fusion_layers, config.fusion_stride)
    read = mixed = 0
    for j in range(config.fusion_layers):
        name = f"fusion_encoder.encoder.layer.{fusion_start + j}"
        if j in mixing:
            yield from layer_slots(name, ("fusion", "mixing"), mixed, cross=False)
            mixed += 1
        else:
            yield from layer_slots(name, ("fusion", "layers"), read, cross=True)
            read += 1


def teacher_name(name: str) -> str:
    """The teacher's tensor beside a student's: the release appends ``_m`` to modules; bare tensors have one copy."""
    module, dot, rest = name.partition(".")
    return f"{module}_m{dot}{rest}" if module in _MODULES else name


def student_name(name: str) -> str:
    """The student's tensor beside a teacher's; the name itself if it is not a teacher's."""
    module, dot, rest = name.partition(".")
    return f"{module[:-2]}{dot}{rest}" if module.endswith("_m") and module[:-2] in _MODULES else name


def canonical_names(names: Sequence[str]) -> dict[str, str]:
    """Names as the release's models have them: ``{canonical: stored}``.

    Undone are the prefixes of wrappers (``module.``) and those of its pretraining checkpoints (``text_encoder.bert.``,
    ``fusion_encoder.bert.``, ``fusion_encoder.fusion.``).

    Raises:
        UserError: two tensors that would have one name.
    """
    pretrained = r"^(text_encoder(?:_m)?)\.bert\.|^(fusion_encoder(?:_m)?)\.(?:bert|fusion)\."
    own = {*_MODULES, *(f"{module}_m" for module in _MODULES)}
    return without_wrapper(names, own, lambda name: re.sub(pretrained, r"\1\2.", name))


def is_official(names: Sequence[str]) -> bool:
    """Whether canonical names are the release's."""
    return "visual_encoder.visual.conv1.weight" in names and any(name.startswith("text_decoder.") for name in names)


def _dead_rules(config: ModelConfig, parts: Sequence[str], fusion_start: int) -> DeadRules:
    """Which tensors of the release nothing reads, and why."""
    rules: list[tuple[str, str]] = [
        (r".*\.position_ids", "buffer: the positions 0, 1, 2, ..."),
        (r"visual_encoder\.visual\.proj", "CLIP's projection, never called"),
        (r"visual_encoder\.(?!visual\.).*", "CLIP's text tower, never called"),
        (r".*\.(intermediate|output)_vision\..*", "separate vision MLP, commented out in the release"),
        (r"text_decoder\..*\.latents", "latents made by the layer class, never read in the decoder"),
        (r"fusion_encoder\.embeddings\..*", "fusion starts from encoded text, never from ids"),
        (r"(image|text|idx)_queue|queue_ptr", "state of the contrastive queue"),
    ]
    if fusion_start:
        layers = "|".join(str(i) for i in range(fusion_start))
        rules.append((rf"fusion_encoder\.encoder\.layer\.({layers})\..*", "fusion layer below the first in use"))
    for j in joint_attention_layers(config.fusion_layers, config.fusion_stride):
        name = rf"fusion_encoder\.encoder\.layer\.{fusion_start + j}\.crossattention\..*"
        rules.append((name, "cross attention of a fusion layer that mixes instead"))
    if "fusion" not in parts:
        rules.append((r"fusion_encoder\..*", "no fusion in this model"))
    if "text" not in parts:
        rules.append((r"text_encoder\.embeddings\..*", "no text encoder in this model"))
        layers = "|".join(str(i) for i in range(config.text_layers))
        rules.append((rf"text_encoder\.encoder\.layer\.({layers})\..*", "no text encoder in this model"))
    if "contrastive" not in parts:
        rules.append((r"(vision|text)_proj\..*|temp", "no contrastive head in this model"))
    if "matching" not in parts:
        rules.append((r"itm_head\..*", "no matching head in this model"))
    if "temporal" not in parts:
        rules.append((r"visual_encoder\.visual\..*\.lmhra[12]\..*", "no temporal units in this model"))
    return dead_rules(*rules)


def official_scheme(
    config: ModelConfig, parts: Sequence[str], fusion_start: int, *, student: bool = True, teacher: bool = False
) -> Scheme:
    """The release's names for a state with the trees ``params`` (the student) and ``teacher``, as asked."""
    own = slots(config, parts, fusion_start)

    def copy(tree: str) -> list[Slot]:
        named = teacher_name if tree == "teacher" else str
        return [dataclasses.replace(s, name=named(s.name), path=(tree, *s.path)) for s in own]

    found = (copy("params") if student else []) + (copy("teacher") if teacher else [])
    aside: dict[str, str] = {}
    if not student:
        aside |= {slot.name: "the student's copy" for slot in own if teacher_name(slot.name) != slot.name}
    if not teacher:
        aside |= {teacher_name(s.name): "the teacher's copy" for s in own if teacher_name(s.name) != s.name}
    tied = {**TIED, **{teacher_name(a): teacher_name(b) for a, b in TIED.items()}}
    # A copy that is not asked for leaves its ties aside with it.
    aside |= {name: aside[tie] for name, tie in tied.items() if tie in aside}
    return Scheme(tuple(found), tied, _dead_rules(config, parts, fusion_start), student_name, aside)


def load_official(
    source: TensorSource, definition: ModelDef, fusion_start: int, *, teacher: bool = False
) -> tuple[Params, Account]:
    """Reads official weights into our parameter tree, as float32 on the host, and accounts for every tensor.

    With ``teacher`` the teacher's copy is loaded and the student's stays aside, else the other way round.

    Raises:
        UserError: tensors that nothing explains, missing ones, or wrong shapes; all of them at once.
    """
    tree = "teacher" if teacher else "params"
    scheme = official_scheme(definition.config, definition.parts, fusion_start, student=not teacher, teacher=teacher)
    wanted, account = account_for(source.names(), scheme)
    check_shapes(source, scheme, {tree: definition.shapes})
    loaded: Params = {}
    for name, its_slots in wanted.items():
        tensor = source.read(name)
        for slot in its_slots:
            _place(loaded, slot, {tree: definition.shapes}, slot.to_ours(tensor))
    return loaded[tree], account


def check_shapes(source: TensorSource, scheme: Scheme, shapes: Params) -> None:
    """Compares every tensor's shape with that of its place.

    Raises:
        UserError: lists those that do not fit.
    """
    wrong = []
    for slot in scheme.slots:
        stored, ours = source.info(slot.name).shape, shape_at(shapes, slot)
        cut = stored if slot.third is None else (stored[0] // 3, *stored[1:])
        fits = slot.third is None or stored[0] % 3 == 0
        fits = fits and slot.to_ours(np.broadcast_to(np.uint8(0), stored)).shape == ours if len(cut) else stored == ours
        if not fits:
            wrong.append(f"{slot.name} {list(stored)} does not fit {'/'.join(slot.path[1:])} {list(ours)}")
    if wrong:
        raise UserError(f"weights of another size: {examples(wrong)}; check the model's sizes against the checkpoint")


def _place(tree: Params, slot: Slot, shapes: Params, value: HostArray) -> None:
    node, whole = tree, shapes
    for key in slot.path[:-1]:
        node, whole = node.setdefault(key, {}), whole[key]
    if slot.layer is None:
        node[slot.path[-1]] = np.array(value, np.float32, order="C")
    else:
        node.setdefault(slot.path[-1], np.empty(whole[slot.path[-1]].shape, np.float32))[slot.layer] = value


def to_official(tree: Params, found: list[Slot], source: TensorSource) -> Iterator[tuple[str, HostArray]]:
    """A tree shaped like the parameters as official tensors, with the shapes that ``source`` has."""
    for name, its_slots in by_name(found).items():
        yield name, join(tree, its_slots, source.info(name).shape)


def join(tree: Params, its_slots: Sequence[Slot], shape: tuple[int, ...]) -> HostArray:
    """One official tensor of a shape from the places that it fills."""
    one = shape if its_slots[0].third is None else (shape[0] // 3, *shape[1:])
    cuts = [slot.to_theirs(take(tree, slot), one) for slot in its_slots]
    return cuts[0] if len(cuts) == 1 else np.concatenate(cuts)
