"""Questions about clips and pictures, answered in words: vision, text, universal, fusion, decoder."""

from ml_collections import ConfigDict

from data_pipelines.config import InstructionConfig
from mplug2_jax.generation.config import SearchConfig
from mplug2_jax.recipes.base import Family, Sets, parse_variant, recipe
from mplug2_jax.recipes.released import released


def answering(name: str, arg: str, sets: Sets, *, task: str = "answer") -> ConfigDict:
    """The release's loss and batch of 32; ``task`` is how answers are scored: to the letter, or as VQA v2 does.

    ``SIZE,released`` is the release's own protocol, which is of clips.

    Raises:
        UserError: an unknown size or form.
    """
    size, form = parse_variant(name, arg, *(["released"] if sets.train.kind == "video" else []))
    if form == "released":
        return released(name, size, "videoqa", sets)
    examples = {
        "instructions": {"question": InstructionConfig(templates=("{question}",))}, "instruction_length": 32,
        "target_length": 16,
    }  # fmt: skip
    family = Family(
        objectives={"answer": 1.0}, task=task, learned=examples, told=examples,
        train_visual={"transform": "train", "flip": False},  # "on the left" stays on the left
        search=SearchConfig(num_beams=5, max_length=15), batch_size=32,
    )  # fmt: skip
    return recipe(name, size, sets, family)
