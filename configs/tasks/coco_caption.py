"""COCO captions, Karpathy's splits: 113,287 training and 5,000 test images with five captions each.

Data: coco/dataset_coco.json (https://cs.stanford.edu/people/karpathy/deepimagesent); the images in coco/train2014 and
coco/val2014 (https://cocodataset.org/#download).
"""

from mplug2_jax.recipes.api import RunConfig, TaskData, caption_recipe, file_source


def get_config(variant: str = "large") -> RunConfig:
    """Return the run at a model size, or a variant: ``SIZE,scst``, ``SIZE,zero_shot``."""
    file, media = "coco/dataset_coco.json", "coco"
    data = TaskData(
        train=file_source("image", file, media, format="karpathy", split="train+restval"), num_train=113_287,
        eval={"test": file_source("image", file, media, format="karpathy", split="test")},
    )  # fmt: skip
    return caption_recipe("coco_caption", variant, data)
