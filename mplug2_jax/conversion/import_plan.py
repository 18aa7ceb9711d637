"""What an import will do, known before an array is read: which tensor goes where, and what stays fresh."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from mplug2_jax.conversion.layouts import bert, clip, official
from mplug2_jax.conversion.layouts.identify import Found, Task, identify
from mplug2_jax.conversion.layouts.official import check_shapes
from mplug2_jax.conversion.layouts.schemes import Fate, Scheme, account_for
from mplug2_jax.conversion.layouts.slots import Slot
from mplug2_jax.errors import UserError
from mplug2_jax.model.config import ModelConfig
from mplug2_jax.model.mplug2 import ModelDef, define_model

StatePath = tuple[str, ...]  # "params" or "teacher", then the place in the tree
POSITIONS: StatePath = ("vision", "positions")


@dataclasses.dataclass(frozen=True)
class Joint:
    """One source's part in an import: what becomes of each of its tensors."""

    found: Found
    tied: Mapping[str, str]
    fates: Mapping[str, tuple[Fate, str]]


@dataclasses.dataclass(frozen=True)
class ImportPlan:
    """Everything that is known before an array is read."""

    definition: ModelDef
    title: str
    joints: Sequence[Joint]
    state: Mapping[StatePath, jax.ShapeDtypeStruct]  # every array of the checkpoint
    filled: Mapping[StatePath, Sequence[tuple[Joint, Slot]]]  # what fills it; absent: fresh
    origin: Mapping[str, Any]

    @property
    def notes(self) -> list[str]:
        """What was assumed of the sources, and what is theirs alone."""
        notes = [text for joint in self.joints for text in joint.found.assumed]
        return notes + activation_notes(self.definition.config, self.definition.parts)

    @property
    def fresh(self) -> list[StatePath]:
        """Arrays that no source fills."""
        return [path for path in self.state if path not in self.filled]


def activation_notes(config: ModelConfig, parts: Sequence[str]) -> list[str]:
    """A sentence where a model is not computed as the release's own code would."""
    if "vision" not in parts or config.vision_activation == "quick_gelu":
        return []
    return ["the vision tower computes exact GELU: an export of it is for our PyTorch runtime, not the release's code"]


def plan_import(
    paths: Sequence[Path],
    *,
    parts: Sequence[str] | None = None,
    task: Task | None = None,
    image_size: int | None = None,
) -> ImportPlan:
    """Reads names and shapes of all sources, and finds a place for everything.

    Args:
        paths: an official checkpoint alone, or a CLIP, a BERT, or both.
        parts: parts of the model (default: those of the official task, or all that start from the sources).
        task: which of the release's models an official checkpoint is of, where it does not say.
        image_size: pixels of the model's position table (default: the source's own).

    Raises:
        UserError: sources that are no checkpoints or do not go together, or tensors without a place.
    """
    return plan_found([identify(path) for path in paths], parts=parts, task=task, image_size=image_size)


def plan_found(
    found: Sequence[Found],
    *,
    parts: Sequence[str] | None = None,
    task: Task | None = None,
    image_size: int | None = None,
) -> ImportPlan:
    """As :func:`plan_import`, of sources that are open already."""
    kinds = [f.kind for f in found]
    if len(set(kinds)) != len(kinds) or (len(found) > 1 and "official" in kinds):
        raise UserError(
            f"{', '.join(str(f.path) for f in found)} are {', '.join(f.title for f in found)}: expected one official "
            "checkpoint, or at most one CLIP and one BERT"
        )
    if kinds == ["official"]:
        return _plan_official(found[0], task, parts, image_size)
    return _plan_joined(found, parts, image_size)


def _plan_official(found: Found, task: Task | None, parts: Sequence[str] | None, image_size: int | None) -> ImportPlan:
    task = task or found.task
    if task is None:
        raise UserError(
            f"{found.path} may be the release's caption or its videoqa model, whose tensors have the same names: say "
            "which with --task caption or --task videoqa"
        )
    config, fusion_start = found.sizes
    config = dataclasses.replace(config, image_size=image_size or config.image_size)
    teacher = found.has_teacher
    own = official.CAPTION_PARTS if task == "caption" else official.QUESTION_PARTS
    definition = define_model(config, tuple(parts) if parts else own)
    scheme = official.official_scheme(config, definition.parts, fusion_start, teacher=teacher)
    origin = {"layout": "official", "task": task, "fusion_start": fusion_start, "teacher": teacher}
    title = f"official {task}" + (" with its teacher" if teacher else "")
    return _plan(definition, title, [(found, scheme)], origin, teacher=teacher)


def _plan_joined(found: Sequence[Found], parts: Sequence[str] | None, image_size: int | None) -> ImportPlan:
    by_kind = {f.kind: f for f in found}
    sizes: dict[str, Any] = {}
    for f in found:
        sizes |= f.fields
    if "bert" not in by_kind:  # the text side is not built; its sizes follow the tower
        width = sizes["vision_width"]
        sizes |= {
            "width": width, "heads": sizes["vision_heads"], "mlp_width": 4 * width, "text_layers": 0,
            "fusion_layers": 0, "decoder_layers": 0,
        }  # fmt: skip
    if "clip" not in by_kind:
        sizes |= {"vision_width": 64, "vision_layers": 1, "vision_heads": 1, "patch_size": 16, "image_size": 224}
    config = ModelConfig(**(sizes | ({"image_size": image_size} if image_size else {})))
    head = "bert" in by_kind and by_kind["bert"].has_head
    own = {
        "clip": ("vision",),
        "bert": ("text", "universal", *(("mlm",) if head else ())),
        "clip bert": (*official.QUESTION_PARTS, *(("mlm",) if head else ())),
    }
    definition = define_model(config, tuple(parts) if parts else own[" ".join(sorted(by_kind, reverse=True))])
    schemes = []
    for f in found:
        if f.kind == "bert":
            schemes.append((f, bert.bert_scheme(config, definition.parts, head=head)))
        elif f.layout == "openai":
            schemes.append((f, clip.openai_scheme(config)))
        else:
            schemes.append((f, clip.hugging_face_scheme(config)))
    prefixed = [
        (f, dataclasses.replace(s, slots=tuple(dataclasses.replace(x, path=("params", *x.path)) for x in s.slots)))
        for f, s in schemes
    ]
    title = " + ".join(f.title for f in found)
    return _plan(definition, title, prefixed, {"layout": title}, teacher=False)


def _plan(
    definition: ModelDef,
    title: str,
    schemes: Sequence[tuple[Found, Scheme]],
    origin: Mapping[str, Any],
    *,
    teacher: bool,
) -> ImportPlan:
    trees = {"params": definition.shapes} | ({"teacher": definition.shapes} if teacher else {})
    state = {tuple(key.key for key in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(trees)}
    joints: list[Joint] = []
    filled: dict[StatePath, list[tuple[Joint, Slot]]] = {}
    for found, scheme in schemes:
        _, account = account_for(found.source.names(), scheme)
        resized = [slot for slot in scheme.slots if slot.path[1:] == POSITIONS]
        check_shapes(found.source, dataclasses.replace(scheme, slots=tuple(set(scheme.slots) - set(resized))), trees)
        joints.append(Joint(found, scheme.tied, account.rows))
        for slot in scheme.slots:
            filled.setdefault(slot.path, []).append((joints[-1], slot))
    for path, pieces in filled.items():
        covered = {slot.layer for _, slot in pieces}
        assert covered == {None} or len(covered) == state[path].shape[0], path
    return ImportPlan(definition, title, joints, state, filled, origin)
