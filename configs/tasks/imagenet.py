"""ImageNet-1k: the class of a picture; 1,281,167 to learn from, 50,000 to be classified.

Data: imagenet/train and imagenet/val, a folder for each class with its pictures (https://image-net.org/download.php);
imagenet/classes.json, the folders' names and what they stand for, ``{"n01440764": "tench", ...}``.
"""

from ml_collections import ConfigDict

from mplug2_jax.recipes.base import Sets, files, read_classes
from mplug2_jax.recipes.classification import classification

PROMPTS = (
    "{label}", "a {label}", "a photo of a {label}", "a picture with a {label} in it", "a {label} seen from close by",
    "a drawing of a {label}", "several of {label}",
)  # fmt: skip


def get_config(form: str = "large") -> ConfigDict:
    """The run, at one of the sizes of the model, or a form of it: ``SIZE,zero_shot``."""
    sets = Sets(
        train=files("image", "imagenet/train", format="image_folder"), examples=1_281_167,
        asked={"val": files("image", "imagenet/val", format="image_folder")},
    )  # fmt: skip
    return classification("imagenet", form, sets, read_classes("imagenet/classes.json", 1000), PROMPTS)
