"""The official release's state dict, tensor by tensor, as places in our parameter tree.

One list says everything: a :class:`Slot` for each official tensor (or third of one) that our model uses. What is not in
the list must be explained by a rule (tied, dead, a buffer, the teacher's), or loading stops.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from mplug2_jax.errors import UserError
from mplug2_jax.model.config import ModelConfig
from mplug2_jax.model.fusion import mixing_layers
from mplug2_jax.model.mplug2 import ModelDef, Params

Path = tuple[str, ...]
Layout = Literal["same", "linear", "patch", "pointwise", "depthwise"]
HostArray = np.ndarray[Any, np.dtype[Any]]


@runtime_checkable
class TensorSource(Protocol):
    """A file of named tensors that are read one at a time."""

    def names(self) -> list[str]:
        """All names, in the file's order."""

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one tensor, without reading it."""

    def read(self, name: str) -> HostArray:
        """One tensor."""


@dataclasses.dataclass(frozen=True)
class Slot:
    """An official tensor and the place it fills: ``path``, at ``layer`` of a stack; ``third`` cuts a fused q, k, v."""

    name: str
    path: Path
    layer: int | None = None
    layout: Layout = "linear"
    third: int | None = None

    def to_ours(self, tensor: HostArray) -> HostArray:
        """The official array in our layout."""
        if self.third is not None:
            tensor = np.split(tensor, 3)[self.third]
        match self.layout:
            case "linear":
                return tensor.T
            case "patch":  # [w, colour, (dt,) dy, dx] -> rows (dt, dy, dx, colour)
                if tensor.ndim == 4:
                    tensor = tensor[:, :, None]
                return tensor.transpose(2, 3, 4, 1, 0).reshape(-1, tensor.shape[0])
            case "pointwise":
                return tensor.reshape(tensor.shape[:2]).T
            case "depthwise":  # [c, 1, 3, 1, 1] -> [3, c]
                return tensor.reshape(tensor.shape[0], -1).T
        return tensor

    def to_theirs(self, value: HostArray, shape: tuple[int, ...]) -> HostArray:
        """Our array in the official layout; ``shape`` is the official tensor's (of the third, where it is cut)."""
        if self.layout == "patch":
            taken, side = (1 if len(shape) == 4 else shape[2]), shape[-1]
            value = value.reshape(taken, side, side, 3, shape[0]).transpose(4, 3, 0, 1, 2)
        elif self.layout != "same":
            value = value.T
        return value.reshape(shape)


_NORM: Mapping[str, str] = {"weight": "scale", "bias": "bias"}


def _linear(name: str, path: Path, layer: int | None = None, layout: Layout = "linear") -> Iterator[Slot]:
    yield Slot(f"{name}.weight", (*path, "kernel"), layer, layout)
    yield Slot(f"{name}.bias", (*path, "bias"), layer, "same")


def _norm(name: str, path: Path, layer: int | None = None) -> Iterator[Slot]:
    for theirs, ours in _NORM.items():
        yield Slot(f"{name}.{theirs}", (*path, ours), layer, "same")


def _bert_attention(name: str, path: Path, norm: Path, layer: int) -> Iterator[Slot]:
    for which in ("query", "key", "value"):
        yield from _linear(f"{name}.self.{which}", (*path, which), layer)
    yield from _linear(f"{name}.output.dense", (*path, "out"), layer)
    yield from _norm(f"{name}.output.LayerNorm", norm, layer)


def _bert_layer(name: str, path: Path, layer: int, *, cross: bool) -> Iterator[Slot]:
    yield from _bert_attention(f"{name}.attention", (*path, "self_attention"), (*path, "self_norm"), layer)
    if cross:
        yield from _bert_attention(f"{name}.crossattention", (*path, "cross_attention"), (*path, "cross_norm"), layer)
    yield from _linear(f"{name}.intermediate.dense", (*path, "mlp", "up"), layer)
    yield from _linear(f"{name}.output.dense", (*path, "mlp", "down"), layer)
    yield from _norm(f"{name}.output.LayerNorm", (*path, "mlp_norm"), layer)


