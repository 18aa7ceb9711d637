"""TGIF-FrameQA: questions that a single frame of a GIF answers; 39,392 to learn from, 13,691 to be asked.

Data: tgif_qa/Train_frameqa_question.tsv and Test_frameqa_question.tsv (gif_name, question, answer; the files of
https://github.com/YunseokJANG/tgif-qa, which are tab-separated although they are called .csv); the GIFs in tgif/gifs.
"""

from ml_collections import ConfigDict

from mplug2_jax.recipes.base import Sets, files
from mplug2_jax.recipes.question_answering import answering


def get_config(form: str = "large") -> ConfigDict:
    """The run, at one of the sizes of the model, or ``SIZE,released``."""
    sets = Sets(
        train=files("video", "tgif_qa/Train_frameqa_question.tsv", "tgif/gifs"), examples=39_392,
        asked={"test": files("video", "tgif_qa/Test_frameqa_question.tsv", "tgif/gifs")},
    )  # fmt: skip
    return answering("tgif_frameqa", form, sets)
