"""Plan an import before any array is read: which tensor fills which parameter, and which parameters are initialized."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from mplug2_jax.conversion.layouts import bert, clip, official
from mplug2_jax.conversion.layouts.identify import DetectedCheckpoint, OfficialTask, identify
from mplug2_jax.conversion.layouts.name_mapping import NameMapping, SourceDisposition, match_names
from mplug2_jax.conversion.layouts.official import check_shapes
from mplug2_jax.conversion.layouts.tensor_mapping import ParamPath, TensorMapping
from mplug2_jax.errors import UserError
from mplug2_jax.model.config import ModelConfig
from mplug2_jax.model.mplug2 import ModelDef, define_model

StatePath = ParamPath  # "params" or "teacher", then the path of a parameter
POSITIONS: StatePath = ("vision", "positions")


@dataclasses.dataclass(frozen=True)
class SourceMapping:
    """One source of an import, and the disposition of each of its tensors."""

    checkpoint: DetectedCheckpoint
    tied: Mapping[str, str]
    dispositions: Mapping[str, tuple[SourceDisposition, str]]


@dataclasses.dataclass(frozen=True)
class ImportPlan:
    """Everything about an import that is known before an array is read."""

    model_def: ModelDef
    title: str
    sources: Sequence[SourceMapping]
    state: Mapping[StatePath, jax.ShapeDtypeStruct]  # every array of the checkpoint
    pieces: Mapping[StatePath, Sequence[tuple[SourceMapping, TensorMapping]]]  # the tensors that fill an array
    origin: Mapping[str, Any]

    @property
    def notes(self) -> list[str]:
        """Return what is assumed about the sources, and where the release's code would compute something else."""
        notes = [note for source in self.sources for note in source.checkpoint.assumptions]
        return notes + activation_notes(self.model_def.config, self.model_def.parts)

    @property
    def initialized(self) -> list[StatePath]:
        """Return the arrays that no source fills."""
        return [path for path in self.state if path not in self.pieces]


def activation_notes(config: ModelConfig, parts: Sequence[str]) -> list[str]:
    """Return a sentence if the release's own code would compute the model differently."""
    if "vision" not in parts or config.vision_activation == "quick_gelu":
        return []
    return ["the vision tower computes exact GELU: use its exports with our PyTorch runtime, not the release's code"]


def plan_import(
    paths: Sequence[Path], *, parts: Sequence[str] | None = None, task: OfficialTask | None = None,
    image_size: int | None = None,
) -> ImportPlan:  # fmt: skip
    """Read names and shapes of all sources, and map every tensor.

    Args:
        paths: an official checkpoint alone, or a CLIP, a BERT, or both.
        parts: parts of the model (default: those of the official task, or all that the sources initialize).
        task: which of the release's two models an official checkpoint is, if its files do not tell.
        image_size: pixels of the model's position table (default: the source's).

    Raises:
        UserError: the sources are not checkpoints or do not go together, or tensors are unexpected or missing.
    """
    checkpoints = [identify(path) for path in paths]
    kinds = [checkpoint.kind for checkpoint in checkpoints]
    if len(set(kinds)) != len(kinds) or (len(checkpoints) > 1 and "official" in kinds):
        raise UserError(
            f"{', '.join(str(c.path) for c in checkpoints)} are {', '.join(c.title for c in checkpoints)}: expected "
            "one official checkpoint, or at most one CLIP and one BERT"
        )
    if kinds == ["official"]:
        return _plan_official(checkpoints[0], task, parts, image_size)
    return _plan_clip_and_bert(checkpoints, parts, image_size)


