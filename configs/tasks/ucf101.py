"""UCF101, split 1: the action in a video; 9,537 training and 3,783 test videos.

Data: ucf101/ucf101_1_256/2.0.0, prepared by TFDS (``tfds build ucf101/ucf101_1_256 --file_format array_record``).
"""

from mplug2_jax.recipes.api import RunConfig, tfds_classification_recipe

PROMPTS = ("{label}", "a video of {label}", "a person is doing {label}")


def get_config(variant: str = "large") -> RunConfig:
    """Return the run at a model size, or a variant: ``SIZE,zero_shot``."""
    return tfds_classification_recipe(
        "ucf101", variant, "ucf101/ucf101_1_256/2.0.0", PROMPTS, kind="video", num_classes=101, num_train=9537
    )
