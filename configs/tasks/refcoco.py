"""RefCOCO: the box of what a phrase refers to; 120,624 phrases to learn from.

Data: refcoco/train.jsonl and val, testA, testB (image, expression, bbox as x, y, width, height in pixels, and the
picture's width and height), made of https://github.com/lichengunc/refer; the pictures in coco/train2014.
"""

from ml_collections import ConfigDict

from data_pipelines.config import SourceConfig
from mplug2_jax.recipes.base import Sets, files
from mplug2_jax.recipes.grounding import grounding


def get_config(size: str = "large") -> ConfigDict:
    """The run, at one of the sizes of the model."""

    def part(name: str) -> SourceConfig:
        return files("image", f"refcoco/{name}.jsonl", "coco/train2014")

    sets = Sets(train=part("train"), examples=120_624, asked={name: part(name) for name in ("val", "testA", "testB")})
    return grounding("refcoco", size, sets)
