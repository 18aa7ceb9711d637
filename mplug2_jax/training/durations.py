"""Durations in steps, epochs, examples or percent, and runs built from recipes that use them.

Every field of type ``Steps`` takes a text in place of a number: ``"500 steps"``, ``"3 epochs"``, ``"1.5M examples"``,
``"5%"``. It is converted when the run is built, so that what is stored, compared at a resume and printed are steps:

- **percent** are of ``config.steps``.
- **examples** count the batches of all streams together, or those of a stream that is named: ``"1M examples of text"``.
  Those of a stage of ``batch_ramp`` are always of its own stream.
- **an epoch** is as many examples of a stream as its sources have records together, whatever their weights in the
  mixture; with ``drop_remainder``, which skips the last ones, the whole batches among them. With several streams, one
  is named: ``"2 epochs of image_text"``. Sources are opened to count their records.

A duration that is not a whole number of steps is rounded up.
"""

import bisect
import dataclasses
import functools
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Any

from absl import logging
from ml_collections import ConfigDict

from data_pipelines.config import BatchStage, DataConfig
from data_pipelines.errors import DataError
from mplug2_jax.config import build, load_recipe
from mplug2_jax.errors import UserError, did_you_mean
from mplug2_jax.training.config import RunConfig, StreamConfig

_ALL_STEPS = range(2**62)
_SCALES = {"": 1, "k": 10**3, "M": 10**6, "B": 10**9}
_DURATION = re.compile(
    r"(?P<number>[0-9]{1,18}(\.[0-9]{1,18})?) ?(?P<scale>[kMB]?)"
    r"( ?(?P<percent>%)| ?(?P<unit>step|epoch|example)s?( of (?P<stream>.+))?)?"
)


class Durations:
    """Converts durations to steps of a run.

    Args:
        streams: of the run.
        steps: ``config.steps``, of which percentages are; None: not known.
    """

    def __init__(self, streams: Mapping[str, StreamConfig], steps: int | str | None = None) -> None:
        self._data = {name: stream.data for name, stream in streams.items()}
        self._steps = steps
        self._epoch_lengths: dict[str, int] = {}

    def to_steps(self, text: str, where: str = "duration") -> int:
        """Return the steps that a duration takes, rounded up.

        Args:
            text: as ``"5%"`` or ``"3 epochs of text"``.
            where: name of the field, for messages.

        Raises:
            UserError: the text is not a duration, names no stream or an unknown one, or sources that cannot be opened.
        """
        field, match = f"{where}={text!r}", _DURATION.fullmatch(text)
        if not match or (match["stream"] and match["unit"] == "step"):
            raise UserError(
                f"{field} is not a duration: expected 500, '10k steps', '3 epochs', '1.5M examples', '5%', or with a "
                "stream's name '3 epochs of text'"
            )
        amount = Fraction(match["number"]) * _SCALES[match["scale"]]
        if match["percent"]:
            return math.ceil(amount / 100 * self._total_steps(amount, field))
        if match["unit"] == "example":
            return self._steps_of(
                amount, [self._check_stream(match["stream"], field)] if match["stream"] else self._data
            )
        if match["unit"] == "epoch":
            stream = self._check_stream(match["stream"] or "", field)
            return self._steps_of(amount * self._epoch_length(stream, field), [stream])
        return math.ceil(amount)

    def _steps_of(self, examples: Fraction, streams: Iterable[str]) -> int:
        """Return the number of steps whose batches of these streams have so many examples, or more."""
        from data_pipelines.order import BatchSchedule  # imports grain

        schedules = [BatchSchedule.of(self._data[name]) for name in streams]
        needed = math.ceil(examples)
        return bisect.bisect_left(_ALL_STEPS, needed, key=lambda step: sum(each.start(step) for each in schedules))

    def _total_steps(self, percent: Fraction, field: str) -> int:
        """Return the steps of the run. Raises UserError if they are not known, or fewer than the percentage takes."""
        if self._steps is None or (isinstance(self._steps, str) and self._steps.endswith("%")):
            raise UserError(f"{field}: percentages are of config.steps, which needs steps, epochs or examples itself")
        if percent > 100:
            raise UserError(f"{field} is longer than the run: expected at most 100%")
        return self.to_steps(self._steps, "config.steps") if isinstance(self._steps, str) else self._steps

    def _check_stream(self, name: str, field: str) -> str:
        """Return the name of a stream; empty: the only one. Raises UserError."""
        if not name and len(self._data) == 1:
            return next(iter(self._data))
        if not name:
            raise UserError(f"{field} names no stream, and each has its own epochs: add ' of {next(iter(self._data))}'")
        if name not in self._data:
            raise UserError(f"{field} names a stream that the run lacks: {did_you_mean(name, self._data)}")
        return name

    def _epoch_length(self, stream: str, field: str) -> int:
        """Return the examples of a stream's epoch. Raises UserError if its sources cannot be opened."""
        try:
            if stream not in self._epoch_lengths:
                self._epoch_lengths[stream] = count_epoch_examples(self._data[stream])
            return self._epoch_lengths[stream]
        except (DataError, OSError) as error:
            raise UserError(
                f"{field}: the records of config.streams.{stream} cannot be counted here ({error}); give steps or "
                "examples instead of epochs"
            ) from error


