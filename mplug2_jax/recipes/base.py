"""Shared parts of all recipe families: data files, class names, and the run of a task family on a data set."""

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from data_pipelines.config import DataConfig, ExampleConfig, Format, Kind, SourceConfig, VisualConfig
from data_pipelines.storage.paths import to_path
from mplug2_jax.errors import UserError, did_you_mean
from mplug2_jax.evaluation.config import EvaluationConfig
from mplug2_jax.generation.config import SearchConfig
from mplug2_jax.model.config import SIZES, RematConfig, model_config
from mplug2_jax.tasks.config import TasksConfig
from mplug2_jax.training.config import OptimizerConfig, RunConfig, ScheduleConfig, StreamConfig, TokenizerConfig

NUM_FRAMES = 16  # per video
TINY_STEPS = 20  # of the size "tiny", which only tries a recipe out


def data_folder() -> Path:
    """Return the folder of all data sets, one subfolder each: $MPLUG2_DATA (or a URL), or ``data`` in this folder."""
    return to_path(os.environ.get("MPLUG2_DATA", "data"))


def file_source(
    kind: Kind,
    path: str,
    media: str = "",
    *,
    format: Format = "annotations",
    split: str = "",
    expand: Literal["record", "text"] = "record",
) -> SourceConfig:
    """Return a source whose ``path`` and ``media`` are relative to the data folder."""
    root = data_folder()
    return SourceConfig(
        format=format, kind=kind, path=str(root / path), media=str(root / media) if media else "", split=split,
        expand=expand,
    )  # fmt: skip


class ClassNames(NamedTuple):
    """The labels of a data set's records, and the names that people use for them."""

    labels: tuple[str, ...]
    names: tuple[str, ...]


def read_class_names(path: str, count: int) -> ClassNames:
    """Read the classes of a data set from a file below the data folder.

    A JSON file holds a list of labels, an object of labels and numbers as SSv2 has it, or an object of labels and names
    as ImageNet needs it, ``{"n01440764": "tench", ...}``; a ``.txt`` file, as TFDS writes, a label per line, whose name
    has spaces for underscores. Without the file, returns placeholders that match no record, so that a recipe can be
    inspected without its data.

    Raises:
        UserError: the file has other content, or another number of classes.
    """
    file = data_folder() / path
    if not file.is_file():
        return ClassNames(*[tuple(f"class {i} of {path}" for i in range(count))] * 2)
    try:
        text, is_list = file.read_text(encoding="utf-8"), path.endswith(".txt")
        content = {line: _split_words(line) for line in text.splitlines()} if is_list else json.loads(text)
        has_values = isinstance(content, dict)
        has_names = is_list or (has_values and any(not str(value).isdecimal() for value in content.values()))
        has_numbers = has_values and not has_names
        labels = sorted(content, key=lambda label: int(content[label])) if has_numbers else list(content)
        classes = ClassNames(
            tuple(_strip_brackets(label) for label in labels),
            tuple(_strip_brackets(content[label] if has_names else label) for label in labels),
        )
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{file}: expected a list of {count} class names ({error})") from error
    if len(classes.labels) != count:
        raise UserError(f"{file} has {len(classes.labels)} classes, expected {count}")
    return classes


def _split_words(label: str) -> str:
    """Return a label of TFDS, as "apple_pie" or "ApplyEyeMakeup", in words."""
    words = label.replace("_", " ")
    return words if words != label or not label[1:2].islower() else re.sub(r"(?<=[a-z])(?=[A-Z])", " ", label).lower()


def _strip_brackets(text: str) -> str:
    """Remove the brackets around SSv2's placeholders."""
    return re.sub(r"[\[\]]", "", text)


def check_size(size: str, spec: str) -> None:
    """Check that a model size exists.

    Raises:
        UserError: it does not; the message names the recipe, ``spec``.
    """
    if size not in SIZES:
        raise UserError(f"recipe {spec}: {did_you_mean(size, SIZES)}")


