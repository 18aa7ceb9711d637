"""DiDeMo retrieval by paragraphs: all descriptions of a clip as one text; 8,395 to learn from, 1,003 to be found.

Data: didemo/train.jsonl and test.jsonl (clip_name, caption: the paragraph), made of
https://github.com/LisaAnne/LocalizingMoments; the clips in didemo/videos.
"""

from ml_collections import ConfigDict

from mplug2_jax.recipes.base import Sets, files
from mplug2_jax.recipes.retrieval import retrieval


def get_config(size: str = "large") -> ConfigDict:
    """The run, at one of the sizes of the model."""
    sets = Sets(
        train=files("video", "didemo/train.jsonl", "didemo/videos"), examples=8_395,
        asked={"test": files("video", "didemo/test.jsonl", "didemo/videos")},
    )  # fmt: skip
    return retrieval("didemo_retrieval", size, sets, text_length=64, epochs=20)
