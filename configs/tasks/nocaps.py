"""NoCaps: captions of objects that COCO lacks, trained on COCO; 4,500 test images, also by domain.

Data: as for ``coco_caption``; nocaps/nocaps_val_4500_captions.json (https://nocaps.org/download), the images in
nocaps/val.
"""

from mplug2_jax.recipes.api import RunConfig, TaskData, caption_recipe, file_source


def get_config(variant: str = "large") -> RunConfig:
    """Return the run at a model size, or a variant: ``SIZE,scst``, ``SIZE,zero_shot``."""
    coco, val_file, media = "coco/dataset_coco.json", "nocaps/nocaps_val_4500_captions.json", "nocaps/val"
    domains = {"in": "in-domain", "near": "near-domain", "out": "out-domain", "all": ""}
    data = TaskData(
        train=file_source("image", coco, "coco", format="karpathy", split="train+restval"), num_train=113_287,
        eval={
            key: file_source("image", val_file, media, format="coco_captions", split=split)
            for key, split in domains.items()
        },
    )  # fmt: skip
    return caption_recipe("nocaps", variant, data)
