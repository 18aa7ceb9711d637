"""Weights of other worlds into a checkpoint of ours, tensor by tensor, with an account of every one.

The state is never whole in memory: each array of the checkpoint is put together from its tensors when it is written.
"""

import concurrent.futures
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines.tokenizers import Tokenizer, load_tokenizer
from mplug2_jax.config import build
from mplug2_jax.conversion.compare_torch import check_torch, compare_frameworks
from mplug2_jax.conversion.files.atomic import check_space, staged
from mplug2_jax.conversion.files.safetensors_writer import SafetensorsWriter
from mplug2_jax.conversion.files.sources import HostArray, TensorInfo
from mplug2_jax.conversion.import_plan import POSITIONS, ImportPlan, Joint, StatePath
from mplug2_jax.conversion.layouts.official import TASK_PARTS
from mplug2_jax.conversion.layouts.official_state import REST
from mplug2_jax.conversion.layouts.slots import Slot, copy_into
from mplug2_jax.conversion.progress import Transfer
from mplug2_jax.conversion.report import Comparison, Place, Report, Row, digest, largest_difference
from mplug2_jax.errors import UserError
from mplug2_jax.model.prng import random_key
from mplug2_jax.model.vision import resize_positions
from mplug2_jax.recipes.released import released_at
from mplug2_jax.training.checkpoint.checkpoints import Checkpoints
from mplug2_jax.training.checkpoint.lazy_arrays import LazyArray
from mplug2_jax.training.checkpoint.metadata import DataPosition, ModelMetadata
from mplug2_jax.training.config import CheckpointConfig, RunConfig
from mplug2_jax.training.workdir import WorkDir, check_vocabulary


