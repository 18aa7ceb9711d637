"""MSVD captions: about 40 for each of 1,970 short clips; 1,200 clips to learn from, 670 to be described.

Data: msvd_caption/train.json and test.json (video, golden_captions or caption); the clips in msvd/videos.
"""

from ml_collections import ConfigDict

from mplug2_jax.recipes.base import Sets, files
from mplug2_jax.recipes.captioning import captioning


def get_config(form: str = "large") -> ConfigDict:
    """The run, at one of the sizes of the model, or a form: ``SIZE,released``, ``SIZE,scst``, ``SIZE,zero_shot``."""
    sets = Sets(
        train=files("video", "msvd_caption/train.json", "msvd/videos"), examples=1_200,
        asked={"test": files("video", "msvd_caption/test.json", "msvd/videos")},
    )  # fmt: skip
    return captioning("msvd_caption", form, sets, epochs=40, texts=48_774)