def _embeddings(name: str, path: Path) -> Iterator[Slot]:
    for theirs, ours in (("word", "words"), ("position", "positions"), ("token_type", "types")):
        yield Slot(f"{name}.{theirs}_embeddings.weight", (*path, ours), layout="same")
    yield from _norm(f"{name}.LayerNorm", (*path, "norm"))


def _vision(config: ModelConfig, *, temporal: bool) -> Iterator[Slot]:
    prefix = "visual_encoder.visual"
    yield Slot(f"{prefix}.conv1.weight", ("vision", "patch", "kernel"), layout="patch")
    yield Slot(f"{prefix}.class_embedding", ("vision", "class_token"), layout="same")
    yield Slot(f"{prefix}.positional_embedding", ("vision", "positions"), layout="same")
    yield from _norm(f"{prefix}.ln_pre", ("vision", "norm_pre"))
    yield from _norm(f"{prefix}.ln_post", ("vision", "norm_post"))
    ours: Path = ("vision", "blocks")
    for i in range(config.vision_layers):
        block = f"{prefix}.transformer.resblocks.{i}"
        for third, which in enumerate(("query", "key", "value")):
            yield Slot(f"{block}.attn.in_proj_weight", (*ours, "attention", which, "kernel"), i, "linear", third)
            yield Slot(f"{block}.attn.in_proj_bias", (*ours, "attention", which, "bias"), i, "same", third)
        yield from _linear(f"{block}.attn.out_proj", (*ours, "attention", "out"), i)
        yield from _linear(f"{block}.mlp.c_fc", (*ours, "mlp", "up"), i)
        yield from _linear(f"{block}.mlp.c_proj", (*ours, "mlp", "down"), i)
        for n in ("1", "2"):
            yield from _norm(f"{block}.ln_{n}", (*ours, f"norm_{n}"), i)
            if temporal:
                unit, path = f"{block}.lmhra{n}", (*ours, f"temporal_{n}")
                yield from _norm(f"{unit}.ln", (*path, "norm"), i)
                yield from _linear(f"{unit}.down_proj", (*path, "down"), i, "pointwise")
                yield from _linear(f"{unit}.conv", path, i, "depthwise")
                yield from _linear(f"{unit}.up_proj", (*path, "up"), i, "pointwise")


def slots(config: ModelConfig, parts: tuple[str, ...], fusion_start: int) -> list[Slot]:
    """Every official tensor that a model of these parts uses. ``fusion_start``: the first fusion layer in use."""
    found: list[Slot] = []
    if "vision" in parts:
        found += _vision(config, temporal="temporal" in parts)
        if config.vision_width != config.width:
            found += _linear("visn_fc", ("vision_projection", "dense"))
            found += _norm("visn_layer_norm", ("vision_projection", "norm"))
    if "text" in parts:
        found += _embeddings("text_encoder.embeddings", ("text", "embeddings"))
        for i in range(config.text_layers):
            found += _bert_layer(f"text_encoder.encoder.layer.{i}", ("text", "layers"), i, cross=False)
    if "universal" in parts:
        visual = "vision" in parts
        for i in range(config.universal_layers):
            name = f"text_encoder.encoder.layer.{config.text_layers + i}"
            found += _bert_layer(name, ("universal", "layers"), i, cross=visual)
        if visual:
            name = f"text_encoder.encoder.layer.{config.text_layers}.latents"
            found.append(Slot(name, ("universal", "latents"), layout="same"))
            found += _norm("visn_emb_norm", ("universal", "visual_norm"))
    if "fusion" in parts:
        mixing = mixing_layers(config.fusion_layers, config.fusion_stride)
        read = mixed = 0
        for j in range(config.fusion_layers):
            name = f"fusion_encoder.encoder.layer.{fusion_start + j}"
            if j in mixing:
                found += _bert_layer(name, ("fusion", "mixing"), mixed, cross=False)
                mixed += 1
            else:
                found += _bert_layer(name, ("fusion", "layers"), read, cross=True)
                read += 1
    if "decoder" in parts:
        found += _embeddings("text_decoder.bert.embeddings", ("decoder", "embeddings"))
        for i in range(config.decoder_layers):
            found += _bert_layer(f"text_decoder.bert.encoder.layer.{i}", ("decoder", "layers"), i, cross=True)
        head = "text_decoder.cls.predictions"
        found += _linear(f"{head}.transform.dense", ("decoder", "head", "dense"))
        found += _norm(f"{head}.transform.LayerNorm", ("decoder", "head", "norm"))
        found.append(Slot(f"{head}.bias", ("decoder", "head", "bias"), layout="same"))
    if "contrastive" in parts:
        found += _linear("vision_proj", ("contrastive", "visual"))
        found += _linear("text_proj", ("contrastive", "text"))
        found.append(Slot("temp", ("contrastive", "temperature"), layout="same"))
    if "matching" in parts:
        found += _linear("itm_head", ("matching", "dense"))
    return found


