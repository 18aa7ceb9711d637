"""VATEX captions, the English ones, ten per video: 25,991 training and 3,000 validation videos.

Data: vatex/vatex_training_v1.0.json and vatex_validation_v1.0.json (videoID, enCap) of
https://eric-xw.github.io/vatex-website/download.html; the videos in vatex/videos, named by their videoID.
"""

from mplug2_jax.recipes.api import RunConfig, TaskData, caption_recipe, file_source


def get_config(variant: str = "large") -> RunConfig:
    """Return the run at a model size, or a variant: ``SIZE,scst``, ``SIZE,zero_shot``."""
    data = TaskData(
        train=file_source("video", "vatex/vatex_training_v1.0.json", "vatex/videos"), num_train=25_991,
        eval={"validation": file_source("video", "vatex/vatex_validation_v1.0.json", "vatex/videos")},
    )  # fmt: skip
    return caption_recipe("vatex_caption", variant, data)
