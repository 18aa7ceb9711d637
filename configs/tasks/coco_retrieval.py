"""COCO retrieval, Karpathy's splits: 5,000 pictures and their 25,000 captions to be found.

Data: that of ``coco_caption``.
"""

from ml_collections import ConfigDict

from mplug2_jax.recipes.base import Sets, files
from mplug2_jax.recipes.retrieval import retrieval


def get_config(size: str = "large") -> ConfigDict:
    """The run, at one of the sizes of the model."""
    file, media = "coco/dataset_coco.json", "coco"
    test = files("image", file, media, format="karpathy", split="test", expand="text")
    sets = Sets(
        train=files("image", file, media, format="karpathy", split="train+restval"), examples=113_287,
        asked={"test": test},
    )  # fmt: skip
    return retrieval("coco_retrieval", size, sets)
