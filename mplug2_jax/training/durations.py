"""Durations in steps, epochs, examples or percent, and runs built from recipes that use them.

Every field of type ``Steps`` takes a text in place of a number: ``"500 steps"``, ``"3 epochs"``, ``"1.5M examples"``,
``"5%"``. It is converted when the run is built, so that what is stored, compared at a resume and printed are steps:

- **percent** are of ``config.steps``.
- **examples** count the batches of all streams together, or those of a stream that is named: ``"1M examples of text"``.
- **an epoch** is as many examples of a stream as its sources have records together, whatever their weights in the
  mixture; with ``drop_remainder``, which skips the last ones, the whole batches among them. With several streams, one
  is named: ``"2 epochs of image_text"``. Sources are opened to count their records.

What is no whole number of steps is rounded up.
"""

import bisect
import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction

from absl import logging
from ml_collections import ConfigDict

from data_pipelines.config import DataConfig
from data_pipelines.errors import DataError
from mplug2_jax.config import build, load_recipe
from mplug2_jax.errors import UserError, did_you_mean
from mplug2_jax.fields import Steps
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
            UserError: the text is no duration, names no stream or an unknown one, or sources that cannot be opened.
        """
        field, match = f"{where}={text!r}", _DURATION.fullmatch(text)
        if not match or (match["stream"] and match["unit"] == "step"):
            raise UserError(
                f"{field} is no duration: expected 500, '10k steps', '3 epochs', '1.5M examples', '5%', or with a "
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
class _CountedFields:
    """The fields of a run by which durations are counted."""

    steps: Steps
    streams: Mapping[str, StreamConfig]


def load_run(spec: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Return the run of a recipe, with overrides. Raises UserError, as ``load_recipe`` and :func:`build_run`."""
    return build_run(load_recipe(spec, overrides))


def build_run(recipe: ConfigDict) -> RunConfig:
    """Build a run from a recipe, convert its durations to steps, and log each.

    Raises:
        UserError: invalid fields, or durations that cannot be converted.
    """

    @functools.cache
    def durations() -> Durations:
        fields = {field.name: recipe[field.name] for field in dataclasses.fields(_CountedFields)}
        return Durations(build(_CountedFields, fields, to_steps=lambda text, where: 1).streams, fields["steps"])

    def to_steps(text: str, where: str) -> int:
        steps = durations().to_steps(text, where)
        logging.info("%s = %s = %d steps", where, text, steps)
        return steps

    return build(RunConfig, recipe, to_steps=to_steps)
