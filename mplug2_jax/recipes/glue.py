"""GLUE: one text or two, and a class. Parts: text, universal, classifier."""

from data_pipelines.config import InstructionConfig
from mplug2_jax.recipes.base import TaskData, TaskFamily, file_source, finetune_recipe
from mplug2_jax.tasks.specs import SIMILARITY_LEVELS
from mplug2_jax.training.config import OptimizerConfig, RunConfig

SINGLE = {"label": InstructionConfig(templates=("{text}",))}
SIMILARITY = {"label": InstructionConfig(templates=("{text} | {other}",))}
PAIR = {"entailment": InstructionConfig(templates=("{premise} | {hypothesis}",))}

TASKS = {
    "cola": ("CoLA", SINGLE, ("unacceptable", "acceptable"), 8_551),
    "sst2": ("SST-2", SINGLE, ("negative", "positive"), 67_349),
    "mrpc": ("MRPC", PAIR, ("no", "yes"), 3_668),
    "stsb": ("STS-B", SIMILARITY, SIMILARITY_LEVELS, 5_749),
    "qqp": ("QQP", PAIR, ("no", "yes"), 363_846),
    "mnli": ("MNLI", PAIR, ("yes", "maybe", "no"), 392_702),
    "qnli": ("QNLI", PAIR, ("no", "yes"), 104_743),
    "rte": ("RTE", PAIR, ("no", "yes"), 2_490),
}
"""Folder, instructions, classes and number of training examples of each task."""


def glue_recipe(task: str, size: str) -> RunConfig:
    """Return the run of a GLUE task on the folder ``glue``, as GLUE's download script writes it."""
    folder, instructions, classes, num_train = TASKS[task]
    names = {"matched": "dev_matched", "mismatched": "dev_mismatched"} if task == "mnli" else {"dev": "dev"}
    data = TaskData(
        train=file_source("text", f"glue/{folder}/train.tsv", format="glue"), num_train=num_train,
        eval={key: file_source("text", f"glue/{folder}/{file}.tsv", format="glue") for key, file in names.items()},
    )  # fmt: skip
    family = TaskFamily(
        objectives={"classify": 1.0}, task=task,
        train_examples={"instructions": instructions, "instruction_length": 128, "classes": classes},
        epochs=3 if num_train > 50_000 else 10, batch_size=32,
        optimizer=OptimizerConfig(learning_rate=2e-5, weight_decay=0.01), num_classes=len(classes),
    )  # fmt: skip
    return finetune_recipe(task, size, data, family)
