"""Classes of pictures and actions of clips, by a head: vision, universal, classifier; or by prompts, from contrast."""

from ml_collections import ConfigDict

from data_pipelines.config import InstructionConfig
from mplug2_jax.recipes.base import Classes, Family, Sets, parse_variant, recipe
from mplug2_jax.training.config import AdamWConfig


def classification(
    name: str, arg: str, sets: Sets, classes: Classes, prompts: tuple[str, ...], *, epochs: int = 30,
    flip: bool = True, num_clips: int = 1, num_crops: int = 1,
) -> ConfigDict:  # fmt: skip
    """Cross entropy with smoothed labels, rates that fall towards the pixels; ``flip=False`` where sides matter.

    Evaluations see ``num_clips`` times ``num_crops`` views of each example; a trial at most two. ``SIZE,zero_shot``
    asks a pretrained model instead, by ``prompts``.
    """
    size, form = parse_variant(name, arg, "zero_shot")
    examples = {"instructions": {"label": InstructionConfig(templates=("",))}, "classes": classes.labels}
    views = (
        {"num_clips": min(num_clips, 2), "num_crops": 1}
        if size == "tiny"
        else {"num_clips": num_clips, "num_crops": num_crops}
    )
    family = Family(
        objectives={"classify": 1.0}, task=form or "classify", learned=examples, told=examples, epochs=epochs,
        train_visual={"transform": "train", "min_crop_area": 0.2, "flip": flip},
        test_visual={"transform": "test"} | views,
        batch_size=256, optimizer=AdamWConfig(learning_rate=1e-4, layer_decay=0.8, weight_decay=0.05),
        label_smoothing=0.1, num_classes=len(classes.labels),
        asked={"prompts": prompts, "class_names": classes.names} if form else {},
    )  # fmt: skip
    return recipe(name, size, sets, family)
