"""MSVD-QA: open-ended questions about 1,970 short videos; 30,933 training and 13,157 test questions.

Data: msvd_qa/train.json and test.json (video, question, answer); the videos in msvd/videos
(https://www.cs.utexas.edu/~ml/clamp/videoDescription).
"""

from mplug2_jax.recipes.api import RunConfig, TaskData, file_source, vqa_recipe


def get_config(variant: str = "large") -> RunConfig:
    """Return the run at a model size, or a variant: ``SIZE,released``."""
    data = TaskData(
        train=file_source("video", "msvd_qa/train.json", "msvd/videos"), num_train=30_933,
        eval={"test": file_source("video", "msvd_qa/test.json", "msvd/videos")},
    )  # fmt: skip
    return vqa_recipe("msvd_qa", variant, data)
