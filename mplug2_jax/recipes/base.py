"""What the recipes of all families share: where data is, and a run from a data set's page."""

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ml_collections import ConfigDict

from data_pipelines.config import DataConfig, ExampleConfig, Format, Kind, SourceConfig, VisualConfig
from mplug2_jax.config import as_recipe
from mplug2_jax.errors import UserError, did_you_mean
from mplug2_jax.evaluation.config import EvaluationConfig
from mplug2_jax.generation.config import SearchConfig
from mplug2_jax.model.config import SIZES, RematConfig, model_config
from mplug2_jax.tasks.config import TaskSettings
from mplug2_jax.training.config import AdamWConfig, RunConfig, ScheduleConfig, StreamConfig, TokenizerConfig

FRAMES = 16  # of a clip
TRIAL_STEPS = 20  # of the size "tiny", which is for trying a recipe out


def data_folder() -> Path:
    """Where all data sets are, each in a folder of its own: $MPLUG2_DATA, or ``data`` where the command is run."""
    return Path(os.environ.get("MPLUG2_DATA", "data"))


def files(
    kind: Kind,
    path: str,
    media: str = "",
    *,
    format: Format = "annotations",
    split: str = "",
    expand: Literal["record", "text"] = "record",
) -> SourceConfig:
    """A source of records whose files are below the data folder."""
    root = data_folder()
    return SourceConfig(
        format=format, kind=kind, path=str(root / path), media=str(root / media) if media else "", split=split,
        expand=expand,
    )  # fmt: skip


class Classes(NamedTuple):
    """What a set's records call their classes, and what people call them."""

    labels: tuple[str, ...]
    names: tuple[str, ...]


def read_classes(path: str, count: int) -> Classes:
    """All classes of a set, from a JSON file below the data folder.

    That is a list of labels, an object of labels and numbers as SSv2's, or one of labels and names as ImageNet needs,
    ``{"n01440764": "tench", ...}``. Where there is no file they are placeholders, which no record is of: so a recipe
    can be looked at without its data.

    Raises:
        UserError: a file with something else in it, or another number of classes.
    """
    file = data_folder() / path
    if not file.is_file():
        return Classes(*[tuple(f"class {i} of {path}" for i in range(count))] * 2)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        told = isinstance(content, dict)
        named = told and any(not str(value).isdecimal() for value in content.values())
        labels = sorted(content, key=lambda label: int(content[label])) if told and not named else list(content)
        found = Classes(
            tuple(_plain(label) for label in labels),
            tuple(_plain(content[label] if named else label) for label in labels),
        )
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{file} should be a JSON list of the names of {count} classes ({error})") from error
    if len(found.labels) != count:
        raise UserError(f"{file} names {len(found.labels)} classes, expected {count}")
    return found


def _plain(text: str) -> str:
    """Without SSv2's brackets around things."""
    return re.sub(r"[\[\]]", "", text)


def check_size(size: str, spec: str) -> None:
    """Checks that there is a size of the model. Raises UserError, which quotes what was asked for, where not."""
    if size not in SIZES:
        raise UserError(f"recipe {spec}: {did_you_mean(size, SIZES)}")


def parse_variant(name: str, arg: str, *forms: str) -> tuple[str, str]:
    """The size and the form that a page is asked for, as ``large`` or ``large,zero_shot``.

    Raises:
        UserError: an unknown size or form.
    """
    size, comma, form = arg.partition(",")
    check_size(size, f"{name}:{size}")
    if comma and form not in forms:
        remedy = did_you_mean(form, forms) if forms else f"this page has no forms; leave out ',{form}'"
        raise UserError(f"recipe {name}:{arg}: {remedy}")
    return size, form


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sets:
    """The data of a task: what it learns from, how many examples these are, and what it is asked, by name."""

    train: SourceConfig
    examples: int
    asked: Mapping[str, SourceConfig]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """How the data sets of a family are learned and asked. Lengths are cut to what a model has room for."""

    objectives: Mapping[str, float]
    task: str  # of the evaluations
    learned: Mapping[str, Any]  # fields of ExampleConfig, in training
    told: Mapping[str, Any]  # and in evaluations
    asked: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # further fields of EvaluationConfig
    train_visual: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"transform": "train"})
    test_visual: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"transform": "resize"})
    search: SearchConfig = SearchConfig(num_beams=5, max_length=31)
    epochs: int = 10
    batch_size: int = 64
    optimizer: AdamWConfig = AdamWConfig(learning_rate=2e-5, vision_learning_rate=2e-6, weight_decay=0.02)
    label_smoothing: float = 0.0
    num_classes: int = 0


def recipe(name: str, size: str, sets: Sets, family: Family, **overrides: Any) -> ConfigDict:
    """A data set's run.

    Args:
        name: of the page.
        size: of the model: a row of its table. "tiny" is to try the recipe out: few steps, few frames.
        sets: the data.
        family: what is done with it.
        overrides: fields of RunConfig that the page sets itself.

    Raises:
        UserError: an unknown size.
    """
    check_size(size, f"{name}:{size}")
    trial = size == "tiny"
    model = model_config(
        size, dropout=0.0, attention_dropout=0.0, num_classes=family.num_classes,
        remat=RematConfig(vision="dots", text="dots", fusion="dots", decoder="dots"),
    )  # fmt: skip
    frames, batch_size = 4 if trial else FRAMES, 8 if trial else family.batch_size

    def data(source: SourceConfig, fields: Mapping[str, Any], visual: Mapping[str, Any], rows: int) -> DataConfig:
        lengths = {key: min(value, model.max_positions) for key, value in fields.items() if key.endswith("_length")}
        seen = VisualConfig(image_size=model.image_size, num_frames=frames, **visual)
        examples = ExampleConfig(**{**fields, **lengths})
        return DataConfig(sources={"set": source}, visual=seen, examples=examples, batch_size=rows)

    sampled = {"sampling": "random", **family.train_visual}
    # Without a backward pass there is room for more at a time.
    asked = batch_size if trial else 4 * batch_size
    search = dataclasses.replace(family.search, max_length=min(family.search.max_length, model.max_positions - 1))
    steps = TRIAL_STEPS if trial else max(1, round(family.epochs * sets.examples / batch_size))
    fields: dict[str, Any] = {
        "name": name,
        "steps": steps,
        "model": model,
        "tokenizer": TokenizerConfig(vocab_size=min(model.vocab_size, 512)),
        "streams": {
            "set": StreamConfig(
                data=data(sets.train, family.learned, sampled, batch_size), objectives=family.objectives
            )
        },
        "tasks": TaskSettings(search=search, label_smoothing=family.label_smoothing),
        "optimizer": family.optimizer,
        "schedule": ScheduleConfig(warmup_steps=max(1, steps // 20)),
        "evaluations": {
            key: EvaluationConfig(
                task=family.task, data=data(source, family.told, family.test_visual, asked), **family.asked
            )
            for key, source in sets.asked.items()
        },
        "eval_every": 0 if trial else max(1, steps // family.epochs),
    }
    return as_recipe(RunConfig(**(fields | overrides)))
