"""Tasks of DigitWorld for what the demo has pretrained: each learns a little, or is asked without learning."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from data_pipelines.config import DataConfig, ExampleConfig, InstructionConfig, Kind, SourceConfig
from data_pipelines.digitworld.scene import COLOURS, DIGITS
from data_pipelines.digitworld.source import IMAGE_LABELS, VIDEO_LABELS
from mplug2_jax.config import as_recipe
from mplug2_jax.errors import UserError, did_you_mean
from mplug2_jax.evaluation.config import EvaluationConfig
from mplug2_jax.generation.config import SearchConfig
from mplug2_jax.model.config import model_config
from mplug2_jax.tasks.config import TaskSettings
from mplug2_jax.training.config import (
    AdamWConfig,
    CheckpointConfig,
    RunConfig,
    ScheduleConfig,
    StreamConfig,
    TokenizerConfig,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """An evaluation of a run, and the figure that the board shows of it."""

    task: str
    figure: str
    examples: Mapping[str, Any]  # fields of ExampleConfig
    label: str = ""  # of the records
    more: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # fields of EvaluationConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """What a run learns, and what it is asked."""

    name: str
    kind: Kind
    objective: str
    learned: Mapping[str, Any]  # fields of ExampleConfig
    asked: Mapping[str, Asked]
    steps: int = 300
    batch_size: int = 48


def _as_asked(name: str, kind: Kind, task: str, figure: str, examples: Mapping[str, Any], **fields: Any) -> Trial:
    """A run that learns what it is asked."""
    asked = {name: Asked(task=task, figure=figure, examples=examples)}
    return Trial(name=name, kind=kind, learned=examples, asked=asked, **fields)


def _told(instruction: str, template: str, *, length: int, answer: int) -> Mapping[str, Any]:
    """Fields of examples with one kind of instruction, its length and the answer's."""
    instructions = {instruction: InstructionConfig(templates=(template,))}
    return {"instructions": instructions, "instruction_length": length, "target_length": answer}


def _labelled(classes: tuple[str, ...]) -> Mapping[str, Any]:
    return {"instructions": {"label": InstructionConfig(templates=("",))}, "classes": classes}


def _contrast(kind: Kind, *, batch_size: int) -> Trial:
    """Retrieval; and colours, which are never told as classes, by prompts that are worded as captions are."""
    texts, name = {"text_length": 24}, f"{kind}_retrieval"
    prompts = tuple(f"a large {{label}} {digit}" for digit in DIGITS)
    asked = {
        name: Asked(task="vlc", figure="text_to_visual_r1", examples=texts),
        f"{kind}_colour_by_prompts": Asked(
            task="zero_shot", figure="top_1", examples=_labelled(tuple(COLOURS)), label="colour",
            more={"prompts": prompts},
        ),
    }  # fmt: skip
    return Trial(
        name=name, kind=kind, objective="vlc", learned=texts, asked=asked, steps=600, batch_size=batch_size
    )  # fmt: skip


_PICTURE, _CLIP = (_told("caption", f"describe the {what}", length=12, answer=24) for what in ("picture", "clip"))
_QUESTION = _told("question", "{question}", length=12, answer=8)
_BOX = _told("box", "where is {expression}?", length=16, answer=8)
_FOLLOWS = _told("entailment", "{premise} means {hypothesis}?", length=32, answer=4)
_REPORT = _told("question", "{question}", length=56, answer=24)
_DIGITS, _ACTIONS = _labelled(IMAGE_LABELS), _labelled(VIDEO_LABELS)

FINETUNES: Mapping[str, Trial] = {
    trial.name: trial
    for trial in (
        _as_asked("image_caption", "image", "caption", "cider", _PICTURE, objective="ilm"),
        _as_asked("video_caption", "video", "caption", "cider", _CLIP, objective="ilm", batch_size=24),
        _as_asked("image_question", "image", "answer", "accuracy", _QUESTION, objective="ilm"),
        _as_asked("video_question", "video", "answer", "accuracy", _QUESTION, objective="ilm", batch_size=24),
        _contrast("image", batch_size=96),
        _contrast("video", batch_size=48),
        _as_asked("grounding", "image", "ground", "accuracy_at_0.5", _BOX, objective="answer"),
        _as_asked("digit", "image", "classify", "top_1", _DIGITS, objective="classify", batch_size=96),
        _as_asked("action", "video", "classify", "top_1", _ACTIONS, objective="classify"),
        _as_asked("entailment", "text", "answer", "accuracy", _FOLLOWS, objective="ilm"),
        _as_asked("summary", "text", "summarize", "rouge_2", _REPORT, objective="ilm"),
    )
}


def digitworld(name: str) -> ConfigDict:
    """A task's run.

    Raises:
        UserError: an unknown task.
    """
    if name not in FINETUNES:
        raise UserError(f"recipe digitworld:{name}: {did_you_mean(name, FINETUNES)}")
    trial = FINETUNES[name]

    def data(examples: Mapping[str, Any], batch_size: int, **source: Any) -> DataConfig:
        return DataConfig(
            sources={"digits": SourceConfig(kind=trial.kind, **source)},
            examples=ExampleConfig(**examples), batch_size=batch_size,
        )  # fmt: skip

    seen = data(trial.learned, trial.batch_size)
    return as_recipe(
        RunConfig(
            name=name,
            steps=trial.steps,
            # The demo's, so that its weights fit.
            model=model_config(
                "tiny", dtype="float32", attention_dropout=0.0, dropout=0.0, scan_unroll=4,
                num_classes=len(trial.learned.get("classes", ())),
            ),
            tokenizer=TokenizerConfig(vocab_size=512),
            streams={"digits": StreamConfig(data=seen, objectives={trial.objective: 1.0})},
            tasks=TaskSettings(search=SearchConfig(num_beams=1, max_length=23)),
            optimizer=AdamWConfig(learning_rate=5e-4, b2=0.98, weight_decay=0.05),
            schedule=ScheduleConfig(warmup_steps=20),
            checkpoint=CheckpointConfig(every_steps=1000, keep_last=1),
            evaluations={
                key: EvaluationConfig(
                    task=asked.task, per_device_batch_size=32, **asked.more,
                    data=data(asked.examples, 64, split="heldout", size=256, label=asked.label),
                )
                for key, asked in trial.asked.items()
            },
        )
    )  # fmt: skip
