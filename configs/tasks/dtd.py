"""Describable Textures: the texture in a photo; 1,880 training and 1,880 test images.

Data: dtd/3.0.1, prepared by TFDS (``tfds build dtd --file_format array_record``).
"""

from mplug2_jax.recipes.api import RunConfig, tfds_classification_recipe

PROMPTS = ("{label}", "a photo of a {label} texture")


def get_config(variant: str = "large") -> RunConfig:
    """Return the run at a model size, or a variant: ``SIZE,zero_shot``."""
    return tfds_classification_recipe("dtd", variant, "dtd/3.0.1", PROMPTS, num_classes=47, num_train=1880)
