"""MSRVTT captions, 20 per video: 6,513 training and 2,990 test videos.

Data: msrvtt_caption/train.json and test.json (video, golden_captions or caption); the videos in msrvtt/videos. The
release's protocol with its quirks is ``msrvtt_caption:SIZE,released``.
"""

from mplug2_jax.recipes.api import RunConfig, TaskData, caption_recipe, file_source


def get_config(variant: str = "large") -> RunConfig:
    """Return the run at a model size, or a variant: ``SIZE,released``, ``SIZE,scst``, ``SIZE,zero_shot``."""
    data = TaskData(
        train=file_source("video", "msrvtt_caption/train.json", "msrvtt/videos"), num_train=6_513,
        eval={"test": file_source("video", "msrvtt_caption/test.json", "msrvtt/videos")},
    )  # fmt: skip
    return caption_recipe("msrvtt_caption", variant, data, epochs=40, num_captions=130_260)
