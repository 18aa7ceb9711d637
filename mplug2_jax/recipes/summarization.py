"""Texts to shorter texts: text, universal, decoder."""

from ml_collections import ConfigDict

from data_pipelines.config import InstructionConfig
from mplug2_jax.generation.config import SearchConfig
from mplug2_jax.recipes.base import Family, Sets, recipe


def summarising(name: str, size: str, sets: Sets, *, epochs: int = 3) -> ConfigDict:
    """Cross entropy of the summary; beam search of five."""
    examples = {
        "instructions": {"question": InstructionConfig(templates=("{question}",))}, "instruction_length": 128,
        "target_length": 32,
    }  # fmt: skip
    family = Family(
        objectives={"ilm": 1.0}, task="summarize", learned=examples, told=examples, epochs=epochs, batch_size=128,
        search=SearchConfig(num_beams=5, max_length=31), label_smoothing=0.1,
    )  # fmt: skip
    return recipe(name, size, sets, family)
