"""CIFAR-100: the class of an image of 32 x 32 pixels; 50,000 training and 10,000 test images.

Data: cifar100/3.0.2, prepared by TFDS (``tfds build cifar100 --file_format array_record``).
"""

from mplug2_jax.recipes.api import RunConfig, tfds_classification_recipe

PROMPTS = ("{label}", "a photo of a {label}")


def get_config(variant: str = "large") -> RunConfig:
    """Return the run at a model size, or a variant: ``SIZE,zero_shot``."""
    return tfds_classification_recipe("cifar100", variant, "cifar100/3.0.2", PROMPTS, num_classes=100, num_train=50_000)
