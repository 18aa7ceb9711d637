"""NoCaps: captions of what COCO does not show, learned from COCO; 4,500 pictures to be described, also by domain.

Data: that of ``coco_caption``; nocaps/nocaps_val_4500_captions.json (https://nocaps.org/download), the pictures in
nocaps/val.
"""

from ml_collections import ConfigDict

from mplug2_jax.recipes.base import Sets, files
from mplug2_jax.recipes.captioning import captioning


def get_config(form: str = "large") -> ConfigDict:
    """The run, at one of the sizes of the model, or a form of it: ``SIZE,scst``, ``SIZE,zero_shot``."""
    coco, held, media = "coco/dataset_coco.json", "nocaps/nocaps_val_4500_captions.json", "nocaps/val"
    domains = {"in": "in-domain", "near": "near-domain", "out": "out-domain", "all": ""}
    sets = Sets(
        train=files("image", coco, "coco", format="karpathy", split="train+restval"), examples=113_287,
        asked={key: files("image", held, media, format="coco_captions", split=of) for key, of in domains.items()},
    )  # fmt: skip
    return captioning("nocaps", form, sets)
