"""Import weights of other projects into a checkpoint, tensor by tensor, with a report of every one.

The state is never in memory as a whole: each array of the checkpoint is assembled from its tensors when it is written.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from data_pipelines.tokenizers import Tokenizer, load_tokenizer
from mplug2_jax.conversion.compare_torch import check_torch, compare_frameworks
from mplug2_jax.conversion.files.atomic import atomic_folder, check_free_space
from mplug2_jax.conversion.files.safetensors_writer import SafetensorsWriter
from mplug2_jax.conversion.files.sources import HostArray, TensorInfo
from mplug2_jax.conversion.import_plan import POSITIONS, ImportPlan, SourceMapping, StatePath
from mplug2_jax.conversion.layouts.official import TASK_PARTS
from mplug2_jax.conversion.layouts.official_state import LEFTOVER_FILE
from mplug2_jax.conversion.layouts.tensor_mapping import TensorMapping, copy_into
from mplug2_jax.conversion.progress import ByteProgress
from mplug2_jax.conversion.report import Comparison, ParamDigest, Report, Row, digest, max_difference
from mplug2_jax.errors import UserError
from mplug2_jax.model.config import ModelConfig
from mplug2_jax.model.prng import random_key
from mplug2_jax.model.vision import resize_positions
from mplug2_jax.training.checkpoint.checkpoints import Checkpoints
from mplug2_jax.training.checkpoint.lazy_arrays import LazyArray
from mplug2_jax.training.checkpoint.metadata import DataPosition, ModelMetadata
from mplug2_jax.training.config import CheckpointConfig, RunConfig
from mplug2_jax.training.workdir import WorkDir, check_vocabulary

MakeRecipe = Callable[[ModelConfig, str], RunConfig]  # of a model's sizes and its task


def run_import(
    plan: ImportPlan, to: Path, *, make_recipe: MakeRecipe | None = None, tokenizer: Path | None = None, seed: int = 0,
    overwrite: bool = False, verify: bool = False,
) -> Report:  # fmt: skip
    """Write the checkpoint, the tensors that the model ignores, a recipe and the report into a new folder.

    Args:
        plan: from :func:`~mplug2_jax.conversion.import_plan.plan_import`.
        to: the folder; it appears when it is complete.
        make_recipe: returns the config of a run that evaluates one of the release's two models; without it the folder
            only initializes other runs.
        tokenizer: a tokenizer file to copy into the folder.
        seed: of the arrays that no source fills.
        overwrite: replace an existing folder.
        verify: compare both frameworks on the same inputs; official checkpoints only.

    Raises:
        UserError: a tensor is not finite, tied tensors differ, the folder exists, or the disk is full; or the tokenizer
            has more tokens than the model.
        DataError: there is no tokenizer, or an object store refuses.
    """
    loaded = load_tokenizer(tokenizer) if tokenizer else None
    if loaded:
        check_vocabulary(loaded, plan.model_def.config)
    if verify:
        check_torch()
        if plan.origin["layout"] != "official":
            raise UserError(f"--verify needs an official checkpoint, but the source is {plan.title}; import without it")
    sizes = {
        (i, name): source.checkpoint.tensors.info(name).nbytes
        for i, source in enumerate(plan.sources)
        for name in source.dispositions
    }
    state_bytes = sum(4 * leaf.size for leaf in plan.state.values())
    check_free_space(to, state_bytes + sum(sizes.values()) // 2)
    progress = ByteProgress(f"importing {plan.title}", sum(sizes.values()))
    with atomic_folder(to, overwrite=overwrite) as folder:
        importer = _Importer(plan, progress, seed)
        model = ModelMetadata(plan.model_def.config, plan.model_def.parts, plan.origin)
        checkpoints = Checkpoints(folder / "checkpoints", CheckpointConfig(), model=model, lazy=True)
        with contextlib.closing(progress), contextlib.closing(checkpoints):
            checkpoints.save(importer.lazy_state(), DataPosition(0, {}))
        importer.read_leftover(folder / LEFTOVER_FILE)
        write_recipe(plan, folder, make_recipe, loaded)
        comparisons = None
        if verify:
            comparisons = _compare(plan, folder, loaded)
        report = Report(
            "import", plan.title, [_describe(source) for source in plan.sources], "checkpoints/0", importer.rows(),
            progress.seconds, progress.bytes_read, progress.bytes_written, comparisons, plan.notes,
        )  # fmt: skip
        report.write(folder)
    return report


def _compare(plan: ImportPlan, folder: Path, tokenizer: Tokenizer | None) -> list[Comparison]:
    """Compare our model, restored from the new checkpoint, with PyTorch's, loaded from the source."""
    (source,) = plan.sources
    checkpoints = Checkpoints(folder / "checkpoints", CheckpointConfig(), read_only=True)
    params, _ = checkpoints.restore_params(plan.model_def.shapes)
    checkpoints.close()
    model_def = plan.model_def
    return compare_frameworks(
        params, model_def.config, model_def.parts, plan.origin["fusion_start"], source.checkpoint.tensors,
        tokenizer=tokenizer,
    )  # fmt: skip


