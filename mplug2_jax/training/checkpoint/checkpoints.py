"""Checkpoints by Orbax: parameters, optimizer, averages, queues, step and data position, saved and checked as one."""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from numpy.typing import NDArray
from orbax.checkpoint import type_handlers

from data_pipelines.errors import StorageUnavailableError
from data_pipelines.storage.object_log import flush_logs
from data_pipelines.storage.paths import RemotePath, remove_tree
from data_pipelines.storage.retry import is_access_error, is_transient
from mplug2_jax.config import build, to_dict
from mplug2_jax.errors import UserError
from mplug2_jax.parallel.processes import all_processes, any_process, is_primary_process
from mplug2_jax.training.checkpoint.checksums import checksums, find_mismatches, leaf_name, leaves_by_name
from mplug2_jax.training.checkpoint.lazy_arrays import LazyArray, LazyArrayHandler
from mplug2_jax.training.checkpoint.metadata import FORMAT_VERSION, DataPosition, ModelMetadata
from mplug2_jax.training.checkpoint.retention import BestByScore, preservation_policy
from mplug2_jax.training.config import CheckpointConfig
from mplug2_jax.training.optim.lora import merge_adapter_on_devices, merge_adapters, stored_adapter
from mplug2_jax.training.optim.partition import combine
from mplug2_jax.training.state import TrainState
from mplug2_jax.training.telemetry.events import EventLog

RETRY_SECONDS = 60.0
"""A failed save is retried after this time, sooner than the next regular one."""

SAVE_SYNC_INTERVAL = 10
"""Steps between the collectives in which several processes agree whether it is time to save."""


MIN_SLICE_BYTES = 2**20
"""Replicas share the writing of an array if their slices have this size: slicing small arrays takes longer."""


class DamagedCheckpointError(UserError):
    """A checkpoint that cannot be trusted."""


class _Manager(ocp.CheckpointManager):
    """Orbax's manager without its own preemption check: the training loop checks, and counts its checks."""

    def reached_preemption(self, step: int) -> bool:
        return False


