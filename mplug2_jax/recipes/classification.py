"""Classification of images and videos, by a head (parts: vision, universal, classifier) or by prompts (contrast)."""

from typing import Any, Literal

from data_pipelines.config import InstructionConfig
from mplug2_jax.recipes.base import (
    ClassNames,
    TaskData,
    TaskFamily,
    file_source,
    finetune_recipe,
    parse_variant,
    read_class_names,
)
from mplug2_jax.training.config import OptimizerConfig, RunConfig


def classification_recipe(
    name: str, arg: str, data: TaskData, classes: ClassNames, prompts: tuple[str, ...], *, epochs: int = 30,
    flip: bool = True, num_clips: int = 1, num_crops: int = 1,
) -> RunConfig:  # fmt: skip
    """Return a classification run: cross entropy with label smoothing and layer-wise learning rate decay.

    Args:
        name: of the recipe.
        arg: ``SIZE``, or ``SIZE,zero_shot``, which evaluates a pretrained model by ``prompts``.
        data: the data set.
        classes: of the data set.
        prompts: templates with ``{label}``.
        epochs: of training.
        flip: False if classes tell left from right.
        num_clips: temporal views of an evaluated example; the size "tiny" has at most 2.
        num_crops: spatial views of each temporal one; the size "tiny" has 1.

    Raises:
        UserError: an unknown size or variant.
    """
    size, variant = parse_variant(name, arg, "zero_shot")
    if size == "tiny":
        num_clips, num_crops = min(num_clips, 2), 1
    family = TaskFamily(
        objectives={"classify": 1.0}, task=variant or "classify",
        train_examples={
            "instructions": {"label": InstructionConfig(templates=("",))}, "classes": classes.labels,
        },
        epochs=epochs, train_visual={"transform": "train", "min_crop_area": 0.2, "flip": flip},
        eval_visual={"transform": "test", "num_clips": num_clips, "num_crops": num_crops},
        batch_size=256, optimizer=OptimizerConfig(learning_rate=1e-4, layer_decay=0.8, weight_decay=0.05),
        label_smoothing=0.1, num_classes=len(classes.labels),
        eval_overrides={"prompts": prompts, "class_names": classes.names} if variant else {},
    )  # fmt: skip
    return finetune_recipe(name, size, data, family)


def tfds_classification_recipe(
    name: str, arg: str, folder: str, prompts: tuple[str, ...], *, kind: Literal["image", "video"] = "image",
    num_classes: int, num_train: int, eval_split: str = "test", **options: Any,
) -> RunConfig:  # fmt: skip
    """Return a classification run on a data set that TFDS prepared with ``file_format="array_record"``.

    Args:
        name: of the recipe.
        arg: as for :func:`classification_recipe`.
        folder: of the data set's version, below the data folder.
        prompts: templates with ``{label}``.
        kind: of its media.
        num_classes: of the data set.
        num_train: examples of its split "train".
        eval_split: that is evaluated.
        options: of :func:`classification_recipe`.
    """
    data = TaskData(
        train=file_source(kind, folder, format="tfds", split="train"), num_train=num_train,
        eval={eval_split: file_source(kind, folder, format="tfds", split=eval_split)},
    )  # fmt: skip
    classes = read_class_names(f"{folder}/label.labels.txt", num_classes)
    return classification_recipe(name, arg, data, classes, prompts, **options)
