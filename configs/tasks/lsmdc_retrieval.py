"""LSMDC retrieval: clips of movies by their audio descriptions; 101,079 training and 1,000 test clips.

Data: lsmdc/train.jsonl and test.jsonl (clip_name, caption) of https://sites.google.com/site/describingmovies/download;
the videos in lsmdc/videos.
"""

from mplug2_jax.recipes.api import RunConfig, TaskData, file_source, retrieval_recipe


def get_config(size: str = "large") -> RunConfig:
    """Return the run at a model size."""
    data = TaskData(
        train=file_source("video", "lsmdc/train.jsonl", "lsmdc/videos"), num_train=101_079,
        eval={"test": file_source("video", "lsmdc/test.jsonl", "lsmdc/videos")},
    )  # fmt: skip
    return retrieval_recipe("lsmdc_retrieval", size, data)
