"""Captions of clips and pictures: vision, universal, decoder."""

from ml_collections import ConfigDict

from data_pipelines.examples import InstructionConfig
from mplug2_jax.generation.beam import SearchConfig
from mplug2_jax.recipes.base import Family, Sets, recipe


def captioning(name: str, size: str, sets: Sets, *, epochs: int = 10) -> ConfigDict:
    """Cross entropy of one of the captions, drawn anew in every epoch; beam search of five."""
    examples = {"instructions": {"caption": InstructionConfig(templates=("",))}, "target_length": 32}
    family = Family(
        objectives={"caption": 1.0}, task="caption", learned=examples, told=examples, epochs=epochs,
        train_visual={"transform": "train", "flip": False}, search=SearchConfig(beams=5, min_length=4, max_length=31),
        label_smoothing=0.1,
    )  # fmt: skip
    return recipe(name, size, sets, family)
