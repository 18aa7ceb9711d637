"""MSRVTT-QA: open questions about 10,000 web clips; 158,581 to learn from, 72,821 to be asked.

Data, as the mPLUG-2 release names it: msrvtt_qa/train.json and test.json (video, question, answer); the clips in
msrvtt/videos (https://www.robots.ox.ac.uk/~maxbain/frozen-in-time/data/MSRVTT.zip). The release's own protocol, quirks
included, is ``msrvtt_qa:SIZE,released``.
"""

from ml_collections import ConfigDict

from mplug2_jax.recipes.base import Sets, files
from mplug2_jax.recipes.question_answering import answering


def get_config(form: str = "large") -> ConfigDict:
    """The run, at one of the sizes of the model, or ``SIZE,released``."""
    sets = Sets(
        train=files("video", "msrvtt_qa/train.json", "msrvtt/videos"), examples=158_581,
        asked={"test": files("video", "msrvtt_qa/test.json", "msrvtt/videos")},
    )  # fmt: skip
    return answering("msrvtt_qa", form, sets)
