"""Phrases to boxes, said as the cells of their corners: vision, text, universal, fusion, decoder."""

from ml_collections import ConfigDict

from data_pipelines.config import InstructionConfig
from mplug2_jax.generation.config import SearchConfig
from mplug2_jax.recipes.base import Family, Sets, recipe


def grounding(name: str, size: str, sets: Sets) -> ConfigDict:
    """All of a picture is seen, for boxes do not follow what is cropped."""
    examples = {
        "instructions": {"box": InstructionConfig(templates=("where is {expression}?",))}, "instruction_length": 32,
        "target_length": 8,
    }  # fmt: skip
    family = Family(
        objectives={"answer": 1.0}, task="ground", learned=examples, told=examples,
        train_visual={"transform": "resize"}, search=SearchConfig(num_beams=1, max_length=8),
    )  # fmt: skip
    return recipe(name, size, sets, family)