def count_epoch_examples(data: DataConfig) -> int:
    """Open the sources of a stream and return the number of examples of its epoch.

    Raises:
        DataError: a source that is missing or empty.
    """
    from data_pipelines.sources.formats import open_source  # imports every format's library

    records = sum(len(open_source(source, data.visual)) for source in data.sources.values())
    return records // data.batch_size * data.batch_size if data.drop_remainder else records


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Streams:
    streams: Mapping[str, StreamConfig]


def load_run_config(spec: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Return the run of a recipe, with overrides. Raises UserError, as ``load_recipe`` and :func:`build_run_config`."""
    return build_run_config(load_recipe(spec, overrides))


def build_run_config(recipe: ConfigDict) -> RunConfig:
    """Build a run from a recipe, convert its durations to steps, and log each.

    Raises:
        UserError: invalid fields, or durations that cannot be converted.
    """
    values = recipe.to_dict()
    for name, ramp in _find_ramps(values).items():
        values["streams"][name]["data"]["batch_ramp"] = _convert_ramp(name, ramp, values)

    @functools.cache
    def durations() -> Durations:
        return Durations(_build_streams(values, without=("mixture_stages",)), values.get("steps"))

    return build(RunConfig, values, to_steps=lambda text, where: _log(durations(), text, where))


def _log(durations: Durations, text: str, where: str) -> int:
    steps = durations.to_steps(text, where)
    logging.info("%s = %s = %d steps", where, text, steps)
    return steps


def _build_streams(recipe: Mapping[str, Any], without: Collection[str]) -> Mapping[str, StreamConfig]:
    """Build the streams of a recipe without these fields of their data; a duration of another field is one step."""

    def strip(stream: Any) -> Any:
        if not isinstance(stream, Mapping) or not isinstance(stream.get("data"), Mapping):
            return stream  # is refused when it is built
        return {**stream, "data": {name: value for name, value in stream["data"].items() if name not in without}}

    streams = recipe["streams"]
    if isinstance(streams, Mapping):
        streams = {name: strip(stream) for name, stream in streams.items()}
    return build(_Streams, {"streams": streams}, to_steps=lambda text, where: 1).streams


def _find_ramps(recipe: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return the batch ramps of a recipe that have durations, by stream."""
    ramps, streams = {}, recipe.get("streams")
    for name, stream in streams.items() if isinstance(streams, Mapping) else ():
        data = stream.get("data") if isinstance(stream, Mapping) else None
        ramp = data.get("batch_ramp") if isinstance(data, Mapping) else None
        if isinstance(ramp, (list, tuple)) and any(
            isinstance(stage, Mapping) and isinstance(stage.get("last_step"), str) for stage in ramp
        ):
            ramps[name] = list(ramp)
    return ramps


def _convert_ramp(name: str, ramp: list[Any], recipe: Mapping[str, Any]) -> list[BatchStage]:
    """Convert the durations of a stream's batch ramp, stage by stage: each depends on the sizes before it.

    Raises:
        UserError: invalid stages, or a percentage where config.steps depends on the ramp.
    """
    where, steps = f"config.streams.{name}.data", recipe.get("steps")
    stream = _build_streams(recipe, without=("mixture_stages", "batch_ramp"))[name]
    stages: list[BatchStage] = []
    for i, values in enumerate(ramp):
        place = f"{where}.batch_ramp[{i}]"
        stage = build(BatchStage, values, place, to_steps=lambda text, where: 1)
        if isinstance(text := values["last_step"], str):
            total = _DURATION.fullmatch(str(steps))
            if "%" in text and total and total["unit"] in ("example", "epoch"):
                raise UserError(
                    f"{place}.last_step={text!r}: percentages are of config.steps={steps!r}, which depends on the "
                    "ramp; give steps or examples in one of them"
                )
            try:
                data = dataclasses.replace(stream.data, batch_ramp=tuple(stages), batch_size=stage.batch_size)
            except DataError as error:
                raise UserError(f"{where}: {error}") from error
            durations = Durations({name: dataclasses.replace(stream, data=data)}, steps)
            stage = dataclasses.replace(stage, last_step=_log(durations, text, f"{place}.last_step"))
        stages.append(stage)
    return stages
