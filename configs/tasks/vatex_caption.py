"""VATEX captions, the English ones: ten for each clip; 25,991 clips to learn from, 3,000 to be described.

Data: vatex/vatex_training_v1.0.json and vatex_validation_v1.0.json (videoID, enCap) of
https://eric-xw.github.io/vatex-website/download.html; the clips in vatex/videos, named by their videoID.
"""

from ml_collections import ConfigDict

from mplug2_jax.recipes.base import Sets, files
from mplug2_jax.recipes.captioning import captioning


def get_config(form: str = "large") -> ConfigDict:
    """The run, at one of the sizes of the model, or a form of it: ``SIZE,scst``, ``SIZE,zero_shot``."""
    sets = Sets(
        train=files("video", "vatex/vatex_training_v1.0.json", "vatex/videos"), examples=25_991,
        asked={"validation": files("video", "vatex/vatex_validation_v1.0.json", "vatex/videos")},
    )  # fmt: skip
    return captioning("vatex_caption", form, sets)