TIED: Mapping[str, str] = {
    "text_decoder.cls.predictions.decoder.weight": "text_decoder.bert.embeddings.word_embeddings.weight",
    "text_decoder.cls.predictions.decoder.bias": "text_decoder.cls.predictions.bias",
}

_MODULES = (
    "visual_encoder", "text_encoder", "fusion_encoder", "text_decoder", "visn_emb_norm", "visn_fc", "visn_layer_norm",
    "vision_proj", "text_proj",
)  # fmt: skip


def teacher_name(name: str) -> str:
    """The teacher's tensor beside a student's: the release appends ``_m`` to modules; bare tensors have one copy."""
    module, dot, rest = name.partition(".")
    return f"{module}_m{dot}{rest}" if module in _MODULES else name


def student_name(name: str) -> str:
    """The student's tensor beside a teacher's; the name itself if it is not a teacher's."""
    module, dot, rest = name.partition(".")
    return f"{module[:-2]}{dot}{rest}" if module.endswith("_m") and module[:-2] in _MODULES else name


def dead_rules(config: ModelConfig, parts: tuple[str, ...], fusion_start: int) -> list[tuple[re.Pattern[str], str]]:
    """Which tensors of the release nothing reads, and why; the first rule that matches a whole name explains it."""
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
    for j in mixing_layers(config.fusion_layers, config.fusion_stride):
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
    return [(re.compile(pattern), why) for pattern, why in rules]


Fate = Literal["used", "tied", "dead", "aside"]


@dataclasses.dataclass(frozen=True)
class Account:
    """What became of every tensor of a source: (fate, where it went or why it was left)."""

    rows: Mapping[str, tuple[Fate, str]]

    def count(self, fate: Fate) -> int:
        """How many tensors met this fate."""
        return sum(f == fate for f, _ in self.rows.values())

    def __str__(self) -> str:
        fates: tuple[Fate, ...] = ("used", "tied", "dead", "aside")
        return ", ".join(f"{self.count(f)} {f}" for f in fates) + f" of {len(self.rows)}"


Wanted = dict[str, list[Slot]]  # stored name -> the places that it fills


def account_for(
    names: Sequence[str], definition: ModelDef, fusion_start: int, *, teacher: bool = False
) -> tuple[Wanted, Account]:
    """What to read of a checkpoint with these names, and what becomes of every one of them.

    Raises:
        UserError: tensors that nothing explains, and missing ones.
    """
    by_name = _by_name(slots(definition.config, definition.parts, fusion_start))
    rules = dead_rules(definition.config, definition.parts, fusion_start)

    def explain(name: str) -> tuple[Fate, str] | None:
        if name in by_name:
            return "used", ", ".join("/".join(slot.path) for slot in by_name[name])
        if TIED.get(name) in by_name:
            return "tied", TIED[name]
        return next((("dead", why) for pattern, why in rules if pattern.fullmatch(name)), None)

    stored = {(teacher_name(name) if teacher else name): its_slots for name, its_slots in by_name.items()}
    rows: dict[str, tuple[Fate, str]] = {}
    unexpected: list[str] = []
    for name in names:
        plain = student_name(name)
        fate = explain(plain)
        if fate is None:
            unexpected.append(name)
        elif fate[0] == "used" and name not in stored:
            rows[name] = ("aside", "the student's copy" if teacher else "the teacher's copy")
        else:
            rows[name] = fate
    present = set(names)
    _refuse(unexpected, missing=[name for name in stored if name not in present])
    return stored, Account(rows)


