"""Checkpoints by Orbax: parameters, optimiser, averages, queues, step and data position, as one checked unit."""

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from numpy.typing import NDArray

from mplug2_jax.config import build
from mplug2_jax.errors import UserError
from mplug2_jax.model.config import ModelConfig
from mplug2_jax.parallel.processes import is_primary_process
from mplug2_jax.training.checkpoint.checksums import checksums, leaf_name, mismatched
from mplug2_jax.training.checkpoint.lazy_arrays import lazy_array_handler
from mplug2_jax.training.checkpoint.metadata import FORMAT, DataPosition, ModelMetadata
from mplug2_jax.training.checkpoint.retention import Retention
from mplug2_jax.training.config import CheckpointConfig
from mplug2_jax.training.optim.lora import merge_adapter_on_devices, merge_adapters, stored_adapter
from mplug2_jax.training.optim.partition import combine
from mplug2_jax.training.state import TrainState
from mplug2_jax.training.telemetry.events import Events

RETRY_SECONDS = 60.0
"""After a save that failed, the next chance is not so far away as the next regular one."""


AGREE_STEPS = 10
"""How often several processes agree whether it is time to save."""


class DamagedCheckpointError(UserError):
    """A checkpoint that cannot be trusted."""


class _Manager(ocp.CheckpointManager):
    """Orbax's, which asks nobody whether the run is told to end: the loop does, and counts its questions."""

    def reached_preemption(self, step: int) -> bool:
        return False


