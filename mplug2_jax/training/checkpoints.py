"""Checkpoints by Orbax: parameters, optimiser, teacher, queues, step and data position, as one unit."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from mplug2_jax.errors import UserError
from mplug2_jax.training.config import CheckpointConfig
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


class Checkpoints:
    """The checkpoints of a work directory. Saves run in the background; call ``close`` before the process ends.

    A reader (``writes=False``) leaves the folder alone: what looks unfinished may be a save of a run that goes on.
    """

    def __init__(self, folder: Path, config: CheckpointConfig, *, writes: bool = True) -> None:
        self.folder, self._config = folder, config
        self._manager = ocp.CheckpointManager(
            folder.absolute(),
            # Named here, so that a process that has saved nothing can read the arrays' shapes.
            item_handlers={"state": ocp.PyTreeCheckpointHandler(), "meta": ocp.JsonCheckpointHandler()},
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
            self._manager.save(
                position.step,
                args=ocp.args.Composite(state=ocp.args.PyTreeSave(state), meta=ocp.args.JsonSave(position.as_json())),
            )

    def restore(self, like: TrainState, step: int | None = None) -> tuple[TrainState, Position]:
        """The state of a step (the last by default), laid out like ``like``, which describes every array.

        Raises:
            UserError: no such checkpoint, a damaged one, one of another model, or of a newer format.
        """
        step = self._pick(step)
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
        step = self._pick(step)
        self._position(step)
        self._check_shapes(step, {"params": like})
        tree = {"params": like}
        target = ocp.args.PyTreeRestore(
            item=tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree), partial_restore=True
        )
        try:
            restored = self._manager.restore(step, args=ocp.args.Composite(state=target))
        except Exception as error:
            raise self._unreadable(step, f"damaged ({_reason(error)})") from error
        return restored.state["params"], step

    def _pick(self, step: int | None) -> int:
        steps = self.steps()
        if not steps:
            raise UserError(f"{self.folder} holds no checkpoint; train first, or check the path")
        if step is not None and step not in steps:
            raise UserError(f"{self.folder} holds no checkpoint of step {step}; there are {steps}")
        return steps[-1] if step is None else step

    def _position(self, step: int) -> Position:
        path = self.folder / str(step) / "meta" / "metadata"
        try:
            meta = json.loads(path.read_text())
            position = Position(**meta["position"])
            found = meta["format"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self._unreadable(step, "incomplete: meta/metadata is missing or damaged") from error
        if found > FORMAT:
            raise UserError(
                f"checkpoint {path.parent.parent} has format {found}, but this version reads up to {FORMAT}"
            )
        return position

    def _check_shapes(self, step: int, like: Any) -> None:
        """Compares names, shapes and types with what is stored, so that the error can name the first difference."""
        try:
            stored = self._manager.item_metadata(step).state
        except Exception as error:
            raise self._unreadable(step, f"damaged ({_reason(error)})") from error
        if stored is None:
            raise self._unreadable(step, "incomplete: state/_METADATA is missing")
        found = {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(stored.tree)}
        for path, leaf in jax.tree_util.tree_leaves_with_path(like):
            name = _name(path)
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


def _name(path: Any) -> str:
    """A leaf's path, the same for dicts, tuples and dataclasses as Orbax gives them back."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def _reason(error: BaseException) -> str:
    """The beginning of what a library says, which goes on with its own addresses in memory."""
    return (str(error).strip() or type(error).__name__).split("\n")[0].partition(". See full")[0][:160]
