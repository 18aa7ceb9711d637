"""RefCOCOg: the box of a referring expression; 80,512 training expressions.

Data: refcocog/train.jsonl and val, test (image, expression, bbox as x, y, width, height in pixels, and the image's
width and height), made from https://github.com/lichengunc/refer; the images in coco/train2014.
"""

from mplug2_jax.recipes.api import RunConfig, SourceConfig, TaskData, file_source, grounding_recipe


def get_config(size: str = "large") -> RunConfig:
    """Return the run at a model size."""

    def split(name: str) -> SourceConfig:
        return file_source("image", f"refcocog/{name}.jsonl", "coco/train2014")

    data = TaskData(train=split("train"), num_train=80_512, eval={name: split(name) for name in ("val", "test")})
    return grounding_recipe("refcocog", size, data)
