"""Steps that go wrong: updates that were skipped, losses that jump, and who was in the batch."""

import collections
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from data_pipelines.loader import Made
from mplug2_jax.errors import UserError
from mplug2_jax.training.checkpoint.metadata import DataPosition
from mplug2_jax.training.config import FaultConfig
from mplug2_jax.training.telemetry.events import Events, JsonLines, read_lines

Rows = Sequence[tuple[str, Made]]
"""The rows that this process made of a step's batches, each with its stream."""


class Watch:
    """Judges every step of a run, in order.

    What it says goes to ``faults.jsonl``: a line for each step that went wrong, with the examples of its batches.

    Args:
        config: what is wrong, and how much of it is too much.
        path: of ``faults.jsonl``.
        events: takes what happened.
        recent: the last losses of the run that is continued.
    """

    def __init__(self, config: FaultConfig, path: Path, events: Events, recent: Sequence[float] = ()) -> None:
        self._config, self._events = config, events
        self._lines = JsonLines(path)
        self._recent = collections.deque(recent, maxlen=config.spike_window)
        self._skipped: list[tuple[int, list[dict[str, Any]]]] = []  # in a row
        self._rollbacks: collections.Counter[int] = collections.Counter()

    @property
    def recent(self) -> tuple[float, ...]:
        """The last losses, for a checkpoint. Without spikes to look for there is nothing to keep."""
        return tuple(self._recent)

    def spiked(self, step: int, metrics: Mapping[str, jax.Array], rows: Rows) -> bool:
        """Takes a finished step; whether its loss is so far above the last ones that the run should go back.

        Raises:
            UserError: too many updates in a row were skipped, with the examples of the last.
        """
        loss = float(np.asarray(metrics["loss"]))
        if int(np.asarray(metrics["skipped"])):
            wrong = [name for name, value in jax.device_get(dict(metrics)).items() if not np.isfinite(value).all()]
            self._skip(step, wrong, listed(rows))
            return False
        self._skipped.clear()
        if self._config.spike_zscore and len(self._recent) == self._config.spike_window:
            mean, deviation = float(np.mean(self._recent)), float(np.std(self._recent))
            limit = mean + self._config.spike_zscore * max(
                deviation, 0.01 * abs(mean)
            )  # losses that stand still may tremble
            if loss > limit:
                self._lines.write({"step": step, "fault": "spike", "loss": loss, "limit": limit, "rows": listed(rows)})
                return True
        if self._config.spike_zscore:
            self._recent.append(loss)
        return False

    def _skip(self, step: int, wrong: Sequence[str], rows: list[dict[str, Any]]) -> None:
        self._lines.write({"step": step, "fault": "not finite", "metrics": list(wrong), "rows": rows})
        self._skipped.append((step, rows))
        self._events.note(
            "skipped", step, metrics=list(wrong),
            said=f"step {step} is skipped: {', '.join(wrong[:3])} {'is' if len(wrong) == 1 else 'are'} not finite",
        )  # fmt: skip
        if len(self._skipped) >= self._config.max_consecutive_skips:
            steps = f"{self._skipped[0][0]} to {step}"
            named = "; ".join(
                f"step {number}: {', '.join(row['key'] for row in found[:4])}{', ...' if len(found) > 4 else ''}"
                for number, found in self._skipped[-3:]
            )
            raise UserError(
                f"loss or gradient were not finite in {len(self._skipped)} steps in a row, {steps} (examples of "
                f"{named}; all in faults.jsonl): lower the learning rate, look at the examples with mplug2 replay, or "
                "raise config.faults.max_consecutive_skips"
            )

    def roll_back(self, step: int, to: DataPosition, now: DataPosition) -> DataPosition:
        """Where to go on after a spike: at a checkpoint, with the data behind the step that spiked.

        Args:
            step: that spiked.
            to: the checkpoint's own position.
            now: the run's, which knows of rollbacks since the checkpoint was saved.

        Raises:
            UserError: the run went back to this checkpoint too often.
        """
        self._rollbacks[to.step] += 1
        if self._rollbacks[to.step] > self._config.max_rollbacks:
            raise UserError(
                f"the loss of step {step} jumped, and the run has gone back to step {to.step} for that "
                f"{self._config.max_rollbacks} times: lower the learning rate, or raise config.faults.spike_zscore"
            )
        moved = DataPosition(to.step, to.streams, now.offsets, to.recent).after_rollback(step)
        self._recent = collections.deque(to.recent, maxlen=self._config.spike_window)
        offset = moved.offsets[-1][1]
        self._events.note(
            "rolled back", step, to=to.step, offset=offset,
            said=f"the loss of step {step} jumped: back to step {to.step}, leaving out the data up to there",
        )  # fmt: skip
        return moved

    def close(self) -> None:
        """Closes the file."""
        self._lines.close()


def with_later_rollbacks(position: DataPosition, events: Path) -> DataPosition:
    """A checkpoint's position, with the rollback to it that came after it was saved, if there was one."""
    later = [line for line in read_lines(events) if line.get("event") == "rolled back" and line["to"] == position.step]
    if not later:
        return position
    kept = tuple(pair for pair in position.offsets if pair[0] < position.step)
    return DataPosition(
        position.step, position.streams, (*kept, (position.step, int(later[-1]["offset"]))), position.recent
    )


def listed(rows: Rows) -> list[dict[str, Any]]:
    """Rows as they are written down: the example's id, and the record that it was made of."""
    return [
        {
            "stream": name, "id": int(made.example.arrays["example_id"]), "key": made.example.key,
            "source": made.pick.source, "record": made.pick.index, "epoch": made.pick.epoch,
        }
        for name, made in rows
    ]  # fmt: skip
