"""Downstream tasks of DigitWorld for the demo's model: short fine-tuning runs and their evaluations."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from data_pipelines.config import DataConfig, ExampleConfig, InstructionConfig, Kind, SourceConfig
from data_pipelines.digitworld.scene import COLOURS, DIGITS, PLACES, SIZES
from data_pipelines.digitworld.source import IMAGE_LABELS, VIDEO_LABELS
from mplug2_jax.errors import UserError, did_you_mean
from mplug2_jax.evaluation.config import EvaluationConfig
from mplug2_jax.generation.config import SearchConfig
from mplug2_jax.model.config import model_config
from mplug2_jax.tasks.config import TasksConfig
from mplug2_jax.training.config import (
    CheckpointConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    StreamConfig,
    TokenizerConfig,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalSpec:
    """An evaluation, and its metric in the table of ``mplug2 demo tasks``."""

    task: str
    metric: str
    examples: Mapping[str, Any]  # fields of ExampleConfig
    label: str = ""  # of the source
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # fields of EvaluationConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class FineTune:
    """A fine-tuning run."""

    name: str
    kind: Kind
    objective: str
    train_examples: Mapping[str, Any]  # fields of ExampleConfig
    evaluations: Mapping[str, EvalSpec]
    steps: int = 300
    batch_size: int = 48


def _simple_task(name: str, kind: Kind, task: str, metric: str, examples: Mapping[str, Any], **fields: Any) -> FineTune:
    """Return a run that trains on the same kind of examples that it is evaluated on."""
    evaluations = {name: EvalSpec(task=task, metric=metric, examples=examples)}
    return FineTune(name=name, kind=kind, train_examples=examples, evaluations=evaluations, **fields)


def _instruction(name: str, template: str, *, length: int, target_length: int) -> Mapping[str, Any]:
    """Return fields of ExampleConfig for examples with one kind of instruction."""
    instructions = {name: InstructionConfig(templates=(template,))}
    return {"instructions": instructions, "instruction_length": length, "target_length": target_length}


def _class_labels(classes: tuple[str, ...]) -> Mapping[str, Any]:
    return {"instructions": {"label": InstructionConfig(templates=("",))}, "classes": classes}


def _by_prompts(classes: tuple[str, ...], prompts: Iterable[str], *, label: str = "") -> EvalSpec:
    """Return a classification by contrast with caption-like prompts; no training run has these classes as labels."""
    examples = _class_labels(classes)
    return EvalSpec(
        task="zero_shot", metric="top_1", examples=examples, label=label, overrides={"prompts": tuple(prompts)}
    )


_COLOURS_BY_PROMPTS = _by_prompts(tuple(COLOURS), (f"a large {{label}} {digit}" for digit in DIGITS), label="colour")


def _retrieval(kind: Kind, *, batch_size: int) -> FineTune:
    """Return a retrieval run, also evaluated on colors by prompts."""
    examples, name = {"text_length": 24}, f"{kind}_retrieval"
    evaluations = {
        name: EvalSpec(task="vlc", metric="text_to_visual_r1", examples=examples),
        f"{kind}_colour_by_prompts": _COLOURS_BY_PROMPTS,
    }
    return FineTune(
        name=name, kind=kind, objective="vlc", train_examples=examples, evaluations=evaluations, steps=600,
        batch_size=batch_size,
    )  # fmt: skip


_IMAGE_CAPTION = _instruction("caption", "describe the picture", length=12, target_length=24)
_VIDEO_CAPTION = _instruction("caption", "describe the clip", length=12, target_length=24)
_QUESTION = _instruction("question", "{question}", length=12, target_length=8)
_BOX = _instruction("box", "where is {expression}?", length=16, target_length=8)
_ENTAILMENT = _instruction("entailment", "{premise} means {hypothesis}?", length=32, target_length=4)
_SUMMARY = _instruction("question", "{question}", length=56, target_length=24)
_DIGITS, _ACTIONS = _class_labels(IMAGE_LABELS), _class_labels(VIDEO_LABELS)

FINETUNES: Mapping[str, FineTune] = {
    run.name: run
    for run in (
        _simple_task("image_caption", "image", "caption", "cider", _IMAGE_CAPTION, objective="ilm"),
        _simple_task("video_caption", "video", "caption", "cider", _VIDEO_CAPTION, objective="ilm", batch_size=24),
        _simple_task("image_question", "image", "answer", "accuracy", _QUESTION, objective="ilm"),
        _simple_task("video_question", "video", "answer", "accuracy", _QUESTION, objective="ilm", batch_size=24),
        _retrieval("image", batch_size=96),
        _retrieval("video", batch_size=48),
        _simple_task("grounding", "image", "ground", "accuracy_at_0.5", _BOX, objective="answer"),
        _simple_task("digit", "image", "classify", "top_1", _DIGITS, objective="classify", batch_size=96),
        _simple_task("action", "video", "classify", "top_1", _ACTIONS, objective="classify"),
        _simple_task("entailment", "text", "answer", "accuracy", _ENTAILMENT, objective="ilm"),
        _simple_task("summary", "text", "summarize", "rouge_2", _SUMMARY, objective="ilm"),
    )
}


def _data(kind: Kind, examples: Mapping[str, Any], batch_size: int, **source: Any) -> DataConfig:
    return DataConfig(
        sources={"digits": SourceConfig(kind=kind, **source)}, examples=ExampleConfig(**examples), batch_size=batch_size
    )


def _heldout(kind: Kind, spec: EvalSpec) -> EvaluationConfig:
    data = _data(kind, spec.examples, 64, split="heldout", max_records=256, label=spec.label)
    return EvaluationConfig(task=spec.task, per_device_batch_size=32, data=data, **spec.overrides)


def digitworld_recipe(name: str) -> RunConfig:
    """Return the fine-tuning run of a task.

    Raises:
        UserError: an unknown task.
    """
    if name not in FINETUNES:
        raise UserError(f"recipe digitworld:{name}: {did_you_mean(name, FINETUNES)}")
    run = FINETUNES[name]

    train_data = _data(run.kind, run.train_examples, run.batch_size)
    return RunConfig(
        name=name,
        steps=run.steps,
        # As in the demo, so that its weights fit.
        model=model_config(
            "tiny", dtype="float32", attention_dropout=0.0, dropout=0.0, scan_unroll=4,
            num_classes=len(run.train_examples.get("classes", ())),
        ),
        tokenizer=TokenizerConfig(vocab_size=512),
        streams={"digits": StreamConfig(data=train_data, objectives={run.objective: 1.0})},
        tasks=TasksConfig(search=SearchConfig(num_beams=1, max_length=23)),
        optimizer=OptimizerConfig(learning_rate=5e-4, b2=0.98, weight_decay=0.05),
        schedule=ScheduleConfig(warmup_steps=20),
        checkpoint=CheckpointConfig(every_steps=1000, keep_last=1),
        evaluations={key: _heldout(run.kind, spec) for key, spec in run.evaluations.items()},
    )  # fmt: skip


_DIGITS_BY_PROMPTS = EvalSpec(
    task="zero_shot", metric="top_1", examples=_class_labels(DIGITS),
    overrides={
        "prompts": tuple(
            f"a {size} {colour} {{label}} at the {place}" for size in SIZES for colour in COLOURS for place in PLACES
        ),
        "prompt_pooling": "probabilities",  # a picture is like one of them
    },
)  # fmt: skip
# Classes that the model of ``configs/demo.py`` knows from captions alone.
ZERO_SHOT: Mapping[str, tuple[Kind, EvalSpec]] = {
    "image_colour_by_prompts": ("image", _COLOURS_BY_PROMPTS),
    "video_colour_by_prompts": ("video", _COLOURS_BY_PROMPTS),
    "image_digit_by_prompts": ("image", _DIGITS_BY_PROMPTS),
}


def zero_shot_evaluations() -> Mapping[str, EvaluationConfig]:
    """Return the evaluations of ``ZERO_SHOT``."""
    return {name: _heldout(kind, spec) for name, (kind, spec) in ZERO_SHOT.items()}
