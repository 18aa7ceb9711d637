"""Plan an export before any array is read: every tensor of the state dict, and the parameters that fill it."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np

from data_pipelines.storage.paths import to_path
from data_pipelines.tokenizers import Tokenizer, load_tokenizer
from mplug2_jax.conversion.files.sources import DTYPES, SafetensorsSource, TensorInfo, TensorSource
from mplug2_jax.conversion.import_plan import StatePath
from mplug2_jax.conversion.layouts import official
from mplug2_jax.conversion.layouts.official_state import LEFTOVER_FILE, StateInfo, official_state, tied_to
from mplug2_jax.conversion.layouts.tensor_mapping import TensorMapping
from mplug2_jax.errors import UserError
from mplug2_jax.training.checkpoint.checkpoints import Checkpoints, open_checkpoint
from mplug2_jax.training.checkpoint.metadata import ModelMetadata
from mplug2_jax.training.optim.lora import stored_adapter
from mplug2_jax.training.workdir import WorkDir

EXPORT_DTYPES = {"float32": DTYPES["F32"], "float16": DTYPES["F16"], "bfloat16": DTYPES["BF16"]}


@dataclasses.dataclass(frozen=True)
class ExportPlan:
    """Everything about an export that is known before an array is read."""

    checkpoints: Checkpoints
    step: int
    model: ModelMetadata
    task: str
    fusion_start: int
    state: StateInfo  # the official state dict to write
    mappings: Sequence[TensorMapping]  # their paths begin with the tree that each is read from
    leftover: TensorSource | None
    skipped_parts: Sequence[str]  # parts that the official layout has no place for
    tree: str  # of the checkpoint, that holds the model's own weights: "params", or an average
    adapters: Mapping[StatePath, Mapping[str, StatePath]]  # LoRA pairs to merge into the kernels at these paths

    @property
    def teacher(self) -> bool:
        """Return whether the averaged copy is written too."""
        return any(name.startswith("text_decoder_m.") for name in self.state)

    @property
    def title(self) -> str:
        """Return a description of the output."""
        averaged = ", averaged weights" if self.tree != "params" else ""
        return f"official {self.task}" + (" with its teacher" if self.teacher else "") + averaged

    @property
    def workdir(self) -> WorkDir:
        """Return the work directory of the checkpoint's run."""
        return WorkDir(self.checkpoints.folder.parent)

    @property
    def tokenizer(self) -> Tokenizer | None:
        """Return the run's tokenizer, if its work directory has one."""
        folder = self.workdir.tokenizer_folder
        return load_tokenizer(folder) if folder.is_dir() else None

    @property
    def rounded(self) -> bool:
        """Return whether the parameters are written in a shorter dtype."""
        return any(self.state[mapping.name].dtype != np.float32 for mapping in self.mappings)

    @property
    def nbytes(self) -> int:
        """Return the bytes of all tensors."""
        return sum(info.nbytes for info in self.state.values())


def plan_export(
    path: Path, *, dtype: str = "float32", ema: bool | None = None, teacher: bool | None = None,
    leftover: Path | None = None,
) -> ExportPlan:  # fmt: skip
    """Find the checkpoint, and a tensor for each of its arrays.

    Args:
        path: work directory, checkpoints folder, or one step of it.
        dtype: of the floating-point tensors to write.
        ema: write the averaged weights as the model's own (default: if the run kept an average to be evaluated; a
            teacher counts as one only if ``ema`` is set).
        teacher: also write the averaged copy (default: if the checkpoint has one). Without one in the checkpoint, it
            repeats the model's own weights, as when the release's training starts.
        leftover: file with the tensors that the model ignores (default: the one that an import wrote, if the weights
            come from one). Without it, these tensors are initialized as in the release.

    Raises:
        UserError: there is no checkpoint, or its parts do not make a model of the release.
    """
    checkpoints, step = open_checkpoint(path)
    model = checkpoints.model_metadata(step)
    parts = model.parts
    task = next((t for t, needed in official.TASK_PARTS.items() if set(needed) <= set(parts)), "caption")
    official_parts = official.TASK_PARTS[task]
    missing = [part for part in official_parts if part not in parts]
    if missing:
        raise UserError(
            f"{path} has the parts {', '.join(parts)}; the release's {task} model also needs {', '.join(missing)}: "
            "export a checkpoint that has them"
        )
    config = model.config
    stored = checkpoints.array_specs(step)
    trees = {leaf[0] for leaf in stored}
    averaged = next((tree for tree in ("ema", "teacher") if tree in trees), None)
    if ema and averaged is None:
        raise UserError(f"{path} holds no averaged weights: export without --ema")
    tree = averaged if averaged and (averaged == "ema" if ema is None else ema) else "params"
    fusion_start = model.origin.get("fusion_start", official.default_fusion_start(config))
    with_teacher = "teacher" in trees if teacher is None else teacher
    names = official.map_official_names(config, official_parts, fusion_start, teacher=with_teacher)
    tree_of = {"params": tree, "teacher": "teacher" if "teacher" in trees else tree}

    def stored_path(path: tuple[str, ...]) -> tuple[str, ...]:
        averaged_path = (tree_of[path[0]], *path[1:])
        return averaged_path if averaged_path in stored else ("params", *path[1:])  # no average has frozen parameters

    mappings = [dataclasses.replace(mapping, path=stored_path(mapping.path)) for mapping in names.mappings]
    adapters = {
        stored_path(mapping.path): pair
        for mapping in names.mappings
        if (pair := stored_adapter((tree_of[mapping.path[0]], *mapping.path[1:]), stored))
    }
    state = official_state(config, fusion_start, teacher=with_teacher)
    leftover = leftover or find_leftover(checkpoints)
    leftover_tensors = SafetensorsSource(leftover) if leftover else None
    if leftover_tensors:
        state = _with_leftover(state, leftover_tensors, {mapping.name for mapping in mappings})
    state = {
        name: TensorInfo(info.shape, EXPORT_DTYPES[dtype] if info.dtype == np.float32 else info.dtype)
        for name, info in state.items()
    }
    skipped = [part for part in parts if part not in official_parts]
    return ExportPlan(
        checkpoints, step, model, task, fusion_start, state, mappings, leftover_tensors, skipped, tree, adapters
    )


def original_name(name: str, leftover: Collection[str]) -> str | None:
    """Return the name that a tensor has among the leftover ones: a teacher's may be there as the student's."""
    return next((n for n in (name, official.student_name(name)) if n in leftover), None)


def _with_leftover(state: StateInfo, leftover: TensorSource, converted: set[str]) -> StateInfo:
    """Return the state dict with the leftover tensors' shapes: CLIP's text tower may have any size."""
    merged: StateInfo = {}
    names = frozenset(leftover.names())
    for name, info in state.items():
        if name in converted or tied_to(name) in converted:
            merged[name] = info
        elif (original := original_name(name, names)) is not None:
            merged[name] = leftover.info(original)
    teacher = any(official.student_name(name) != name for name in state)
    extra = (n for n in leftover.names() if n not in converted and (teacher or official.student_name(n) == n))
    return merged | {name: leftover.info(name) for name in extra}


def find_leftover(checkpoints: Checkpoints) -> Path | None:
    """Return the leftover file of an import: in the work directory, or in the one that the run started from."""
    workdir = checkpoints.folder.parent
    init_from = WorkDir(workdir).read_config().init_from if WorkDir(workdir).exists() else ""
    candidates = [workdir / LEFTOVER_FILE, *([to_path(init_from) / LEFTOVER_FILE] if init_from else [])]
    return next((path for path in candidates if path.is_file()), None)
