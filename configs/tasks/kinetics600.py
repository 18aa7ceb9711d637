"""Kinetics-600: the action of a clip of ten seconds; about 390,191 to learn from.

Data: kinetics600/train.csv and val.csv (label, youtube_id, time_start, time_end) and the clips in kinetics600/videos
(https://github.com/cvdfoundation/kinetics-dataset); kinetics600/classes.json, a list of the labels.

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
        train=files("video", "kinetics600/train.csv", "kinetics600/videos", format="kinetics"), examples=390_191,
        asked={"val": files("video", "kinetics600/val.csv", "kinetics600/videos", format="kinetics")},
    )  # fmt: skip
    classes = read_classes("kinetics600/classes.json", 600)
    return classification("kinetics600", form, sets, classes, PROMPTS, num_clips=4, num_crops=3)