def _describe(source: SourceMapping) -> dict[str, Any]:
    checkpoint = source.checkpoint
    return {"name": checkpoint.path.name, "kind": checkpoint.title, "tensors": len(source.dispositions)}


class _Importer:
    """Builds the arrays of a plan, and records what it reads."""

    def __init__(self, plan: ImportPlan, progress: ByteProgress, seed: int) -> None:
        self._plan, self._progress, self._seed = plan, progress, seed
        self._read_digests: dict[tuple[str, str], tuple[str, float]] = {}  # (layout, name) -> SHA-256, max difference
        self._params: dict[tuple[str, str], list[ParamDigest]] = {}
        self._initialized: dict[StatePath, str] = {}
        self._preserved: set[str] = set()
        self._pool = concurrent.futures.ThreadPoolExecutor(2)

    def lazy_state(self) -> dict[str, Any]:
        """Return the whole state, as arrays that are built when they are written."""
        arrays = {
            path: LazyArray(tuple(leaf.shape), np.dtype(np.float32), functools.partial(self._build, path, leaf.shape))
            for path, leaf in self._plan.state.items()
        }
        return unflatten_dict(arrays)

    def _build(self, path: StatePath, shape: tuple[int, ...]) -> HostArray:
        if path not in self._plan.pieces:
            value = self._initial_arrays[path[1:]]
            self._initialized[path] = digest(value)
            return value
        value = np.empty(shape, np.float32)
        list(self._pool.map(lambda piece: self._load_into(value, *piece), self._plan.pieces[path]))
        return value

    def _load_into(self, value: HostArray, source: SourceMapping, mapping: TensorMapping) -> None:
        tensor = self._read(source, mapping.name)
        target = value if mapping.layer is None else value[mapping.layer : mapping.layer + 1].reshape(value.shape[1:])
        param = mapping.to_param(tensor)
        if mapping.path[1:] == POSITIONS and param.shape != target.shape:
            config = self._plan.model_def.config
            grid = config.image_size // config.patch_size
            param = np.asarray(resize_positions(jnp.asarray(param, jnp.float32), grid))
        copy_into(target, param)
        filled = ParamDigest("/".join(mapping.path), mapping.layer, digest(target))
        self._params.setdefault((source.checkpoint.layout, mapping.name), []).append(filled)
        self._progress.add_written(target.nbytes)

    def _read(self, source: SourceMapping, name: str) -> HostArray:
        """Read a tensor; the first time, also check and record it."""
        tensor = source.checkpoint.tensors.read(name)
        key = source.checkpoint.layout, name
        if key not in self._read_digests:
            check_finite(name, tensor)
            rounding = max_difference(tensor, tensor.astype(np.float32, copy=False))
            self._read_digests[key] = digest(tensor), rounding
            self._progress.add_read(tensor.nbytes)
        return tensor

    @functools.cached_property
    def _initial_arrays(self) -> dict[StatePath, HostArray]:
        """Return the model's own initialization of the arrays that no source fills."""
        paths = {path[1:] for path in self._plan.initialized}

        def init(key: Any) -> dict[str, Any]:
            leaves = jax.tree_util.tree_leaves_with_path(self._plan.model_def.init(key))
            arrays = {tuple(k.key for k in path): leaf for path, leaf in leaves}
            return {"/".join(path): arrays[path] for path in paths}

        arrays = jax.jit(init)(random_key(self._seed))
        return {tuple(name.split("/")): np.asarray(value) for name, value in arrays.items()}

    def read_leftover(self, path: Path) -> None:
        """Read the tensors that fill no parameter: check ties, and copy those that the model ignores to a file.

        Only for the official layout, whose exports need every tensor. For CLIP and BERT they are only recorded.
        """
        leftover: dict[str, TensorInfo] = {}
        for source in self._plan.sources:
            for name, (disposition, _) in source.dispositions.items():
                if disposition == "tied":
                    self._check_tie(source, name, source.tied[name])
                elif disposition in ("ignored", "unused") and source.checkpoint.kind == "official":
                    leftover[name] = source.checkpoint.tensors.info(name)
                elif disposition in ("ignored", "unused"):
                    self._read(source, name)
        if leftover:
            (source,) = self._plan.sources
            writer = SafetensorsWriter(path, leftover)

            def copy(name: str) -> None:
                tensor = self._read(source, name)
                writer.write(name, tensor)
                self._progress.add_written(tensor.nbytes)

            list(self._pool.map(copy, leftover))
            writer.close()
            self._preserved = set(leftover)

    def _check_tie(self, source: SourceMapping, name: str, tied: str) -> None:
        self._read(source, name)
        layout = source.checkpoint.layout
        if self._read_digests[layout, name][0] != self._read_digests[layout, tied][0]:
            raise UserError(
                f"{name} is tied to {tied}, but their values differ: the file is damaged, or its model does not tie "
                "them; import another"
            )

    def rows(self) -> list[Row]:
        """Return a row for every tensor of every source, and for every array that the model initialized."""
        rows = []
        table = self._plan.state.get(("params", *POSITIONS))
        for source in self._plan.sources:
            for name, (disposition, reason) in source.dispositions.items():
                info = source.checkpoint.tensors.info(name)
                sha, rounding = self._read_digests[source.checkpoint.layout, name]
                params = tuple(self._params.get((source.checkpoint.layout, name), ()))
                resized = table is not None and info.shape != tuple(table.shape)
                if disposition == "converted" and params[0].path.endswith("/".join(POSITIONS)) and resized:
                    disposition = "resized"
                rows.append(
                    Row(
                        name, "preserved" if name in self._preserved else disposition, info.shape, info.dtype.name, sha,
                        params, rounding, "" if params else reason,
                    )
                )  # fmt: skip
        for path, sha in self._initialized.items():
            param = ParamDigest("/".join(path), None, sha)
            rows.append(Row(param.path, "initialized", tuple(self._plan.state[path].shape), "float32", "", (param,)))
        return rows


