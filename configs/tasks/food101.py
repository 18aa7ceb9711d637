"""Food-101: the dish in a photo; 75,750 training and 25,250 validation images.

Data: food101/2.0.0, prepared by TFDS (``tfds build food101 --file_format array_record``).
"""

from mplug2_jax.recipes.api import RunConfig, tfds_classification_recipe

PROMPTS = ("{label}", "a photo of {label}, a dish")


def get_config(variant: str = "large") -> RunConfig:
    """Return the run at a model size, or a variant: ``SIZE,zero_shot``."""
    return tfds_classification_recipe(
        "food101", variant, "food101/2.0.0", PROMPTS, num_classes=101, num_train=75_750, eval_split="validation"
    )
