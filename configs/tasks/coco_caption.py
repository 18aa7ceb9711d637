"""COCO captions, Karpathy's splits: 113,287 pictures to learn from, 5,000 to be described, five captions each.

Data: coco/dataset_coco.json (https://cs.stanford.edu/people/karpathy/deepimagesent); the pictures in coco/, as
train2014 and val2014 (https://cocodataset.org/#download).
"""

from ml_collections import ConfigDict

from mplug2_jax.recipes.base import Sets, files
from mplug2_jax.recipes.captioning import captioning


def get_config(form: str = "large") -> ConfigDict:
    """The run, at one of the sizes of the model, or a form of it: ``SIZE,scst``, ``SIZE,zero_shot``."""
    file, media = "coco/dataset_coco.json", "coco"
    sets = Sets(
        train=files("image", file, media, format="karpathy", split="train+restval"), examples=113_287,
        asked={"test": files("image", file, media, format="karpathy", split="test")},
    )  # fmt: skip
    return captioning("coco_caption", form, sets)
