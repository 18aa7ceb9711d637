"""Kinetics-700: the action of a clip of ten seconds; about 541,279 to learn from.

Data: kinetics700/train.csv and val.csv (label, youtube_id, time_start, time_end) and the clips in kinetics700/videos
(https://github.com/cvdfoundation/kinetics-dataset); kinetics700/classes.json, a list of the labels.

Asked at 4 clips x 3 crops, the usual protocol of vision transformers: what is done may be in one place of a long clip,
and beside the square in the middle.
"""

from ml_collections import ConfigDict

from mplug2_jax.recipes.base import Sets, files, read_classes
from mplug2_jax.recipes.classification import classification

PROMPTS = ("{label}", "a video of {label}", "a person is {label}")


def get_config(form: str = "large") -> ConfigDict:
    """The run, at one of the sizes of the model, or a form of it: ``SIZE,zero_shot``."""
    sets = Sets(
        train=files("video", "kinetics700/train.csv", "kinetics700/videos", format="kinetics"), examples=541_279,
        asked={"val": files("video", "kinetics700/val.csv", "kinetics700/videos", format="kinetics")},
    )  # fmt: skip
    classes = read_classes("kinetics700/classes.json", 700)
    return classification("kinetics700", form, sets, classes, PROMPTS, num_clips=4, num_crops=3)
