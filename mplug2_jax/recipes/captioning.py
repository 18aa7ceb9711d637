"""Captioning of images and videos. Parts: vision, universal, decoder."""

import dataclasses

from data_pipelines.config import InstructionConfig
from mplug2_jax.generation.config import SearchConfig
from mplug2_jax.recipes.base import TaskData, TaskFamily, finetune_recipe, parse_variant
from mplug2_jax.recipes.released import released_recipe
from mplug2_jax.training.config import OptimizerConfig, RunConfig


def caption_recipe(name: str, arg: str, data: TaskData, *, epochs: int = 10, num_captions: int = 0) -> RunConfig:
    """Return a captioning run: cross entropy of one caption per record, drawn again in each epoch, and beam search.

    Args:
        name: of the recipe.
        arg: ``SIZE``, or one of the variants. ``SIZE,scst`` continues by reward with a tenth of the learning rate and a
            quarter of the epochs; start it by ``--config.init_from`` a run of cross entropy. ``SIZE,zero_shot``
            evaluates a pretrained model by its captioning instruction. ``SIZE,released`` is the release's protocol.
        data: the data set.
        epochs: of training.
        num_captions: number of training captions, each of which is an example of the variant ``released``; 0: there is
            no such variant.

    Raises:
        UserError: an unknown size or variant.
    """
    size, variant = parse_variant(name, arg, "scst", "zero_shot", *(["released"] if num_captions else []))
    if variant == "released":
        train = dataclasses.replace(data.train, expand="text")
        return released_recipe(name, size, "caption", dataclasses.replace(data, train=train, num_train=num_captions))
    examples = {"instructions": {"caption": InstructionConfig(templates=("",))}, "target_length": 32}
    family = TaskFamily(
        objectives={"caption": 1.0}, task="caption", train_examples=examples, epochs=epochs,
        train_visual={"transform": "train", "flip": False},
        search=SearchConfig(num_beams=5, min_length=4, max_length=31), label_smoothing=0.1,
        eval_overrides={"java_metrics": size != "tiny"},
    )  # fmt: skip
    if variant == "zero_shot":
        instructions = {"caption": InstructionConfig(templates=("describe it",))}  # of pretraining
        family = dataclasses.replace(
            family, eval_examples={**examples, "instructions": instructions, "instruction_length": 32}
        )
    if variant == "scst":
        family = dataclasses.replace(
            family, objectives={"scst": 1.0}, train_examples={**examples, "max_references": 20},
            eval_examples=examples, epochs=max(1, epochs // 4),
            optimizer=OptimizerConfig(learning_rate=2e-6, vision_learning_rate=2e-7, weight_decay=0.02),
        )  # fmt: skip
    return finetune_recipe(name, size, data, family)
