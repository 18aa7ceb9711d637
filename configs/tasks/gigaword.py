"""Gigaword headlines: a news text's first sentence to its headline; 3,803,957 to learn from, 1,951 to be told.

Data: gigaword/train.jsonl and test.jsonl (document, summary), as https://huggingface.co/datasets/Harvard/gigaword has
them.
"""

from ml_collections import ConfigDict

from mplug2_jax.recipes.base import Sets, files
from mplug2_jax.recipes.summarization import summarising


def get_config(size: str = "large") -> ConfigDict:
    """The run, at one of the sizes of the model."""
    sets = Sets(
        train=files("text", "gigaword/train.jsonl"), examples=3_803_957,
        asked={"test": files("text", "gigaword/test.jsonl")},
    )  # fmt: skip
    return summarising("gigaword", size, sets)