def run_import(
    plan: ImportPlan,
    to: Path,
    *,
    tokenizer: Path | None = None,
    seed: int = 0,
    overwrite: bool = False,
    verify: bool = False,
) -> Report:
    """Writes the checkpoint, what nothing of ours reads, a recipe and the report into a new folder.

    Args:
        plan: from :func:`~mplug2_jax.conversion.import_plan.plan_import`.
        to: the folder; it appears when everything is in it.
        tokenizer: file of a tokeniser to keep in it.
        seed: of the arrays that no source fills.
        overwrite: whether an existing folder is replaced.
        verify: whether both frameworks are compared on the same inputs; of official checkpoints only.

    Raises:
        UserError: a tensor that is not finite, ties that differ, a folder that exists, a full disk.
    """
    if verify:
        check_torch()
        if plan.origin["layout"] != "official":
            raise UserError(f"--verify compares models of the release, and {plan.title} is none; import without it")
    sizes = {(number, name): joint.found.source.info(name).nbytes
             for number, joint in enumerate(plan.joints) for name in joint.fates}  # fmt: skip
    state = sum(4 * leaf.size for leaf in plan.state.values())
    check_space(to.parent, state + sum(sizes.values()) // 2)
    transfer = Transfer(f"importing {plan.title}", sum(sizes.values()))
    with staged(to, overwrite=overwrite) as folder:
        work = _Import(plan, transfer, seed)
        identity = ModelMetadata(plan.definition.config, plan.definition.parts, plan.origin)
        checkpoints = Checkpoints(folder / "checkpoints", CheckpointConfig(), model=identity, lazy=True)
        try:
            checkpoints.save(work.state(), DataPosition(0, {}))
        finally:
            checkpoints.close()
        work.keep_rest(folder / REST)
        keep_recipe(plan, folder, tokenizer)
        transfer.done()
        comparisons = None
        if verify:
            comparisons = _compared(plan, folder, load_tokenizer(tokenizer) if tokenizer else None)
        report = Report(
            "import", plan.title, [_described(joint) for joint in plan.joints], "checkpoints/0", work.rows(),
            transfer.seconds, transfer.bytes_read, transfer.bytes_written, comparisons, plan.notes,
        )  # fmt: skip
        report.write(folder)
    return report


def _compared(plan: ImportPlan, folder: Path, tokenizer: Tokenizer | None) -> list[Comparison]:
    """Our model from what was just written, beside PyTorch's from the source."""
    (joint,) = plan.joints
    checkpoints = Checkpoints(folder / "checkpoints", CheckpointConfig(), read_only=True)
    params, _ = checkpoints.restore_params(plan.definition.shapes)
    checkpoints.close()
    definition = plan.definition
    return compare_frameworks(
        params, definition.config, definition.parts, plan.origin["fusion_start"], joint.found.source,
        tokenizer=tokenizer,
    )  # fmt: skip


def _described(joint: Joint) -> dict[str, Any]:
    return {"name": joint.found.path.name, "kind": joint.found.title, "tensors": len(joint.fates)}


class _Import:
    """Makes the arrays of a plan, and keeps account of what it reads."""

    def __init__(self, plan: ImportPlan, transfer: Transfer, seed: int) -> None:
        self._plan, self._transfer, self._seed = plan, transfer, seed
        self._read: dict[tuple[str, str], tuple[str, float]] = {}  # (layout, name) -> SHA-256, largest difference
        self._places: dict[tuple[str, str], list[Place]] = {}
        self._fresh: dict[StatePath, str] = {}
        self._kept: set[str] = set()
        self._pool = concurrent.futures.ThreadPoolExecutor(2)

    def state(self) -> dict[str, Any]:
        """The whole state, as arrays that are made when they are written."""
        tree: dict[str, Any] = {}
        for path, described in self._plan.state.items():
            node = tree
            for key in path[:-1]:
                node = node.setdefault(key, {})
            make = functools.partial(self._make, path, tuple(described.shape))
            node[path[-1]] = LazyArray(tuple(described.shape), np.dtype(np.float32), make)
        return tree

    def _make(self, path: StatePath, shape: tuple[int, ...]) -> HostArray:
        if path not in self._plan.filled:
            value = self._fresh_arrays[path[1:]]
            self._fresh[path] = digest(value)
            return value
        value = np.empty(shape, np.float32)
        list(self._pool.map(lambda piece: self._fill(value, *piece), self._plan.filled[path]))
        return value

    def _fill(self, value: HostArray, joint: Joint, slot: Slot) -> None:
        tensor = self._take(joint, slot.name)
        target = value if slot.layer is None else value[slot.layer : slot.layer + 1].reshape(value.shape[1:])
        cut = slot.to_ours(tensor)
        if slot.path[1:] == POSITIONS and cut.shape != target.shape:
            config = self._plan.definition.config
            cut = np.asarray(resize_positions(jnp.asarray(cut, jnp.float32), config.image_size // config.patch_size))
        copy_into(target, cut)
        place = Place("/".join(slot.path), slot.layer, digest(target))
        self._places.setdefault((joint.found.layout, slot.name), []).append(place)
        self._transfer.wrote(target.nbytes)

    def _take(self, joint: Joint, name: str) -> HostArray:
        """A tensor of a source; accounted for when it is read for the first time."""
        tensor = joint.found.source.read(name)
        key = (joint.found.layout, name)
        if key not in self._read:
            check_finite(name, tensor)
            self._read[key] = digest(tensor), largest_difference(tensor, tensor.astype(np.float32, copy=False))
            self._transfer.read(tensor.nbytes)
        return tensor

    @functools.cached_property
    def _fresh_arrays(self) -> dict[StatePath, HostArray]:
        """What the model's own initialisation gives for the arrays that no source fills."""
        wanted = {path[1:] for path in self._plan.fresh}

        def pick(key: Any) -> dict[str, Any]:
            leaves = jax.tree_util.tree_leaves_with_path(self._plan.definition.init(key))
            named = {tuple(k.key for k in path): leaf for path, leaf in leaves}
            return {"/".join(path): named[path] for path in wanted}

        made = jax.jit(pick)(random_key(self._seed))
        return {tuple(name.split("/")): np.asarray(value) for name, value in made.items()}

    def keep_rest(self, path: Path) -> None:
        """Reads what is left: checks ties, and copies what nothing of ours reads to a file of its own.

        Only of the official layout: its exports need every tensor. Of CLIP and BERT the rest is only accounted for.
        """
        rest: dict[str, TensorInfo] = {}
        for joint in self._plan.joints:
            for name, (fate, _) in joint.fates.items():
                if fate == "tied":
                    self._check_tie(joint, name, joint.tied[name])
                elif fate in ("dead", "aside") and joint.found.kind == "official":
                    rest[name] = joint.found.source.info(name)
                elif fate in ("dead", "aside"):
                    self._take(joint, name)
        if rest:
            (joint,) = self._plan.joints
            writer = SafetensorsWriter(path, rest)

            def copy(name: str) -> None:
                tensor = self._take(joint, name)
                writer.write(name, tensor)
                self._transfer.wrote(tensor.nbytes)

            list(self._pool.map(copy, rest))
            writer.close()
            self._kept = set(rest)

    def _check_tie(self, joint: Joint, name: str, tie: str) -> None:
        self._take(joint, name)
        if self._read[joint.found.layout, name][0] != self._read[joint.found.layout, tie][0]:
            raise UserError(
                f"{name} should repeat {tie}, but differs from it: the file is damaged, or of a model that unties them"
            )

    def rows(self) -> list[Row]:
        """A row for every tensor of every source, and for every fresh array."""
        rows = []
        table = self._plan.state.get(("params", *POSITIONS))
        for joint in self._plan.joints:
            for name, (fate, why) in joint.fates.items():
                info = joint.found.source.info(name)
                sha, difference = self._read[joint.found.layout, name]
                places = tuple(self._places.get((joint.found.layout, name), ()))
                on_another_grid = table is not None and info.shape != tuple(table.shape)
                if fate == "used" and places[0].path.endswith("/".join(POSITIONS)) and on_another_grid:
                    fate = "resized"
                kept = name in self._kept
                rows.append(
                    Row(
                        name, "kept" if kept else fate, info.shape, info.dtype.name, sha, places, difference,
                        "" if places else why,
                    )
                )  # fmt: skip
        for path, sha in self._fresh.items():
            place = Place("/".join(path), None, sha)
            rows.append(Row("/".join(path), "fresh", tuple(self._plan.state[path].shape), "float32", "", (place,)))
        return rows


def check_finite(name: str, value: HostArray) -> None:
    """Checks a tensor of floats.

    Raises:
        UserError: it holds NaN or infinity.
    """
    if value.size and value.dtype.kind not in "iub":
        low, high = (float(extreme) for extreme in (value.min(), value.max()))  # NaN where anything is
        if not np.isfinite([low, high]).all():
            bad = int((~np.isfinite(value.astype(np.float64))).sum())
            raise UserError(f"{name} holds {bad:,} values of {value.size:,} that are not finite; nothing was written")


def keep_recipe(plan: ImportPlan, folder: Path, tokenizer: Path | None) -> None:
    """Makes a work directory of the folder, that can be evaluated: the released recipe at these sizes, and a tokeniser.

    Without a tokeniser the recipe asks for BERT's ``vocab.txt`` by a path that is not there, so that no other is taken.
    A model that is neither of the release's has no recipe; it is there to start runs from.
    """
    workdir = WorkDir(folder)
    kept = load_tokenizer(tokenizer) if tokenizer else None
    if kept:
        check_vocabulary(kept, plan.definition.config)
    parts = set(plan.definition.parts)
    task = next((t for t, own in TASK_PARTS.items() if set(own) <= parts), None)
    if task is None:
        if kept:
            kept.save(workdir.tokenizer_folder)
        return
    recipe = released_at(plan.definition.config, task, f"released_{task}")
    recipe.tokenizer.path = "vocab.txt"
    workdir.initialize(build(RunConfig, recipe), kept)
