"""DiDeMo retrieval by paragraphs, all descriptions of a video joined: 8,395 training and 1,003 test videos.

Data: didemo/train.jsonl and test.jsonl (clip_name, caption: the paragraph), made from
https://github.com/LisaAnne/LocalizingMoments; the videos in didemo/videos.
"""

from mplug2_jax.recipes.api import RunConfig, TaskData, file_source, retrieval_recipe


def get_config(size: str = "large") -> RunConfig:
    """Return the run at a model size."""
    data = TaskData(
        train=file_source("video", "didemo/train.jsonl", "didemo/videos"), num_train=8_395,
        eval={"test": file_source("video", "didemo/test.jsonl", "didemo/videos")},
    )  # fmt: skip
    return retrieval_recipe("didemo_retrieval", size, data, text_length=64, epochs=20)
