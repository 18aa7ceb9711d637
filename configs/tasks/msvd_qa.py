"""MSVD-QA: open questions about 1,970 short clips; 30,933 to learn from, 13,157 to be asked.

Data: msvd_qa/train.json and test.json (video, question, answer); the clips in msvd/videos
(https://www.cs.utexas.edu/~ml/clamp/videoDescription).
"""

from ml_collections import ConfigDict

from mplug2_jax.recipes.base import Sets, files
from mplug2_jax.recipes.question_answering import answering


def get_config(form: str = "large") -> ConfigDict:
    """The run, at one of the sizes of the model, or ``SIZE,released``."""
    sets = Sets(
        train=files("video", "msvd_qa/train.json", "msvd/videos"), examples=30_933,
        asked={"test": files("video", "msvd_qa/test.json", "msvd/videos")},
    )  # fmt: skip
    return answering("msvd_qa", form, sets)