def check_finite(name: str, value: HostArray) -> None:
    """Check that a floating-point tensor holds no NaN or infinity.

    Raises:
        UserError: it does.
    """
    if value.size and value.dtype.kind not in "iub":
        extremes = (float(value.min()), float(value.max()))  # NaN if any value is
        if not np.isfinite(extremes).all():
            count = int((~np.isfinite(value.astype(np.float64))).sum())
            raise UserError(
                f"{name}: {count:,} of {value.size:,} values are NaN or infinite, expected finite ones; nothing was "
                "written. Use another checkpoint"
            )


def write_recipe(plan: ImportPlan, folder: Path, make_recipe: MakeRecipe | None, tokenizer: Tokenizer | None) -> None:
    """Write a recipe at the model's sizes and a tokenizer, so that the folder is a work directory to evaluate.

    Without a tokenizer the recipe names BERT's ``vocab.txt`` at a path that does not exist, so that no other is used by
    mistake. A model that is not one of the release's has no recipe.
    """
    workdir = WorkDir(folder)
    parts = set(plan.model_def.parts)
    task = next((task for task, task_parts in TASK_PARTS.items() if set(task_parts) <= parts), None)
    if task is None or make_recipe is None:
        if tokenizer:
            tokenizer.save(workdir.tokenizer_folder)
        return
    config = make_recipe(plan.model_def.config, task)
    tokenizer_config = dataclasses.replace(config.tokenizer, path="vocab.txt")
    workdir.initialize(dataclasses.replace(config, tokenizer=tokenizer_config), tokenizer)