def parse_variant(name: str, arg: str, *variants: str) -> tuple[str, str]:
    """Split a recipe's argument, ``large`` or ``large,zero_shot``, into a model size and a variant, empty if absent.

    Raises:
        UserError: an unknown size or variant.
    """
    size, comma, variant = arg.partition(",")
    check_size(size, f"{name}:{size}")
    if comma and variant not in variants:
        remedy = did_you_mean(variant, variants) if variants else f"it has no variants; remove ',{variant}'"
        raise UserError(f"recipe {name}:{arg}: {remedy}")
    return size, variant


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskData:
    """The data of a task: its training source with the number of examples, and its evaluation sources by name."""

    train: SourceConfig
    num_train: int
    eval: Mapping[str, SourceConfig]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskFamily:
    """Training and evaluation of a family of data sets. Lengths are limited by the model's positions."""

    objectives: Mapping[str, float]
    task: str  # of the evaluations
    train_examples: Mapping[str, Any]  # fields of ExampleConfig
    eval_examples: Mapping[str, Any] | None = None  # None: those of training
    eval_overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # fields of EvaluationConfig
    train_visual: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"transform": "train"})
    eval_visual: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"transform": "resize"})
    search: SearchConfig = SearchConfig(num_beams=5, max_length=31)
    epochs: int = 10
    batch_size: int = 64
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=2e-5, vision_learning_rate=2e-6, weight_decay=0.02)
    label_smoothing: float = 0.0
    num_classes: int = 0


def finetune_recipe(name: str, size: str, data: TaskData, family: TaskFamily) -> RunConfig:
    """Return the fine-tuning run of a task family on a data set.

    Args:
        name: of the recipe.
        size: of the model. "tiny" only tries the recipe out: few steps, few frames.
        data: the data set.
        family: how it is trained and evaluated.

    Raises:
        UserError: an unknown size.
    """
    check_size(size, f"{name}:{size}")
    tiny = size == "tiny"
    model = model_config(
        size, dropout=0.0, attention_dropout=0.0, num_classes=family.num_classes,
        remat=RematConfig(vision="dots", text="dots", fusion="dots", decoder="dots"),
    )  # fmt: skip
    num_frames, batch_size = 4 if tiny else NUM_FRAMES, 8 if tiny else family.batch_size
    eval_batch_size = batch_size if tiny else 4 * batch_size  # without a backward pass there is memory for more
    steps = TINY_STEPS if tiny else max(1, round(family.epochs * data.num_train / batch_size))

    def data_config(
        source: SourceConfig, examples: Mapping[str, Any], visual: Mapping[str, Any], batch_size: int
    ) -> DataConfig:
        lengths = {key: min(value, model.max_positions) for key, value in examples.items() if key.endswith("_length")}
        return DataConfig(
            sources={"set": source},
            visual=VisualConfig(image_size=model.image_size, num_frames=num_frames, **visual),
            examples=ExampleConfig(**{**examples, **lengths}),
            batch_size=batch_size,
        )

    train_data = data_config(
        data.train, family.train_examples, {"sampling": "random", **family.train_visual}, batch_size
    )
    eval_examples = family.train_examples if family.eval_examples is None else family.eval_examples
    search = dataclasses.replace(family.search, max_length=min(family.search.max_length, model.max_positions - 1))
    return RunConfig(
        name=name, steps=steps, model=model, tokenizer=TokenizerConfig(vocab_size=min(model.vocab_size, 512)),
        streams={"set": StreamConfig(data=train_data, objectives=family.objectives)},
        tasks=TasksConfig(search=search, label_smoothing=family.label_smoothing),
        optimizer=family.optimizer, schedule=ScheduleConfig(warmup_steps=max(1, steps // 20)),
        evaluations={
            key: EvaluationConfig(
                task=family.task, data=data_config(source, eval_examples, family.eval_visual, eval_batch_size),
                **family.eval_overrides,
            )
            for key, source in data.eval.items()
        },
        eval_every=0 if tiny else max(1, steps // family.epochs),
    )  # fmt: skip
