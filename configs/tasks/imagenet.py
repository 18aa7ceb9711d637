"""ImageNet-1k: the class of an image; 1,281,167 training and 50,000 validation images.

Data: imagenet/train and imagenet/val, one folder of images per class (https://image-net.org/download.php);
imagenet/classes.json, the folders' names and what they stand for, ``{"n01440764": "tench", ...}``.
"""

from mplug2_jax.recipes.api import RunConfig, TaskData, classification_recipe, file_source, read_class_names

PROMPTS = (
    "{label}", "a {label}", "a photo of a {label}", "a picture with a {label} in it", "a {label} seen from close by",
    "a drawing of a {label}", "several of {label}",
)  # fmt: skip


def get_config(variant: str = "large") -> RunConfig:
    """Return the run at a model size, or a variant: ``SIZE,zero_shot``."""
    data = TaskData(
        train=file_source("image", "imagenet/train", format="image_folder"), num_train=1_281_167,
        eval={"val": file_source("image", "imagenet/val", format="image_folder")},
    )  # fmt: skip
    return classification_recipe("imagenet", variant, data, read_class_names("imagenet/classes.json", 1000), PROMPTS)
