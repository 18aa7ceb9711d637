"""MSRVTT captions: 20 for each of 10,000 web clips; 6,513 clips to learn from, 2,990 to be described.

Data: msrvtt_caption/train.json and test.json (video, golden_captions or caption); the clips in msrvtt/videos. The
release's own protocol, quirks included, is ``msrvtt_caption:SIZE,released``.
"""

from ml_collections import ConfigDict

from mplug2_jax.recipes.base import Sets, files
from mplug2_jax.recipes.captioning import captioning


def get_config(form: str = "large") -> ConfigDict:
    """The run, at one of the sizes of the model, or a form: ``SIZE,released``, ``SIZE,scst``, ``SIZE,zero_shot``."""
    sets = Sets(
        train=files("video", "msrvtt_caption/train.json", "msrvtt/videos"), examples=6_513,
        asked={"test": files("video", "msrvtt_caption/test.json", "msrvtt/videos")},
    )  # fmt: skip
    return captioning("msrvtt_caption", form, sets, epochs=40, texts=130_260)
