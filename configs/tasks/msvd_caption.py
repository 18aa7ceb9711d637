"""MSVD captions, about 40 per video: 1,200 training and 670 test videos.

Data: msvd_caption/train.json and test.json (video, golden_captions or caption); the videos in msvd/videos.
"""

from mplug2_jax.recipes.api import RunConfig, TaskData, caption_recipe, file_source


def get_config(variant: str = "large") -> RunConfig:
    """Return the run at a model size, or a variant: ``SIZE,released``, ``SIZE,scst``, ``SIZE,zero_shot``."""
    data = TaskData(
        train=file_source("video", "msvd_caption/train.json", "msvd/videos"), num_train=1_200,
        eval={"test": file_source("video", "msvd_caption/test.json", "msvd/videos")},
    )  # fmt: skip
    return caption_recipe("msvd_caption", variant, data, epochs=40, num_captions=48_774)
