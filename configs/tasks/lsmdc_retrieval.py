"""LSMDC retrieval: clips of films by their audio descriptions; 101,079 to learn from, 1,000 to be found.

Data: lsmdc/train.jsonl and test.jsonl (clip_name, caption) of https://sites.google.com/site/describingmovies/download;
the clips in lsmdc/videos.
"""

from ml_collections import ConfigDict

from mplug2_jax.recipes.base import Sets, files
from mplug2_jax.recipes.retrieval import retrieval


def get_config(size: str = "large") -> ConfigDict:
    """The run, at one of the sizes of the model."""
    sets = Sets(
        train=files("video", "lsmdc/train.jsonl", "lsmdc/videos"), examples=101_079,
        asked={"test": files("video", "lsmdc/test.jsonl", "lsmdc/videos")},
    )  # fmt: skip
    return retrieval("lsmdc_retrieval", size, sets)
