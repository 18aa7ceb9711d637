"""COCO retrieval, Karpathy's splits: 113,287 training images, 5,000 test images and their 25,000 captions.

Data: as for ``coco_caption``.
"""

from mplug2_jax.recipes.api import RunConfig, TaskData, file_source, retrieval_recipe


def get_config(size: str = "large") -> RunConfig:
    """Return the run at a model size."""
    file, media = "coco/dataset_coco.json", "coco"
    test = file_source("image", file, media, format="karpathy", split="test", expand="text")
    data = TaskData(
        train=file_source("image", file, media, format="karpathy", split="train+restval"), num_train=113_287,
        eval={"test": test},
    )  # fmt: skip
    return retrieval_recipe("coco_retrieval", size, data)
