"""Visual grounding: a phrase to a box, generated as quantized coordinates.

Parts: vision, text, universal, fusion, decoder.
"""

from data_pipelines.config import InstructionConfig
from mplug2_jax.generation.config import SearchConfig
from mplug2_jax.recipes.base import TaskData, TaskFamily, finetune_recipe
from mplug2_jax.training.config import RunConfig


def grounding_recipe(name: str, size: str, data: TaskData) -> RunConfig:
    """Return a grounding run. Training sees whole images, because boxes do not follow crops."""
    family = TaskFamily(
        objectives={"answer": 1.0}, task="ground",
        train_examples={
            "instructions": {"box": InstructionConfig(templates=("where is {expression}?",))},
            "instruction_length": 32, "target_length": 8,
        },
        train_visual={"transform": "resize"}, search=SearchConfig(num_beams=1, max_length=8),
    )  # fmt: skip
    return finetune_recipe(name, size, data, family)
