"""TGIF-FrameQA: questions that one frame of a GIF answers; 39,392 training and 13,691 test questions.

Data: tgif_qa/Train_frameqa_question.tsv and Test_frameqa_question.tsv (gif_name, question, answer; the files of
https://github.com/YunseokJANG/tgif-qa, which are tab-separated although they are called .csv); the GIFs in tgif/gifs.
"""

from mplug2_jax.recipes.api import RunConfig, TaskData, file_source, vqa_recipe


def get_config(variant: str = "large") -> RunConfig:
    """Return the run at a model size, or a variant: ``SIZE,released``."""
    data = TaskData(
        train=file_source("video", "tgif_qa/Train_frameqa_question.tsv", "tgif/gifs"), num_train=39_392,
        eval={"test": file_source("video", "tgif_qa/Test_frameqa_question.tsv", "tgif/gifs")},
    )  # fmt: skip
    return vqa_recipe("tgif_frameqa", variant, data)