def _plan_official(
    checkpoint: DetectedCheckpoint, task: OfficialTask | None, parts: Sequence[str] | None, image_size: int | None
) -> ImportPlan:
    task = task or checkpoint.task
    if task is None:
        raise UserError(
            f"{checkpoint.path} may be the release's caption or its videoqa model, whose tensors have the same names: "
            "choose with --task caption or --task videoqa"
        )
    config, fusion_start = checkpoint.sizes
    config = dataclasses.replace(config, image_size=image_size or config.image_size)
    teacher = checkpoint.has_teacher
    model_def = define_model(config, tuple(parts) if parts else official.TASK_PARTS[task])
    name_mapping = official.map_official_names(config, model_def.parts, fusion_start, teacher=teacher)
    origin = {"layout": "official", "task": task, "fusion_start": fusion_start, "teacher": teacher}
    title = f"official {task}" + (" with its teacher" if teacher else "")
    return _plan(model_def, title, [(checkpoint, name_mapping)], origin, teacher=teacher)


def _plan_clip_and_bert(
    checkpoints: Sequence[DetectedCheckpoint], parts: Sequence[str] | None, image_size: int | None
) -> ImportPlan:
    by_kind = {checkpoint.kind: checkpoint for checkpoint in checkpoints}
    sizes: dict[str, Any] = {}
    for checkpoint in checkpoints:
        sizes |= checkpoint.model_fields
    if "bert" not in by_kind:  # the text layers are not built; their sizes follow the vision tower
        width = sizes["vision_width"]
        sizes |= {
            "width": width, "heads": sizes["vision_heads"], "mlp_width": 4 * width, "text_layers": 0,
            "fusion_layers": 0, "decoder_layers": 0,
        }  # fmt: skip
    if "clip" not in by_kind:
        sizes |= {"vision_width": 64, "vision_layers": 1, "vision_heads": 1, "patch_size": 16, "image_size": 224}
    config = ModelConfig(**(sizes | ({"image_size": image_size} if image_size else {})))
    head = "bert" in by_kind and by_kind["bert"].has_mlm_head
    if "bert" not in by_kind:
        default_parts: tuple[str, ...] = ("vision",)
    else:
        encoder = official.QUESTION_PARTS if "clip" in by_kind else ("text", "universal")
        default_parts = (*encoder, *(("mlm",) if head else ()))
    model_def = define_model(config, tuple(parts) if parts else default_parts)

    def name_mapping(checkpoint: DetectedCheckpoint) -> NameMapping:
        if checkpoint.kind == "bert":
            names = bert.map_bert_names(config, model_def.parts, head=head)
        else:
            names = (clip.map_openai_names if checkpoint.layout == "openai" else clip.map_hugging_face_names)(config)
        mappings = (dataclasses.replace(mapping, path=("params", *mapping.path)) for mapping in names.mappings)
        return dataclasses.replace(names, mappings=tuple(mappings))

    title = " + ".join(checkpoint.title for checkpoint in checkpoints)
    pairs = [(checkpoint, name_mapping(checkpoint)) for checkpoint in checkpoints]
    return _plan(model_def, title, pairs, {"layout": title}, teacher=False)


def _plan(
    model_def: ModelDef, title: str, name_mappings: Sequence[tuple[DetectedCheckpoint, NameMapping]],
    origin: Mapping[str, Any], *, teacher: bool,
) -> ImportPlan:  # fmt: skip
    trees = {"params": model_def.shapes} | ({"teacher": model_def.shapes} if teacher else {})
    state = {tuple(key.key for key in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(trees)}
    sources: list[SourceMapping] = []
    pieces: dict[StatePath, list[tuple[SourceMapping, TensorMapping]]] = {}
    for checkpoint, names in name_mappings:
        _, report = match_names(checkpoint.tensors.names(), names)
        fixed_size = tuple(mapping for mapping in names.mappings if mapping.path[1:] != POSITIONS)
        check_shapes(checkpoint.tensors, fixed_size, trees)
        sources.append(SourceMapping(checkpoint, names.tied, report.rows))
        for mapping in names.mappings:
            pieces.setdefault(mapping.path, []).append((sources[-1], mapping))
    for path, mappings in pieces.items():
        layers = {mapping.layer for _, mapping in mappings}
        assert layers == {None} or len(layers) == state[path].shape[0], path
    return ImportPlan(model_def, title, sources, state, pieces, origin)