def load_official(
    source: TensorSource, definition: ModelDef, fusion_start: int, *, teacher: bool = False
) -> tuple[Params, Account]:
    """Reads official weights into our parameter tree, as float32 on the host, and accounts for every tensor.

    With ``teacher`` the teacher's copy is loaded and the student's stays aside, else the other way round.

    Raises:
        UserError: tensors that nothing explains, missing ones, or wrong shapes; all of them at once.
    """
    wanted, account = account_for(source.names(), definition, fusion_start, teacher=teacher)
    params: Params = {}
    wrong: list[str] = []
    for name, its_slots in wanted.items():
        tensor = source.read(name)
        for slot in its_slots:
            shape = _shape_at(definition.shapes, slot)
            ours = slot.to_ours(tensor) if tensor.ndim == 0 or slot.third is None or len(tensor) % 3 == 0 else tensor
            if ours.shape == (shape if slot.layer is None else shape[1:]):
                _place(params, slot, shape, ours)
            else:
                wrong.append(f"{name} {list(tensor.shape)} does not fit {'/'.join(slot.path)} {list(shape)}")
    if wrong:
        raise UserError(f"weights of another size: {_examples(wrong)}; check the model's sizes against the checkpoint")
    return params, account


def _refuse(unexpected: list[str], missing: list[str]) -> None:
    if unexpected or missing:
        found = [f"{len(missing)} missing ({_examples(missing)})"] if missing else []
        found += [f"{len(unexpected)} unexpected ({_examples(unexpected)})"] if unexpected else []
        raise UserError(
            f"the checkpoint does not match the model: {' and '.join(found)}; nothing was loaded. "
            "Check the model's sizes and parts, or the file"
        )


def _examples(names: list[str], limit: int = 4) -> str:
    more = f", and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _shape_at(shapes: Params, slot: Slot) -> tuple[int, ...]:
    node: Any = shapes
    for key in slot.path:
        node = node[key]
    return tuple(node.shape)


def _place(params: Params, slot: Slot, shape: tuple[int, ...], value: HostArray) -> None:
    node = params
    for key in slot.path[:-1]:
        node = node.setdefault(key, {})
    if slot.layer is None:
        node[slot.path[-1]] = np.array(value, np.float32, order="C")
    else:
        node.setdefault(slot.path[-1], np.empty(shape, np.float32))[slot.layer] = value


def to_official(tree: Params, found: list[Slot], source: TensorSource) -> Iterator[tuple[str, HostArray]]:
    """A tree shaped like the parameters as official tensors, with the shapes that ``source`` has."""
    for name, its_slots in _by_name(found).items():
        shape = source.shape(name)
        one = shape if its_slots[0].third is None else (shape[0] // 3, *shape[1:])
        cuts = [slot.to_theirs(take(tree, slot), one) for slot in its_slots]
        yield name, cuts[0] if len(cuts) == 1 else np.concatenate(cuts)


def _by_name(found: list[Slot]) -> Wanted:
    """Slots by the official tensor that they are cut from."""
    by_name: Wanted = {}
    for slot in found:
        by_name.setdefault(slot.name, []).append(slot)
    return by_name


def take(tree: Params, slot: Slot) -> HostArray:
    """What stands in one slot of a tree shaped like the parameters, still in our layout."""
    node: Any = tree
    for key in slot.path:
        node = node[key]
    return np.asarray(node if slot.layer is None else node[slot.layer])
