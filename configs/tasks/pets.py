"""Oxford-IIIT Pet: the breed of a cat or dog; 3,680 training and 3,669 test images.

Data: oxford_iiit_pet/4.0.0, prepared by TFDS (``tfds build oxford_iiit_pet --file_format array_record``).
"""

from mplug2_jax.recipes.api import RunConfig, tfds_classification_recipe

PROMPTS = ("{label}", "a photo of a {label}, a pet")


def get_config(variant: str = "large") -> RunConfig:
    """Return the run at a model size, or a variant: ``SIZE,zero_shot``."""
    return tfds_classification_recipe("pets", variant, "oxford_iiit_pet/4.0.0", PROMPTS, num_classes=37, num_train=3680)
