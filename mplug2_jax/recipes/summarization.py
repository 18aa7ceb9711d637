"""Summarization. Parts: text, universal, decoder."""

from data_pipelines.config import InstructionConfig
from mplug2_jax.generation.config import SearchConfig
from mplug2_jax.recipes.base import TaskData, TaskFamily, finetune_recipe
from mplug2_jax.training.config import RunConfig


def summarization_recipe(name: str, size: str, data: TaskData, *, epochs: int = 3) -> RunConfig:
    """Return a summarization run: cross entropy of the summary, and beam search."""
    family = TaskFamily(
        objectives={"ilm": 1.0}, task="summarize",
        train_examples={
            "instructions": {"question": InstructionConfig(templates=("{question}",))}, "instruction_length": 128,
            "target_length": 32,
        },
        epochs=epochs, batch_size=128, search=SearchConfig(num_beams=5, max_length=31), label_smoothing=0.1,
    )  # fmt: skip
    return finetune_recipe(name, size, data, family)
