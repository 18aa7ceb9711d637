"""RefCOCOg: the box of what a phrase refers to; 80,512 phrases to learn from.

Data: refcocog/train.jsonl and val, test (image, expression, bbox as x, y, width, height in pixels, and the
picture's width and height), made of https://github.com/lichengunc/refer; the pictures in coco/train2014.
"""

from ml_collections import ConfigDict

from data_pipelines.config import SourceConfig
from mplug2_jax.recipes.base import Sets, files
from mplug2_jax.recipes.grounding import grounding


def get_config(size: str = "large") -> ConfigDict:
    """The run, at one of the sizes of the model."""

    def part(name: str) -> SourceConfig:
        return files("image", f"refcocog/{name}.jsonl", "coco/train2014")

    sets = Sets(train=part("train"), examples=80_512, asked={name: part(name) for name in ("val", "test")})
    return grounding("refcocog", size, sets)