class Checkpoints:
    """The checkpoints of a work directory. Saves run in the background; call ``close`` before the process ends.

    A reader (``read_only=True``) leaves the folder alone: what looks unfinished may be a save of a run that goes on.
    """

    def __init__(
        self, folder: Path, config: CheckpointConfig, *, model: ModelMetadata | None = None, read_only: bool = False,
        lazy: bool = False, events: Events | None = None,
    ) -> None:  # fmt: skip
        """``lazy``: the leaves of saved trees are ``LazyArray``, which have no checksums."""
        self.folder, self._config, self._model = folder, config, model
        self._lazy, self._events = lazy, events or Events()
        self._retention = Retention(config)
        self._saving: int | None = None  # the step whose arrays are being written
        self._tried = time.monotonic()  # when the last save began
        self.save_failed = False  # whether it failed
        self._descriptions: dict[int, dict[str, Any]] = {}  # what steps store, as read from their metadata
        self._manager = _Manager(
            folder.absolute(),
            # Named here, so that a process that has saved nothing can read the arrays' shapes.
            item_handlers={
                "state": lazy_array_handler() if lazy else ocp.PyTreeCheckpointHandler(),
                "meta": ocp.JsonCheckpointHandler(),
            },
            options=ocp.CheckpointManagerOptions(
                preservation_policy=self._retention, create=not read_only, cleanup_tmp_directories=not read_only
            ),
        )

    def steps(self) -> list[int]:
        """All saved steps, oldest first."""
        return sorted(int(step) for step in self._manager.all_steps())

    def is_saved(self, step: int) -> bool:
        """Whether a step is saved, whole and on disk."""
        return self._saving is None and step in self.steps()

    def refresh(self) -> None:
        """Looks again at what is there, which another process may have changed."""
        self._descriptions.clear()
        self._manager.reload()

    def should_save(self, step: int) -> bool:
        """Whether to save after this step: by its number, by the time since the last save, or because that failed."""
        if self._saving is not None and not self._manager.is_saving_in_progress():
            self._settle()
        since = time.monotonic() - self._tried
        minutes = self._config.every_minutes
        timed = (self.save_failed and since >= RETRY_SECONDS) or (minutes > 0 and since >= 60 * minutes)
        if jax.process_count() > 1:  # clocks and disks differ, so they ask each other now and then
            timed = step % AGREE_STEPS == 0 and not _everywhere(not timed)
        return timed or step % self._config.every_steps == 0

    def save(self, state: TrainState, position: DataPosition, scores: Mapping[int, float] | None = None) -> float:
        """Starts saving; returns once the arrays are copied off the devices' reach.

        A disk that is full or fails in another way does not stop the run: the failure is logged, :meth:`should_save`
        asks for a retry soon, and existing checkpoints stay untouched.

        Args:
            state: what to save.
            position: where the run is.
            scores: the metric of every step by which the best are kept.

        Returns:
            The seconds that the caller was kept waiting.
        """
        start = time.perf_counter()
        self._settle()
        if position.step not in self.steps():
            meta = position.to_json() | ({"model": self._model.to_json()} if self._model else {})
            if not self._lazy:
                meta["digests"] = checksums(state)
            self._retention.scores = scores or {}
            self._saving, self._tried, self.save_failed = position.step, time.monotonic(), False
            self._descriptions.pop(position.step, None)
            try:
                self._manager.save(
                    position.step,
                    args=ocp.args.Composite(state=ocp.args.PyTreeSave(state), meta=ocp.args.JsonSave(meta)),
                )
            except Exception as error:  # orbax, tensorstore and the file system each raise their own
                self._not_saved(error)
        return time.perf_counter() - start

    def save_last(self, state: TrainState, position: DataPosition, scores: Mapping[int, float] | None = None) -> None:
        """Waits until the last state is on disk, and tries once more if it could not be saved.

        Raises:
            UserError: it cannot be.
        """
        self._settle()
        if not _everywhere(not self.save_failed):
            self.save(state, position, scores)
            self._settle()
        if not _everywhere(not self.save_failed):
            raise UserError(
                f"the state after step {position.step} could not be saved; make room on the disk of {self.folder}, and "
                f"start the run again: it goes on from step {max(self.steps(), default=0)}"
            )

    def wait_until_finished(self) -> None:
        """Blocks until background saves are on disk, or have failed."""
        self._settle()

    def close(self) -> None:
        """Finishes background saves and releases the folder."""
        self._settle()
        self._manager.close()

    def _settle(self) -> None:
        """Waits for a save in the background and takes note of how it ended."""
        if self._saving is None:
            return
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            self._not_saved(error)
            return
        self._events.note("saved", self._saving, seconds=time.monotonic() - self._tried)
        self._saving = None

    def _not_saved(self, error: Exception) -> None:
        step, self._saving, self.save_failed = self._saving, None, True
        assert step is not None
        if self._lazy:  # nobody comes back to try again
            raise error
        self._events.note(
            "not saved", step, reason=_reason(error),
            said=f"checkpoint of step {step} could not be saved ({_reason(error)}); those before it are untouched, and "
            "it will be tried again: make room",
        )  # fmt: skip
        unfinished = self.folder.glob(f"{step}.orbax-checkpoint-tmp*") if is_primary_process() else ()
        for folder in unfinished:  # it takes the room that is lacking
            shutil.rmtree(folder, ignore_errors=True)

    def restore(self, like: TrainState, step: int | None = None) -> tuple[TrainState, DataPosition]:
        """The state of a step (the last by default), laid out like ``like``, which describes every array.

        Raises:
            DamagedCheckpointError: the checkpoint is incomplete, or an array is not what was saved.
            UserError: no such checkpoint, one of another model, or of a newer format.
        """
        step = self.resolve_step(step)
        position = self._position(step)
        return self._restored(step, like), position

    def restore_last_good(self, like: TrainState) -> tuple[TrainState, DataPosition]:
        """The newest state that is whole. What is damaged is named and set aside: renamed, never deleted.

        Raises:
            DamagedCheckpointError: all are.
            UserError: as :meth:`restore`.
        """
        damaged: dict[int, DamagedCheckpointError] = {}
        self._settle()
        self.refresh()
        self.resolve_step(None)
        for step in reversed(self.steps()):
            error = None
            try:
                restored = self.restore(like, step)
            except DamagedCheckpointError as found:
                error = found
            if _everywhere(error is None):
                self._set_aside(damaged)
                return restored
            damaged[step] = error or DamagedCheckpointError(
                f"checkpoint {self.folder / str(step)} is damaged on another host"
            )
        newest = damaged[max(damaged)]
        if len(damaged) == 1:
            raise newest
        raise DamagedCheckpointError(f"none of the {len(damaged)} checkpoints can be used: {newest}")

    def _set_aside(self, damaged: Mapping[int, DamagedCheckpointError]) -> None:
        for step, error in damaged.items():
            place = next(p for i in range(10**6) if not (p := self.folder / f"damaged-{step}-{i}").exists())
            if is_primary_process():
                (self.folder / str(step)).rename(place)
            self._events.note(
                "damaged", step, reason=str(error),
                said=f"{str(error).partition(';')[0]}; it is kept as {place.name}, and the one before is used",
            )  # fmt: skip
        if damaged:
            multihost_utils.sync_global_devices("damaged checkpoints are set aside")
            self.refresh()

    def restore_params(self, like: Any, step: int | None = None, *, tree: str = "params") -> tuple[Any, int]:
        """The parameters alone, with their step; raises as :meth:`restore`.

        They are those of ``tree``: an average's, say. What it lacks, because it was frozen, is taken from ``params``.
        ``like`` is of a model without LoRA: pairs that the tree has are added to their kernels.
        """
        step = self.resolve_step(step)
        stored, wanted, pairs = self.array_specs(step), dict[str, Any](), False
        for path, leaf in jax.tree_util.tree_leaves_with_path(like):
            place = tuple(leaf_name(path).split("/"))
            _put(wanted, (tree if (tree, *place) in stored else "params", *place), leaf)
            for own in stored_adapter((tree, *place), stored).values():
                shape, dtype = stored[own]
                _put(wanted, own, jax.ShapeDtypeStruct(shape, dtype, sharding=_whole(leaf)))
                pairs = True
        restored = self.restore_tree(wanted, step)
        params = combine(restored.get(tree, {}), restored.get("params", {}))
        return (
            merge_adapters(params, self.model_metadata(step).lora_scale, merge_adapter_on_devices) if pairs else params
        ), step

    def restore_tree(self, like: Any, step: int) -> Any:
        """A part of the state, laid out like ``like``. Raises as :meth:`restore`."""
        self._position(step)
        return self._restored(step, like)

    def _restored(self, step: int, like: Any) -> Any:
        """Arrays in their stored type first, as which they are checked, and then as wanted."""
        stored = self._check_shapes(step, like)
        exact = jax.tree_util.tree_map_with_path(
            lambda path, leaf: jax.ShapeDtypeStruct(
                leaf.shape, stored[leaf_name(path)].dtype, sharding=getattr(leaf, "sharding", None)
            ),
            like,
        )
        how = ocp.checkpoint_utils.construct_restore_args(exact)
        restored = self._read(step, ocp.args.PyTreeRestore(item=exact, restore_args=how, partial_restore=True))
        self._check_digests(step, restored)
        return jax.tree.map(lambda x, leaf: x if x.dtype == leaf.dtype else x.astype(leaf.dtype), restored, like)

    def _read(self, step: int, target: Any) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(state=target)).state
        except Exception as error:  # tensorstore, zarr and orbax each raise their own for a damaged file
            raise self._damaged(step, f"damaged ({_reason(error)})") from error

    def model_metadata(self, step: int | None = None) -> ModelMetadata:
        """Which model a step's checkpoint is of.

        Raises:
            UserError: no such checkpoint, or one that does not say.
        """
        step = self.resolve_step(step)
        model = self._meta(step).get("model")
        if not isinstance(model, dict):
            raise self._damaged(step, "of a version that did not note which model it is of")
        try:
            config, parts = build(ModelConfig, model["config"]), tuple(model["parts"])
            return ModelMetadata(config, parts, model["origin"], model.get("lora_scale", 0.0))
        except (KeyError, TypeError) as error:
            raise self._damaged(step, f"incomplete: meta/metadata lacks {error}") from error

    def array_specs(self, step: int | None = None) -> dict[tuple[str, ...], tuple[tuple[int, ...], np.dtype[Any]]]:
        """Shape and type of every array of a step by its path; nothing is read."""
        return {
            tuple(name.split("/")): (tuple(leaf.shape), np.dtype(leaf.dtype))
            for name, leaf in self._stored(self.resolve_step(step)).items()
        }

    def read_arrays(
        self, paths: Sequence[tuple[str, ...]], step: int | None = None
    ) -> dict[tuple[str, ...], NDArray[Any]]:
        """Arrays of dicts in dicts on the host, whole, whatever mesh they were saved from.

        Raises:
            UserError: the checkpoint is damaged.
        """
        step = self.resolve_step(step)
        item: dict[str, Any] = {}
        how: dict[str, Any] = {}
        for path in paths:
            _put(item, path, 0)
            _put(how, path, ocp.RestoreArgs(restore_type=np.ndarray))
        found = self._read(step, ocp.args.PyTreeRestore(item=item, restore_args=how, partial_restore=True))
        self._check_digests(step, found)
        named = {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(found)}
        return {path: np.asarray(named["/".join(path)]) for path in paths}

    def resolve_step(self, step: int | None) -> int:
        """A step that is there: the last by default. Raises UserError if it is not."""
        steps = self.steps()
        if not steps:
            raise UserError(f"{self.folder} holds no checkpoint; train first, or check the path")
        if step is not None and step not in steps:
            raise UserError(f"{self.folder} holds no checkpoint of step {step}; there are {steps}")
        return steps[-1] if step is None else step

    def _position(self, step: int) -> DataPosition:
        try:
            return DataPosition.from_json(self._meta(step)["position"])
        except (TypeError, ValueError, AttributeError) as error:
            raise self._damaged(step, "incomplete: meta/metadata is damaged") from error

    def _meta(self, step: int) -> dict[str, Any]:
        path = self.folder / str(step) / "meta" / "metadata"
        try:
            meta = json.loads(path.read_text())
            newer, _ = meta["format"] > FORMAT, meta["position"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self._damaged(step, "incomplete: meta/metadata is missing or damaged") from error
        if newer:
            raise UserError(
                f"checkpoint {path.parent.parent} has format {meta['format']}, but this version reads up to {FORMAT}"
            )
        return dict(meta)

    def _stored(self, step: int) -> dict[str, Any]:
        """What is stored, described, by name; its metadata are read once."""
        if step in self._descriptions:
            return self._descriptions[step]
        try:
            stored = self._manager.item_metadata(step).state
        except Exception as error:
            raise self._damaged(step, f"damaged ({_reason(error)})") from error
        if stored is None:
            raise self._damaged(step, "incomplete: state/_METADATA is missing")
        leaves = {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(stored.tree)}
        self._descriptions[step] = leaves
        return leaves

    def _check_digests(self, step: int, restored: Any) -> None:
        """Compares every array with the digest of what was saved; a checkpoint of older versions has none."""
        expected = self._meta(step).get("digests", {})
        wrong = mismatched(checksums(restored), expected) if expected else []
        if wrong:
            more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            raise self._damaged(step, f"damaged ({wrong[0]}{more} differs from what was saved, by its digest)")

    def _check_shapes(self, step: int, like: Any) -> dict[str, Any]:
        """Compares names and shapes with what is stored, so that the error can name the first difference."""
        found = self._stored(step)
        for path, leaf in jax.tree_util.tree_leaves_with_path(like):
            name = leaf_name(path)
            if name not in found and name.startswith("opt/"):
                raise UserError(
                    f"checkpoint {self.folder / str(step)} holds weights without an optimiser, so no run can "
                    f"resume from it: start one in a new --workdir with --config.init_from={self.folder.parent}"
                )
            if name not in found:
                raise UserError(
                    f"checkpoint {self.folder / str(step)} lacks {name}, which this model has; check its parts"
                )
            if tuple(found[name].shape) != tuple(leaf.shape):
                raise UserError(
                    f"checkpoint {self.folder / str(step)} is of another size: {name} is "
                    f"{list(found[name].shape)} there, {list(leaf.shape)} in this model"
                )
        return found

    def _damaged(self, step: int, how: str) -> DamagedCheckpointError:
        others = [other for other in self.steps() if other != step]
        remedy = f"steps {others} are left: choose one" if others else "it is the only one: restore it from a copy"
        return DamagedCheckpointError(
            f"checkpoint {self.folder / str(step)} is {how}; {remedy}, or move it away to train without it"
        )


def open_checkpoint(path: Path) -> tuple[Checkpoints, int]:
    """A checkpoint by its step's folder, by the folder of all steps, or by the work directory (the last step then).

    Raises:
        UserError: there is none.
    """
    folder, step = path, None
    if path.name.isdigit() and (path / "state").exists():
        folder, step = path.parent, int(path.name)
    elif (path / "checkpoints").is_dir():
        folder = path / "checkpoints"
    if not folder.is_dir() or not any(child.name.isdigit() for child in folder.iterdir()):
        raise UserError(
            f"{path} holds no checkpoint; expected a work directory, its checkpoints folder or a step of it"
        )
    found = Checkpoints(folder, CheckpointConfig(), read_only=True)
    return found, found.resolve_step(step)


def _everywhere(good: bool) -> bool:
    """Whether all processes say so."""
    return good if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.asarray(good)).all())


def _put(tree: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value


def _whole(leaf: Any) -> Any:
    """The sharding of something small that goes with an array: on all of its devices."""
    sharding = getattr(leaf, "sharding", None)
    return NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else sharding


def _reason(error: BaseException) -> str:
    """The beginning of what a library says, which goes on with its own addresses in memory."""
    return (str(error).strip() or type(error).__name__).split("\n")[0].partition(". See full")[0][:160]
