"""MSRVTT retrieval, split 1k-A: 9,000 clips to learn from, 1,000 with one caption each to be found.

Data: msrvtt_retrieval/train.json (video, caption) and MSRVTT_JSFUSION_test.csv (video_id, sentence); the clips in
msrvtt/videos.
"""

from ml_collections import ConfigDict

from mplug2_jax.recipes.base import Sets, files
from mplug2_jax.recipes.retrieval import retrieval


def get_config(size: str = "large") -> ConfigDict:
    """The run, at one of the sizes of the model."""
    sets = Sets(
        train=files("video", "msrvtt_retrieval/train.json", "msrvtt/videos"), examples=180_000,
        asked={"test": files("video", "msrvtt_retrieval/MSRVTT_JSFUSION_test.csv", "msrvtt/videos")},
    )  # fmt: skip
    return retrieval("msrvtt_retrieval", size, sets, epochs=5)
