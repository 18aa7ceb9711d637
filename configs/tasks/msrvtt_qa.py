"""MSRVTT-QA: open-ended questions about 10,000 web videos; 158,581 training and 72,821 test questions.

Data, in the format of the mPLUG-2 release: msrvtt_qa/train.json and test.json (video, question, answer); the videos in
msrvtt/videos (https://www.robots.ox.ac.uk/~maxbain/frozen-in-time/data/MSRVTT.zip). The release's protocol with its
quirks is ``msrvtt_qa:SIZE,released``.
"""

from mplug2_jax.recipes.api import RunConfig, TaskData, file_source, vqa_recipe


def get_config(variant: str = "large") -> RunConfig:
    """Return the run at a model size, or a variant: ``SIZE,released``."""
    data = TaskData(
        train=file_source("video", "msrvtt_qa/train.json", "msrvtt/videos"), num_train=158_581,
        eval={"test": file_source("video", "msrvtt_qa/test.json", "msrvtt/videos")},
    )  # fmt: skip
    return vqa_recipe("msrvtt_qa", variant, data)
