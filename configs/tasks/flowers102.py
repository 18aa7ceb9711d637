"""Oxford Flowers 102: the species of a flower; 1,020 training and 6,149 test images.

Data: oxford_flowers102/2.1.1, prepared by TFDS (``tfds build oxford_flowers102 --file_format array_record``).
"""

from mplug2_jax.recipes.api import RunConfig, tfds_classification_recipe

PROMPTS = ("{label}", "a photo of a {label}, a flower")


def get_config(variant: str = "large") -> RunConfig:
    """Return the run at a model size, or a variant: ``SIZE,zero_shot``."""
    return tfds_classification_recipe(
        "flowers102", variant, "oxford_flowers102/2.1.1", PROMPTS, num_classes=102, num_train=1020
    )
