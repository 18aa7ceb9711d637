"""The smallest run with three streams, all objectives and every part of the model."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_pipelines.config import BatchStage, DataConfig, ExampleConfig, InstructionConfig, SourceConfig, VisualConfig
from mplug2_jax.config import to_dict
from mplug2_jax.evaluation.config import EvaluationConfig
from mplug2_jax.generation.config import SearchConfig
from mplug2_jax.model.config import ModelConfig, model_config
from mplug2_jax.tasks.config import TasksConfig
from mplug2_jax.training.config import (
    CheckpointConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    StreamConfig,
    TokenizerConfig,
)
from mplug2_jax.training.workdir import load_or_train_tokenizer

QUESTION = {"question": InstructionConfig(templates=("{question}",))}
SMALL = VisualConfig(image_size=16, num_frames=2)
ONE_LAYER = [
    "--config.model.vision_layers=1", "--config.model.decoder_layers=1", "--config.model.scan_unroll=1",
    "--config.schedule.kind=constant", "--config.schedule.warmup_steps=0",
]  # fmt: skip
"""Overrides of the tiny size, for tests whose subject is a command and not the model: a third of the compile time, and
the same program for every number of steps."""
ENTAILMENT = {"entailment": InstructionConfig(templates=("{premise} means {hypothesis}?",))}


def small_model(**overrides: Any) -> ModelConfig:
    """Return one layer of each kind, 32 wide; without attention dropout, a sixth of a step's compile time."""
    sizes = {
        "vision_width": 32, "vision_layers": 1, "vision_heads": 2, "image_size": 16, "width": 32, "heads": 2,
        "mlp_width": 64, "fusion_layers": 1, "decoder_layers": 1, "num_latents": 4, "vocab_size": 256,
        "contrastive_width": 16, "attention_dropout": 0.0, "dtype": "float32",
    }  # fmt: skip
    return model_config("tiny", **(sizes | overrides))


def stream(kind: str, batch_size: int, examples: ExampleConfig, **objectives: float) -> StreamConfig:
    """Return a stream of DigitWorld at 16 pixels and 2 frames."""
    sources = {"digits": SourceConfig(kind=kind, max_records=1000)}
    data = DataConfig(sources=sources, visual=SMALL, examples=examples, batch_size=batch_size)
    return StreamConfig(data=data, objectives=objectives)


def small_run(**overrides: Any) -> RunConfig:
    """Return a run on images and video clips with VLC, VLM and ILM, and on text with MLM and ILM."""
    pairs = ExampleConfig(text_length=12, instructions=QUESTION, instruction_length=12, target_length=6)
    sentences = ExampleConfig(
        text="sentence", text_length=12, instructions=ENTAILMENT, instruction_length=16, target_length=4
    )
    heldout = DataConfig(
        sources={"digits": SourceConfig(kind="image", split="heldout", max_records=10)},
        visual=SMALL,
        examples=ExampleConfig(instructions=QUESTION, instruction_length=12, target_length=6),
        batch_size=8,
    )
    fields: dict[str, Any] = {
        "name": "small",
        "steps": 4,
        "model": small_model(),
        "tokenizer": TokenizerConfig(vocab_size=200),
        "streams": {
            "image_text": stream("image", 8, pairs, vlc=1.0, vlm=1.0, ilm=1.0),
            "video_text": stream("video", 8, pairs, vlc=1.0, vlm=1.0, ilm=1.0),
            "text": stream("text", 8, sentences, mlm=1.0, ilm=0.5),
        },
        "tasks": TasksConfig(search=SearchConfig(num_beams=1, max_length=5)),
        "optimizer": OptimizerConfig(learning_rate=1e-3),
        # Constant, as other numbers of steps would be other programs.
        "schedule": ScheduleConfig(kind="constant", warmup_steps=1),
        "evaluations": {"questions": EvaluationConfig(task="answer", data=heldout, num_samples=2)},
        "checkpoint": CheckpointConfig(every_steps=2, keep_last=2),
        "log_every": 1,
        "watchdog_timeout": 0,
    }
    return RunConfig(**(fields | overrides))


def text_run(
    objectives: Mapping[str, float] | None = None, batch_size: int = 8, batch_ramp: tuple[BatchStage, ...] = (),
    **overrides: Any,
) -> RunConfig:  # fmt: skip
    """Return a run on text alone, with MLM unless other objectives are given, and without evaluations."""
    text = small_run().streams["text"]
    data = dataclasses.replace(text.data, batch_size=batch_size, batch_ramp=batch_ramp)
    text = dataclasses.replace(text, data=data, objectives=objectives or {"mlm": 1.0})
    return small_run(**({"streams": {"text": text}, "evaluations": {}} | overrides))


def recipe_file(run: RunConfig, path: Path) -> Path:
    """Write the run as a recipe for commands, and its tokenizer, or every process would train the same one."""
    if not run.tokenizer.path:
        tokenizer_path = load_or_train_tokenizer(run.tokenizer).save(path.with_suffix(".tokenizer"))
        run = dataclasses.replace(run, tokenizer=dataclasses.replace(run.tokenizer, path=str(tokenizer_path)))
    values = json.dumps(to_dict(run))
    path.write_text(
        "import json\nfrom ml_collections import ConfigDict\n\n\n"
        "def tuples(x):\n"
        "    if isinstance(x, dict):\n        return {k: tuples(v) for k, v in x.items()}\n"
        "    return tuple(map(tuples, x)) if isinstance(x, list) else x\n\n\n"
        f"def get_config():\n    return ConfigDict(tuples(json.loads({values!r})), type_safe=False)\n"
    )
    return path
