"""RefCOCO: the box of a referring expression; 120,624 training expressions.

Data: refcoco/train.jsonl and val, testA, testB (image, expression, bbox as x, y, width, height in pixels, and the
image's width and height), made from https://github.com/lichengunc/refer; the images in coco/train2014.
"""

from mplug2_jax.recipes.api import RunConfig, SourceConfig, TaskData, file_source, grounding_recipe


def get_config(size: str = "large") -> RunConfig:
    """Return the run at a model size."""

    def split(name: str) -> SourceConfig:
        return file_source("image", f"refcoco/{name}.jsonl", "coco/train2014")

    data = TaskData(
        train=split("train"), num_train=120_624, eval={name: split(name) for name in ("val", "testA", "testB")}
    )
    return grounding_recipe("refcoco", size, data)
