"""Steps that go wrong: updates that were skipped, losses that spike, and the examples of their batches."""

import collections
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging

from data_pipelines.loader import LoadedExample
from data_pipelines.storage.jsonl import JsonlWriter
from mplug2_jax.errors import UserError
from mplug2_jax.training.checkpoint.metadata import DataPosition
from mplug2_jax.training.config import FaultConfig
from mplug2_jax.training.telemetry.events import EventLog, read_events

LocalRows = Sequence[tuple[str, LoadedExample]]
"""The rows of a step's batches that this process loaded, each with its stream."""


class FaultDetector:
    """Looks at every finished step of a run, in order.

    ``faults.jsonl`` has a line for each step that went wrong, with the examples of its batches.

    Args:
        config: what counts as a fault, and how many faults stop the run.
        path: of ``faults.jsonl``.
        events: receives what happens.
        recent: the last losses of the run that is resumed.
    """

    def __init__(self, config: FaultConfig, path: Path, events: EventLog, recent: Sequence[float] = ()) -> None:
        self._config, self._events = config, events
        self._writer = JsonlWriter(path)
        self._recent = collections.deque(recent, maxlen=config.spike_window)
        self._skips: list[tuple[int, list[dict[str, Any]]]] = []  # the current sequence of skipped steps
        self._num_rollbacks: collections.Counter[int] = collections.Counter()

    @property
    def recent(self) -> tuple[float, ...]:
        """Return the last losses, for a checkpoint; none if spikes are not detected."""
        return tuple(self._recent)

    def observe(self, step: int, metrics: Mapping[str, jax.Array], rows: LocalRows) -> bool:
        """Take a finished step; return whether its loss is so far above the last ones that the run should roll back.

        Raises:
            UserError: too many updates in a row were skipped; names the examples of the last.
        """
        loss = float(np.asarray(metrics["loss"]))
        if int(np.asarray(metrics["skipped"])):
            non_finite = [name for name, value in jax.device_get(dict(metrics)).items() if not np.isfinite(value).all()]
            self._record_skip(step, non_finite, describe_rows(rows))
            return False
        self._skips.clear()
        if self._config.spike_zscore and len(self._recent) == self._config.spike_window:
            mean, deviation = float(np.mean(self._recent)), float(np.std(self._recent))
            # Losses that are constant may vary by a percent.
            limit = mean + self._config.spike_zscore * max(deviation, 0.01 * abs(mean))
            if loss > limit:
                spike = {"step": step, "fault": "spike", "loss": loss, "limit": limit, "examples": describe_rows(rows)}
                self._writer.write(spike)
                return True
        if self._config.spike_zscore:
            self._recent.append(loss)
        return False

    def _record_skip(self, step: int, non_finite: Sequence[str], examples: list[dict[str, Any]]) -> None:
        fault = {"step": step, "fault": "non_finite", "metrics": list(non_finite), "examples": examples}
        self._writer.write(fault)
        self._skips.append((step, examples))
        logging.warning("step %d: update skipped, non-finite %s", step, ", ".join(non_finite[:3]))
        self._events.log_event("update_skipped", step, metrics=list(non_finite))
        if len(self._skips) >= self._config.max_consecutive_skips:
            keys = "; ".join(
                f"step {skipped}: {', '.join(example['key'] for example in batch[:4])}{', ...' if batch[4:] else ''}"
                for skipped, batch in self._skips[-3:]
            )
            raise UserError(
                f"{len(self._skips)} updates in a row, steps {self._skips[0][0]} to {step}, were skipped because loss "
                f"or gradient was not finite (examples of {keys}; all are in faults.jsonl): lower the learning rate, "
                "inspect the examples with mplug2 replay, or raise config.faults.max_consecutive_skips"
            )

    def roll_back(self, step: int, checkpoint_position: DataPosition, current_position: DataPosition) -> DataPosition:
        """Return where the run continues after a spike: at a checkpoint, with the data after the step that spiked.

        Args:
            step: that spiked.
            checkpoint_position: of the checkpoint.
            current_position: of the run, which knows of rollbacks since the checkpoint was saved.

        Raises:
            UserError: the run rolled back to this checkpoint too often.
        """
        to_step, recent = checkpoint_position.step, checkpoint_position.recent
        self._num_rollbacks[to_step] += 1
        if self._num_rollbacks[to_step] > self._config.max_rollbacks:
            raise UserError(
                f"the loss of step {step} spiked, and the run rolled back {self._config.max_rollbacks} times to step "
                f"{to_step}: lower the learning rate, or raise config.faults.spike_zscore"
            )
        position = DataPosition(to_step, checkpoint_position.streams, current_position.offsets, recent)
        position = position.after_rollback(step)
        self._recent = collections.deque(recent, maxlen=self._config.spike_window)
        logging.warning("step %d: loss spike, rolling back to step %d and skipping the data in between", step, to_step)
        self._events.log_event("rolled_back", step, to_step=to_step, data_offset=position.offsets[-1][1])
        return position

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


def apply_later_rollbacks(position: DataPosition, events: Path) -> DataPosition:
    """Return the position of a checkpoint after the last rollback to it, which came after it was saved, if any."""
    rollbacks = [line for line in read_events(events) if line["event"] == "rolled_back"]
    rollbacks = [line for line in rollbacks if line["to_step"] == position.step]
    if not rollbacks:
        return position
    earlier = tuple(pair for pair in position.offsets if pair[0] < position.step)
    offset = int(rollbacks[-1]["data_offset"])
    return DataPosition(position.step, position.streams, (*earlier, (position.step, offset)), position.recent)


def describe_rows(rows: LocalRows) -> list[dict[str, Any]]:
    """Return rows as they are written to files: the id of each example, and the record that it was made from."""
    return [
        {
            "stream": name, "example_id": int(row.example.arrays["example_id"]), "key": row.example.key,
            "source": row.ref.source, "record": row.ref.index, "epoch": row.ref.epoch,
        }
        for name, row in rows
    ]  # fmt: skip
