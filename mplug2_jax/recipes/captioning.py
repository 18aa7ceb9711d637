"""Captions of clips and pictures: vision, universal, decoder."""

import dataclasses

from ml_collections import ConfigDict

from data_pipelines.config import InstructionConfig
from mplug2_jax.generation.config import SearchConfig
from mplug2_jax.recipes.base import Family, Sets, parse_variant, recipe
from mplug2_jax.recipes.released import released
from mplug2_jax.training.config import AdamWConfig


def captioning(name: str, arg: str, sets: Sets, *, epochs: int = 10, texts: int = 0) -> ConfigDict:
    """Cross entropy of one of the captions, drawn anew in every epoch; beam search of five.

    ``SIZE,scst`` goes on from there by reward, with a tenth of the rate in a quarter of the epochs: start it with
    ``--config.init_from`` of a run that has learned by cross entropy. ``SIZE,zero_shot`` asks a pretrained model, which
    has learned captions by instruction. ``SIZE,released`` is the release's own protocol, where the page says how many
    ``texts`` there are to learn from: each is an example.

    Raises:
        UserError: an unknown size or form.
    """
    size, form = parse_variant(name, arg, "scst", "zero_shot", *(["released"] if texts else []))
    if form == "released":
        each = dataclasses.replace(sets, train=dataclasses.replace(sets.train, expand="text"), examples=texts)
        return released(name, size, "caption", each)
    examples = {"instructions": {"caption": InstructionConfig(templates=("",))}, "target_length": 32}
    family = Family(
        objectives={"caption": 1.0}, task="caption", learned=examples, told=examples, epochs=epochs,
        train_visual={"transform": "train", "flip": False},
        search=SearchConfig(num_beams=5, min_length=4, max_length=31), label_smoothing=0.1,
        asked={"java_metrics": size != "tiny"},
    )  # fmt: skip
    if form == "zero_shot":
        told = {"caption": InstructionConfig(templates=("describe it",))}  # as pretraining has it
        family = dataclasses.replace(family, told={**examples, "instructions": told, "instruction_length": 32})
    if form == "scst":
        family = dataclasses.replace(
            family, objectives={"scst": 1.0}, learned={**examples, "max_references": 20}, epochs=max(1, epochs // 4),
            optimizer=AdamWConfig(learning_rate=2e-6, vision_learning_rate=2e-7, weight_decay=0.02),
        )  # fmt: skip
    return recipe(name, size, sets, family)
