"""The config of an evaluation on held-out data."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from data_pipelines.config import DataConfig
from mplug2_jax.errors import UserError
from mplug2_jax.tasks.config import PromptPooling


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """A task on held-out data.

    ``num_samples`` examples are kept to look at, and a few of the best and worst.

    ``answers_file`` holds a JSON list of all valid answers to questions: a search is constrained to them. With
    ``num_ranked`` K, the K answers whose first token is likeliest are scored in full, and the likeliest one wins; the
    decoder's batch is then K times as large. The release ranks 128.

    ``prompts`` are texts that represent a class, with ``{label}`` in place of its name; ``class_names`` are the names
    of ``data.examples.classes`` in them, in order, or empty to use the classes as they are.

    ``java_metrics`` adds METEOR and SPICE to the scores of captions. Their programs take seconds to start, and without
    Java these metrics are reported as absent.

    ``per_device_batch_size`` examples are predicted at a time on each device; ``data.batch_size`` are read, rounded up
    to a multiple of the examples that all devices predict at a time. The former may change the last digits of a
    prediction, the latter changes nothing.
    """

    OLD_NAMES: ClassVar[Mapping[str, str]] = {
        "answers": "answers_file", "ranked": "num_ranked", "java": "java_metrics",
        "device_rows": "per_device_batch_size", "samples": "num_samples",
    }  # fmt: skip
    OLD_VALUES: ClassVar[Mapping[str, Mapping[str, str]]] = {"task": {"summarise": "summarize"}}

    task: str  # name of a task: mplug2 tasks
    data: DataConfig
    num_samples: int = 6  # examples kept to look at
    answers_file: str = ""  # JSON file of all valid answers; empty: any answer is valid
    num_ranked: int = 0  # answers of the file that are scored in full; 0: search
    prompts: tuple[str, ...] = ()  # texts that represent a class, with {label}; empty: none
    class_names: tuple[str, ...] = ()  # names of the classes in the prompts; empty: the classes themselves
    prompt_pooling: PromptPooling = "features"  # averaged over a class's wordings, or "probabilities" added over cases
    java_metrics: bool = False  # also compute METEOR and SPICE
    per_device_batch_size: int = 8  # examples predicted at a time on each device

    def __post_init__(self) -> None:
        """Check that no colors are augmented on the device: that is for training only.

        Raises:
            UserError: ``data.visual.color_on_device`` is set.
        """
        if self.data.visual.color_on_device:
            raise UserError(
                "color augmentation on the device is for training only: set data.visual.color_on_device to False"
            )
