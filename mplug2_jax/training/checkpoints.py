"""Checkpoints by Orbax: parameters, optimiser, teacher, queues, step and data position, as one unit."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from numpy.typing import NDArray

from mplug2_jax.config import build, defaults_of
from mplug2_jax.errors import UserError
from mplug2_jax.model.config import ModelConfig
from mplug2_jax.training.config import CheckpointConfig
from mplug2_jax.training.lazy import lazy_handler
from mplug2_jax.training.state import TrainState

FORMAT = 1
"""Raised when what is written changes so that older code would misread it."""


@dataclasses.dataclass(frozen=True)
class Position:
    """Where the data are: the next step, and what decides which examples a step holds."""

    step: int
    streams: Mapping[str, Mapping[str, Any]]

    def as_json(self) -> dict[str, Any]:
        """For the checkpoint's metadata."""
        return {"format": FORMAT, "position": dataclasses.asdict(self)}


@dataclasses.dataclass(frozen=True)
class Identity:
    """Which model a checkpoint is of; for imported weights also where they came from."""

    config: ModelConfig
    parts: tuple[str, ...]
    origin: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """For the checkpoint's metadata."""
        return {"config": defaults_of(self.config), "parts": list(self.parts), "origin": dict(self.origin)}


class _Manager(ocp.CheckpointManager):
    """Orbax's, which asks nobody whether the run is told to end: the loop does, and counts its questions."""

    def reached_preemption(self, step: int) -> bool:
        return False


