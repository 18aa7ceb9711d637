"""GLUE by a head: text, universal, classifier. One text or two, and a class."""

from ml_collections import ConfigDict

from data_pipelines.config import InstructionConfig
from mplug2_jax.recipes.base import Family, Sets, files, recipe
from mplug2_jax.tasks.contracts import SIMILARITY_LEVELS
from mplug2_jax.training.config import AdamWConfig

ONE = {"label": InstructionConfig(templates=("{text}",))}
ALIKE = {"label": InstructionConfig(templates=("{text} | {other}",))}
PAIR = {"entailment": InstructionConfig(templates=("{premise} | {hypothesis}",))}

TASKS = {
    "cola": ("CoLA", ONE, ("unacceptable", "acceptable"), 8_551),
    "sst2": ("SST-2", ONE, ("negative", "positive"), 67_349),
    "mrpc": ("MRPC", PAIR, ("no", "yes"), 3_668),
    "stsb": ("STS-B", ALIKE, SIMILARITY_LEVELS, 5_749),
    "qqp": ("QQP", PAIR, ("no", "yes"), 363_846),
    "mnli": ("MNLI", PAIR, ("yes", "maybe", "no"), 392_702),
    "qnli": ("QNLI", PAIR, ("no", "yes"), 104_743),
    "rte": ("RTE", PAIR, ("no", "yes"), 2_490),
}
"""Folder, form, classes and number of training examples of each task."""


def understanding(task: str, size: str) -> ConfigDict:
    """A task of GLUE from the folder ``glue`` of the data, as its download script leaves it."""
    folder, instructions, classes, count = TASKS[task]
    names = {"matched": "dev_matched", "mismatched": "dev_mismatched"} if task == "mnli" else {"dev": "dev"}
    sets = Sets(
        train=files("text", f"glue/{folder}/train.tsv", format="glue"), examples=count,
        asked={key: files("text", f"glue/{folder}/{file}.tsv", format="glue") for key, file in names.items()},
    )  # fmt: skip
    examples = {"instructions": instructions, "instruction_length": 128, "classes": classes}
    family = Family(
        objectives={"classify": 1.0}, task=task, learned=examples, told=examples, epochs=3 if count > 50_000 else 10,
        batch_size=32, optimizer=AdamWConfig(learning_rate=2e-5, weight_decay=0.01), num_classes=len(classes),
    )  # fmt: skip
    return recipe(task, size, sets, family)