class Checkpoints:
    """The checkpoints of a work directory. Saves run in the background; call ``close`` before the process ends.

    A reader (``read_only=True``) changes nothing in the folder: what looks unfinished may be a live run's save.
    """

    def __init__(
        self, folder: Path, config: CheckpointConfig, *, model: ModelMetadata | None = None, read_only: bool = False,
        lazy: bool = False, events: EventLog | None = None,
    ) -> None:  # fmt: skip
        """With ``lazy`` the leaves of saved trees are ``LazyArray``, which have no checksums."""
        self.folder, self._config, self._model = folder, config, model
        self._lazy, self._events = lazy, events or EventLog()
        self._is_remote = isinstance(folder, RemotePath)
        self._best = BestByScore(config)
        self._pending_step: int | None = None  # whose arrays are being written
        self._last_save = time.monotonic()  # when it began
        self.save_failed = False  # whether it failed
        self._failed_saves = 0  # in a row
        self._unfinished: set[int] = set()  # steps of failed saves, in an object store
        self._leaves: dict[int, dict[str, Any]] = {}  # array metadata of steps that were looked at
        self._manager = _Manager(
            folder.absolute(),
            # Named here, so that a process that has saved nothing can read the arrays' shapes.
            item_handlers={
                "state": _state_handler(lazy),
                "meta": ocp.JsonCheckpointHandler(),
            },
            options=ocp.CheckpointManagerOptions(
                preservation_policy=preservation_policy(config, self._best),
                create=not read_only,
                cleanup_tmp_directories=not read_only,
            ),
        )

    def steps(self) -> list[int]:
        """Return all saved steps, oldest first."""
        return sorted(int(step) for step in self._manager.all_steps())

    def is_saved(self, step: int) -> bool:
        """Return whether a step is completely on disk."""
        return self._pending_step is None and step in self.steps()

    def refresh(self) -> None:
        """Reread the folder, which another process may have changed."""
        self._leaves.clear()
        self._manager.reload()

    def should_save(self, step: int) -> bool:
        """Return whether to save after a step: by its number, by the time since the last save, or to retry that.

        Raises:
            StorageUnavailableError: too many saves in a row failed.
        """
        if self._pending_step is not None and not self._manager.is_saving_in_progress():
            self.wait_until_finished()
        if self._failed_saves >= self._config.max_failed_saves:
            raise StorageUnavailableError(
                f"{self._failed_saves} saves in a row to {self.folder} failed, as many as "
                "config.checkpoint.max_failed_saves allows; the log has the reasons; start again later"
            )
        elapsed = time.monotonic() - self._last_save
        minutes = self._config.every_minutes
        timed = (self.save_failed and elapsed >= RETRY_SECONDS) or (minutes > 0 and elapsed >= 60 * minutes)
        if jax.process_count() > 1:  # clocks and disks differ between processes
            timed = step % SAVE_SYNC_INTERVAL == 0 and any_process(timed)
        return timed or step % self._config.every_steps == 0

    def save(self, state: TrainState, position: DataPosition, scores: Mapping[int, float] | None = None) -> float:
        """Start saving, and return once the arrays are copied from the devices.

        A disk that is full or fails in another way does not stop the run: the failure is logged, :meth:`should_save`
        asks for a retry soon, and existing checkpoints stay untouched.

        Args:
            state: what to save.
            position: where the run is.
            scores: by step, the metric by which the best checkpoints are kept.

        Returns:
            The seconds that the call blocked.
        """
        start = time.perf_counter()
        self.wait_until_finished()
        flush_logs()  # a run that resumes from this checkpoint does not write these lines again
        if position.step not in self.steps():
            meta: dict[str, Any] = {"format": FORMAT_VERSION, "position": to_dict(position)}
            if self._model:
                meta["model"] = to_dict(self._model)
            if not self._lazy:
                meta["digests"] = checksums(state)
            self._best.scores = scores or {}
            self._pending_step, self._last_save, self.save_failed = position.step, time.monotonic(), False
            self._leaves.pop(position.step, None)
            try:
                self._manager.save(
                    position.step,
                    args=ocp.args.Composite(state=ocp.args.PyTreeSave(state), meta=ocp.args.JsonSave(meta)),
                )
            except Exception as error:  # orbax, tensorstore and the file system each raise their own
                self._handle_failed_save(error)
        return time.perf_counter() - start

    def save_last(self, state: TrainState, position: DataPosition, scores: Mapping[int, float] | None = None) -> None:
        """Wait until the run's last state, whose save has begun, is on disk; retry once if that failed.

        Raises:
            UserError: it cannot be saved.
        """
        self.wait_until_finished()
        if any_process(self.save_failed):
            self.save(state, position, scores)
            self.wait_until_finished()
        if any_process(self.save_failed):
            remedy = "" if self._is_remote else f"free space on the disk of {self.folder} and "
            raise (StorageUnavailableError if self._is_remote else UserError)(
                f"the state after step {position.step} could not be saved to {self.folder}; {remedy}start the run "
                f"again: it resumes from step {max(self.steps(), default=0)}"
            )

    def close(self) -> None:
        """Finish background saves and release the folder."""
        self.wait_until_finished()
        self._manager.close()

    def wait_until_finished(self) -> None:
        """Block until background saves are on disk or have failed."""
        if self._pending_step is None:
            return
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            self._handle_failed_save(error)
            return
        self._events.log_event("saved", self._pending_step, seconds=time.monotonic() - self._last_save)
        self._pending_step, self._failed_saves = None, 0
        self._remove_unfinished()

    def _handle_failed_save(self, error: Exception) -> None:
        step, self._pending_step, self.save_failed = self._pending_step, None, True
        self._failed_saves += 1
        assert step is not None
        if self._lazy:  # nobody retries an import
            raise error
        logging.warning(
            "saving the checkpoint of step %d failed (%s); earlier checkpoints are intact, and the save will be "
            "retried%s", step, _first_line(error), "" if self._is_remote else ": free disk space",
        )  # fmt: skip
        self._events.log_event("save_failed", step, reason=_first_line(error))
        if self._is_remote:  # which may not answer now
            self._unfinished.add(step)
            return
        unfinished = self.folder.glob(f"{step}.orbax-checkpoint-tmp*") if is_primary_process() else ()
        for folder in unfinished:  # it takes the space that is lacking
            remove_tree(folder)

    def _remove_unfinished(self) -> None:
        """Delete what saves that failed left in an object store."""
        saved = set(self.steps()) if self._unfinished else set()
        for step in self._unfinished - saved if is_primary_process() else ():
            remove_tree(self.folder / str(step))
        self._unfinished.clear()

    def restore(self, abstract_state: TrainState, step: int | None = None) -> tuple[TrainState, DataPosition]:
        """Restore a step's state (the last by default), laid out like ``abstract_state``, which describes each array.

        Raises:
            DamagedCheckpointError: the checkpoint is incomplete, or an array is not what was saved.
            UserError: no such checkpoint, or one of another model or of a newer format.
        """
        step = self.resolve_step(step)
        position = self._read_position(step)
        return self._restore_checked(step, abstract_state), position

    def restore_last_good(self, abstract_state: TrainState) -> tuple[TrainState, DataPosition]:
        """Restore the newest intact state. Damaged checkpoints are logged and quarantined: renamed, never deleted.

        Raises:
            DamagedCheckpointError: none is intact.
            UserError: as :meth:`restore`.
        """
        damaged: dict[int, DamagedCheckpointError] = {}
        self.wait_until_finished()
        self.refresh()
        self.resolve_step(None)
        for step in reversed(self.steps()):
            damage = None
            try:
                restored = self.restore(abstract_state, step)
            except DamagedCheckpointError as error:
                damage = error
            if all_processes(damage is None):
                self._quarantine(damaged)
                return restored
            damaged[step] = damage or DamagedCheckpointError(
                f"checkpoint {self.folder / str(step)} is damaged on another host"
            )
        newest = damaged[max(damaged)]
        if len(damaged) == 1:
            raise newest
        raise DamagedCheckpointError(f"none of the {len(damaged)} checkpoints can be used: {newest}")

    def _quarantine(self, damaged: Mapping[int, DamagedCheckpointError]) -> None:
        for step, error in damaged.items():
            folder = next(p for i in range(10**6) if not (p := self.folder / f"damaged-{step}-{i}").exists())
            if is_primary_process():
                (self.folder / str(step)).rename(folder)
            logging.warning(
                "%s; renamed it to %s and using the one before it", str(error).partition(";")[0], folder.name
            )
            self._events.log_event("checkpoint_damaged", step, reason=str(error))
        if damaged:
            multihost_utils.sync_global_devices("damaged checkpoints are quarantined")
            self.refresh()

    def restore_params(self, abstract_params: Any, step: int | None = None, *, tree: str = "params") -> tuple[Any, int]:
        """Restore the parameters alone, and return them with their step.

        They are read from ``tree``, as "ema"; what it lacks because it was frozen is read from ``params``.
        ``abstract_params`` describes a model without LoRA: adapters in the tree are merged into their kernels.

        Raises:
            DamagedCheckpointError, UserError: as :meth:`restore`.
        """
        step = self.resolve_step(step)
        stored, target, has_adapters = self.array_specs(step), dict[tuple[str, ...], Any](), False
        for path, leaf in flatten_dict(abstract_params).items():
            target[tree if (tree, *path) in stored else "params", *path] = leaf
            for factor in stored_adapter((tree, *path), stored).values():
                shape, dtype = stored[factor]
                target[factor] = jax.ShapeDtypeStruct(shape, dtype, sharding=_replicated_like(leaf))
                has_adapters = True
        self._read_position(step)
        restored = self._restore_checked(step, unflatten_dict(target))
        params = combine(restored.get(tree, {}), restored.get("params", {}))
        if has_adapters:
            params = merge_adapters(params, self.model_metadata(step).lora_scale, merge_adapter_on_devices)
        return params, step

    def _restore_checked(self, step: int, abstract_tree: Any) -> Any:
        """Restore arrays in their stored dtype, in which they are checked, and cast them."""
        stored = self._check_shapes(step, abstract_tree)
        exact = jax.tree_util.tree_map_with_path(
            lambda path, leaf: jax.ShapeDtypeStruct(
                leaf.shape, stored[leaf_name(path)].dtype, sharding=getattr(leaf, "sharding", None)
            ),
            abstract_tree,
        )
        restore_args = ocp.checkpoint_utils.construct_restore_args(exact)
        restored = self._read(step, ocp.args.PyTreeRestore(item=exact, restore_args=restore_args, partial_restore=True))
        self._check_checksums(step, restored)
        return jax.tree.map(
            lambda x, leaf: x if x.dtype == leaf.dtype else x.astype(leaf.dtype), restored, abstract_tree
        )

    def _read(self, step: int, target: Any) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(state=target)).state
        except Exception as error:  # tensorstore, zarr and orbax each raise their own for a damaged file
            raise self._read_error(step, error) from error

    def model_metadata(self, step: int | None = None) -> ModelMetadata:
        """Return which model a step's checkpoint holds.

        Raises:
            DamagedCheckpointError: the metadata do not say, or are incomplete.
            UserError: no such checkpoint.
        """
        step = self.resolve_step(step)
        model = self._read_meta(step).get("model")
        if not isinstance(model, dict):
            raise self._damaged(step, "of a version that did not record its model")
        try:
            return build(ModelMetadata, model, "model")
        except UserError as error:
            raise self._damaged(step, f"of another version, or incomplete (meta/metadata: {error})") from error

    def array_specs(self, step: int | None = None) -> dict[tuple[str, ...], tuple[tuple[int, ...], np.dtype[Any]]]:
        """Return shape and dtype of every array of a step by its path; no array is read."""
        return {
            tuple(name.split("/")): (tuple(leaf.shape), np.dtype(leaf.dtype))
            for name, leaf in self._stored_leaves(self.resolve_step(step)).items()
        }

    def read_arrays(
        self, paths: Sequence[tuple[str, ...]], step: int | None = None
    ) -> dict[tuple[str, ...], NDArray[Any]]:
        """Read arrays of nested dicts to the host, whole, whatever mesh they were saved from.

        Raises:
            DamagedCheckpointError: the checkpoint is damaged.
            UserError: no such checkpoint.
        """
        step = self.resolve_step(step)
        item = unflatten_dict(dict.fromkeys(paths, 0))
        restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
        restored = self._read(step, ocp.args.PyTreeRestore(item=item, restore_args=restore_args, partial_restore=True))
        self._check_checksums(step, restored)
        leaves = flatten_dict(restored)
        return {path: np.asarray(leaves[path]) for path in paths}

    def resolve_step(self, step: int | None) -> int:
        """Return a saved step: the last one for None. Raises UserError if it is not saved."""
        steps = self.steps()
        if not steps:
            raise UserError(f"{self.folder} holds no checkpoint; train first, or check the path")
        if step is not None and step not in steps:
            raise UserError(f"{self.folder} holds no checkpoint of step {step}; there are {steps}")
        return steps[-1] if step is None else step

    def _read_position(self, step: int) -> DataPosition:
        position = self._read_meta(step)["position"]
        try:
            return build(DataPosition, position, "position")
        except UserError as error:
            raise self._damaged(step, f"incomplete: meta/metadata is damaged ({error})") from error

    def _read_meta(self, step: int) -> dict[str, Any]:
        path = self.folder / str(step) / "meta" / "metadata"
        try:
            meta = json.loads(path.read_text())
            newer, _ = meta["format"] > FORMAT_VERSION, meta["position"]["step"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, OSError) and (is_transient(error) or is_access_error(error)):
                raise self._read_error(step, error) from error
            raise self._damaged(step, "incomplete: meta/metadata is missing or damaged") from error
        if newer:
            raise UserError(
                f"checkpoint {path.parent.parent} has format {meta['format']}, but this version reads up to "
                f"{FORMAT_VERSION}; update mplug2_jax"
            )
        return dict(meta)

    def _stored_leaves(self, step: int) -> dict[str, Any]:
        """Return the metadata of a step's arrays by name; they are read once."""
        if step in self._leaves:
            return self._leaves[step]
        if not (self.folder / str(step) / "state" / "_METADATA").exists():
            raise self._damaged(step, "incomplete: state/_METADATA is missing")
        try:
            stored = self._manager.item_metadata(step).state
        except Exception as error:
            raise self._read_error(step, error) from error
        self._leaves[step] = leaves_by_name(stored.tree)
        return self._leaves[step]

    def _read_error(self, step: int, error: Exception) -> Exception:
        """Return what a failed read means: storage that does not answer or refuses, or else a damaged checkpoint."""
        if is_transient(error):
            return StorageUnavailableError(
                f"checkpoint {self.folder / str(step)} cannot be read now ({_first_line(error)}); start again later"
            )
        if is_access_error(error):
            return UserError(
                f"checkpoint {self.folder / str(step)} cannot be read ({_first_line(error)}); grant this account access"
            )
        return self._damaged(step, f"damaged ({_first_line(error)})")

    def _check_checksums(self, step: int, restored: Any) -> None:
        """Compare every array with its checksum at the save; checkpoints of older versions have none."""
        expected = self._read_meta(step).get("digests", {})
        wrong = find_mismatches(checksums(restored), expected) if expected else []
        if wrong:
            more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            raise self._damaged(step, f"damaged ({wrong[0]}{more} differs from what was saved, by its checksum)")

    def _check_shapes(self, step: int, abstract_tree: Any) -> dict[str, Any]:
        """Compare names and shapes with what is stored, so that the error can name the first difference."""
        where, stored = f"checkpoint {self.folder / str(step)}", self._stored_leaves(step)
        has_optimizer = any(name.startswith("opt/") for name in stored)
        for name, leaf in leaves_by_name(abstract_tree).items():
            if name.startswith("opt/") and not has_optimizer:
                raise UserError(
                    f"{where} holds weights without an optimizer state, so no run can "
                    f"resume from it: start one in a new --workdir with --config.init_from={self.folder.parent}"
                )
            if name not in stored and name.startswith("opt/"):
                raise UserError(
                    f"{where} lacks {name}, which the optimizer needs: a resumed run can "
                    "neither train more parts, nor change the kind of optimizer, nor turn clipping on or off (an "
                    "optimizer.clip_norm of 1e9 never clips); set config.freeze, config.lora, config.optimizer.kind "
                    "and config.optimizer.clip_norm as they were"
                )
            if name not in stored:
                raise UserError(f"{where} lacks {name}, which this config needs; check its model and its parts")
            if tuple(stored[name].shape) != tuple(leaf.shape):
                raise UserError(
                    f"{where} is of another size: {name} is "
                    f"{list(stored[name].shape)} there, {list(leaf.shape)} in this model; match config.model"
                )
        return stored

    def _damaged(self, step: int, problem: str) -> DamagedCheckpointError:
        others = [other for other in self.steps() if other != step]
        remedy = f"choose another step of {others}" if others else "it is the only one: restore it from a copy"
        return DamagedCheckpointError(
            f"checkpoint {self.folder / str(step)} is {problem}; {remedy}, or move it away to train without it"
        )


def open_checkpoint(path: Path) -> tuple[Checkpoints, int]:
    """Open a checkpoint by its step's folder, by the folder of all steps, or by the work directory (the last step).

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
    checkpoints = Checkpoints(folder, CheckpointConfig(), read_only=True)
    return checkpoints, checkpoints.resolve_step(step)


def _state_handler(lazy: bool) -> Any:
    """Return Orbax's handler of states; lazy arrays are not compressed, because weights hardly compress."""
    registry = type_handlers.create_type_handler_registry(
        (jax.Array, type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=MIN_SLICE_BYTES)),
        (np.ndarray, type_handlers.NumpyHandler()),
        (LazyArray, LazyArrayHandler()),
    )
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry, use_compression=not lazy)


def _replicated_like(leaf: Any) -> Any:
    """Return a sharding that replicates a small array over all devices of a large one."""
    sharding = getattr(leaf, "sharding", None)
    return NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else sharding


def _first_line(error: BaseException) -> str:
    """Return the beginning of a library's message, which goes on with addresses in memory."""
    return (str(error).strip() or type(error).__name__).split("\n")[0].partition(". See full")[0][:160]