class Checkpoints:
    """The checkpoints of a work directory. Saves run in the background; call ``close`` before the process ends.

    A reader (``writes=False``) leaves the folder alone: what looks unfinished may be a save of a run that goes on.
    """

    def __init__(
        self, folder: Path, config: CheckpointConfig, *, identity: Identity | None = None, writes: bool = True,
        lazy: bool = False,
    ) -> None:  # fmt: skip
        """``lazy``: what will be saved are trees of :class:`~mplug2_jax.training.lazy.LazyArray`."""
        self.folder, self._config, self._identity = folder, config, identity
        self._manager = _Manager(
            folder.absolute(),
            # Named here, so that a process that has saved nothing can read the arrays' shapes.
            item_handlers={
                "state": lazy_handler() if lazy else ocp.PyTreeCheckpointHandler(),
                "meta": ocp.JsonCheckpointHandler(),
            },
            options=ocp.CheckpointManagerOptions(
                max_to_keep=config.keep, create=writes, cleanup_tmp_directories=writes
            ),
        )

    def steps(self) -> list[int]:
        """All saved steps, oldest first."""
        return sorted(int(step) for step in self._manager.all_steps())

    def save(self, state: TrainState, position: Position) -> None:
        """Starts saving; returns once the arrays are copied off the devices' reach."""
        if position.step not in self.steps():
            meta = position.as_json() | ({"model": self._identity.as_json()} if self._identity else {})
            self._manager.save(
                position.step,
                args=ocp.args.Composite(state=ocp.args.PyTreeSave(state), meta=ocp.args.JsonSave(meta)),
            )

    def restore(self, like: TrainState, step: int | None = None) -> tuple[TrainState, Position]:
        """The state of a step (the last by default), laid out like ``like``, which describes every array.

        Raises:
            UserError: no such checkpoint, a damaged one, one of another model, or of a newer format.
        """
        step = self.pick(step)
        target = ocp.args.PyTreeRestore(item=like, restore_args=ocp.checkpoint_utils.construct_restore_args(like))
        position = self._position(step)
        self._check_shapes(step, like)
        try:
            restored = self._manager.restore(step, args=ocp.args.Composite(state=target))
        except Exception as error:  # tensorstore, zarr and orbax each raise their own for a damaged file
            raise self._unreadable(step, f"damaged ({_reason(error)})") from error
        return restored.state, position

    def restore_params(self, like: Any, step: int | None = None) -> tuple[Any, int]:
        """The parameters alone, with their step. Raises as :meth:`restore`."""
        step = self.pick(step)
        return self.restore_tree({"params": like}, step)["params"], step

    def restore_tree(self, like: Any, step: int) -> Any:
        """A part of the state, laid out like ``like``. Raises as :meth:`restore`."""
        self._position(step)
        self._check_shapes(step, like)
        target = ocp.args.PyTreeRestore(
            item=like, restore_args=ocp.checkpoint_utils.construct_restore_args(like), partial_restore=True
        )
        try:
            return self._manager.restore(step, args=ocp.args.Composite(state=target)).state
        except Exception as error:
            raise self._unreadable(step, f"damaged ({_reason(error)})") from error

    def identity(self, step: int | None = None) -> Identity:
        """Which model a step's checkpoint is of.

        Raises:
            UserError: no such checkpoint, or one that does not say.
        """
        step = self.pick(step)
        model = self._meta(step).get("model")
        if not isinstance(model, dict):
            raise self._unreadable(step, "of a version that did not note which model it is of")
        try:
            return Identity(build(ModelConfig, model["config"]), tuple(model["parts"]), model["origin"])
        except (KeyError, TypeError) as error:
            raise self._unreadable(step, f"incomplete: meta/metadata lacks {error}") from error

    def leaves(self, step: int | None = None) -> dict[tuple[str, ...], tuple[tuple[int, ...], np.dtype[Any]]]:
        """Shape and type of every array of a step by its path; nothing is read."""
        step = self.pick(step)
        tree = self._stored(step)
        return {
            tuple(_name(path).split("/")): (tuple(leaf.shape), np.dtype(leaf.dtype))
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }

    def read(self, paths: Sequence[tuple[str, ...]], step: int | None = None) -> dict[tuple[str, ...], NDArray[Any]]:
        """Arrays of dicts in dicts on the host, whole, whatever mesh they were saved from.

        Raises:
            UserError: the checkpoint is damaged.
        """
        step = self.pick(step)
        item: dict[str, Any] = {}
        how: dict[str, Any] = {}
        for path in paths:
            _put(item, path, 0)
            _put(how, path, ocp.RestoreArgs(restore_type=np.ndarray))
        target = ocp.args.PyTreeRestore(item=item, restore_args=how, partial_restore=True)
        try:
            found = self._manager.restore(step, args=ocp.args.Composite(state=target)).state
        except Exception as error:
            raise self._unreadable(step, f"damaged ({_reason(error)})") from error
        arrays = {}
        for path in paths:
            node = found
            for key in path:
                node = node[key]
            arrays[path] = np.asarray(node)
        return arrays

    def pick(self, step: int | None) -> int:
        """A step that is there: the last by default. Raises UserError if it is not."""
        steps = self.steps()
        if not steps:
            raise UserError(f"{self.folder} holds no checkpoint; train first, or check the path")
        if step is not None and step not in steps:
            raise UserError(f"{self.folder} holds no checkpoint of step {step}; there are {steps}")
        return steps[-1] if step is None else step

    def _position(self, step: int) -> Position:
        try:
            return Position(**self._meta(step)["position"])
        except TypeError as error:
            raise self._unreadable(step, "incomplete: meta/metadata is damaged") from error

    def _meta(self, step: int) -> dict[str, Any]:
        path = self.folder / str(step) / "meta" / "metadata"
        try:
            meta = json.loads(path.read_text())
            found, _ = meta["format"], meta["position"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self._unreadable(step, "incomplete: meta/metadata is missing or damaged") from error
        if found > FORMAT:
            raise UserError(
                f"checkpoint {path.parent.parent} has format {found}, but this version reads up to {FORMAT}"
            )
        return dict(meta)

    def _stored(self, step: int) -> Any:
        """The tree of what is stored, described."""
        try:
            stored = self._manager.item_metadata(step).state
        except Exception as error:
            raise self._unreadable(step, f"damaged ({_reason(error)})") from error
        if stored is None:
            raise self._unreadable(step, "incomplete: state/_METADATA is missing")
        return stored.tree

    def _check_shapes(self, step: int, like: Any) -> None:
        """Compares names, shapes and types with what is stored, so that the error can name the first difference."""
        found = {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(self._stored(step))}
        for path, leaf in jax.tree_util.tree_leaves_with_path(like):
            name = _name(path)
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

    def _unreadable(self, step: int, how: str) -> UserError:
        others = [other for other in self.steps() if other != step]
        remedy = f"steps {others} are left: choose one" if others else "it is the only one: restore it from a copy"
        return UserError(
            f"checkpoint {self.folder / str(step)} is {how}; {remedy}, or move it away to train without it"
        )

    def wait(self) -> None:
        """Blocks until background saves are on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Finishes background saves and releases the folder."""
        self._manager.close()


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
    found = Checkpoints(folder, CheckpointConfig(), writes=False)
    return found, found.pick(step)


def _put(tree: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value


def _name(path: Any) -> str:
    """A leaf's path, the same for dicts, tuples and dataclasses as Orbax gives them back."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def _reason(error: BaseException) -> str:
    """The beginning of what a library says, which goes on with its own addresses in memory."""
    return (str(error).strip() or type(error).__name__).split("\n")[0].partition(". See full")[0][:160]
