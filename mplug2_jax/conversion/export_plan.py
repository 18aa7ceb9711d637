"""What an export will write, known before an array is read: every tensor of the state dict, and what it is made of."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np

from data_pipelines.tokenizers import Tokenizer, load_tokenizer
from mplug2_jax.conversion.files.sources import DTYPES, SafetensorsSource, TensorInfo, TensorSource
from mplug2_jax.conversion.import_plan import StatePath
from mplug2_jax.conversion.layouts import official
from mplug2_jax.conversion.layouts.official_state import REST, State, official_state, tie_of
from mplug2_jax.conversion.layouts.slots import Slot
from mplug2_jax.errors import UserError
from mplug2_jax.training.checkpoint.checkpoints import Checkpoints, open_checkpoint
from mplug2_jax.training.checkpoint.metadata import ModelMetadata
from mplug2_jax.training.optim.lora import stored_adapter
from mplug2_jax.training.workdir import WorkDir

EXPORT_DTYPES = {"float32": DTYPES["F32"], "float16": DTYPES["F16"], "bfloat16": DTYPES["BF16"]}


@dataclasses.dataclass(frozen=True)
class ExportPlan:
    """Everything that is known before an array is read."""

    checkpoints: Checkpoints
    step: int
    identity: ModelMetadata
    task: str
    fusion_start: int
    state: State  # the official state dict that will be written
    slots: Sequence[Slot]  # with the tree that each is read from in front of its path
    rest: TensorSource | None
    left_out: Sequence[str]  # parts that the official layout has no place for
    tree: str  # of the checkpoint, that the model's own weights are from: "params", or an average
    pairs: Mapping[StatePath, Mapping[str, StatePath]]  # of LoRA, that are added to the kernels at these places

    @property
    def teacher(self) -> bool:
        """Whether the averaged copy is written too."""
        return any(name.startswith("text_decoder_m.") for name in self.state)

    @property
    def title(self) -> str:
        """What is written."""
        averaged = ", averaged weights" if self.tree != "params" else ""
        return f"official {self.task}" + (" with its teacher" if self.teacher else "") + averaged

    @property
    def workdir(self) -> WorkDir:
        """The run's, that the checkpoint is of."""
        return WorkDir(self.checkpoints.folder.parent)

    @property
    def tokenizer(self) -> Tokenizer | None:
        """What its words are made of, where the run keeps it."""
        kept = self.workdir.tokenizer_folder
        return load_tokenizer(kept) if kept.is_dir() else None

    @property
    def rounded(self) -> bool:
        """Whether our weights are written in a shorter type."""
        return any(self.state[slot.name].dtype != np.float32 for slot in self.slots)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.state.values())


def plan_export(
    path: Path,
    *,
    dtype: str = "float32",
    ema: bool | None = None,
    teacher: bool | None = None,
    rest: Path | None = None,
) -> ExportPlan:
    """Finds the checkpoint and a tensor for each of its arrays.

    Args:
        path: work directory, checkpoints folder, or one step of it.
        dtype: of the floating-point tensors written.
        ema: write the averaged weights as the model's own (default: where the run kept an average to be evaluated; a
            teacher is one if asked for).
        teacher: whether the averaged copy is written too (default: where the checkpoint has one). Without one in the
            checkpoint it repeats the model's own weights, as when the release starts its training.
        rest: file with the tensors that nothing of ours reads (default: what the import kept, if the weights came from
            one). Where there is none, the release's initialisation fills them.

    Raises:
        UserError: no checkpoint, or one whose parts make no model of the release.
    """
    checkpoints, step = open_checkpoint(path)
    identity = checkpoints.model_metadata(step)
    parts = identity.parts
    task = next((t for t, own in official.TASK_PARTS.items() if set(own) <= set(parts)), "caption")
    own = official.TASK_PARTS[task]
    missing = [part for part in own if part not in parts]
    if missing:
        raise UserError(
            f"{path} is a model of {', '.join(parts)}: the release's {task} model also needs {', '.join(missing)}"
        )
    config = identity.config
    stored = checkpoints.array_specs(step)
    trees = {leaf[0] for leaf in stored}
    averaged = next((tree for tree in ("ema", "teacher") if tree in trees), None)
    if ema and averaged is None:
        raise UserError(f"{path} holds no averaged weights: export without --ema")
    tree = averaged if averaged and (averaged == "ema" if ema is None else ema) else "params"
    fusion_start = identity.origin.get("fusion_start", official.default_fusion_start(config))
    with_teacher = "teacher" in trees if teacher is None else teacher
    scheme = official.official_scheme(config, own, fusion_start, teacher=with_teacher)
    source = {"params": tree, "teacher": "teacher" if "teacher" in trees else tree}

    def place(path: tuple[str, ...]) -> tuple[str, ...]:
        own = (source[path[0]], *path[1:])
        return own if own in stored else ("params", *path[1:])  # what was frozen is in no average

    slots = [dataclasses.replace(slot, path=place(slot.path)) for slot in scheme.slots]
    pairs = {
        place(slot.path): pair
        for slot in scheme.slots
        if (pair := stored_adapter((source[slot.path[0]], *slot.path[1:]), stored))
    }
    state = official_state(config, fusion_start, teacher=with_teacher)
    rest = rest or find_rest(checkpoints)
    kept = SafetensorsSource(rest) if rest else None
    if kept:
        state = _with_kept(state, kept, {slot.name for slot in slots})
    written = {
        name: TensorInfo(info.shape, EXPORT_DTYPES[dtype] if info.dtype == np.float32 else info.dtype)
        for name, info in state.items()
    }
    left_out = [part for part in parts if part not in own]
    return ExportPlan(checkpoints, step, identity, task, fusion_start, written, slots, kept, left_out, tree, pairs)


def kept_as(name: str, kept: Collection[str]) -> str | None:
    """Under which name a tensor was kept: a teacher's may have been kept as the student's."""
    return next((n for n in (name, official.student_name(name)) if n in kept), None)


def _with_kept(state: State, kept: TensorSource, used: set[str]) -> State:
    """The state dict with what was kept as it is: CLIP's text tower may be of any size."""
    found: State = {}
    names = frozenset(kept.names())
    for name, info in state.items():
        if name in used or tie_of(name) in used:
            found[name] = info
        elif (own := kept_as(name, names)) is not None:
            found[name] = kept.info(own)
    teacher = any(official.student_name(name) != name for name in state)
    more = (n for n in kept.names() if n not in used and (teacher or official.student_name(n) == n))
    return found | {name: kept.info(name) for name in more}


def find_rest(checkpoints: Checkpoints) -> Path | None:
    """What an import kept: in the work directory, or in that which the run started from."""
    workdir = checkpoints.folder.parent
    started = WorkDir(workdir).read_config().init_from if WorkDir(workdir).exists() else ""
    places = [workdir / REST, *([Path(started) / REST] if started else [])]
    return next((place for place in places if place.is_file()), None)
