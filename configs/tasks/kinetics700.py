"""Kinetics-700: the action in a video of ten seconds; about 541,279 training videos.

Data: kinetics700/train.csv and val.csv (label, youtube_id, time_start, time_end) and the videos in kinetics700/videos
(https://github.com/cvdfoundation/kinetics-dataset); kinetics700/classes.json, a list of the labels.

Evaluated at 4 clips x 3 crops, the usual protocol of vision transformers: the action may happen anywhere in a long
video, and outside its center crop.
"""

from mplug2_jax.recipes.api import RunConfig, TaskData, classification_recipe, file_source, read_class_names

PROMPTS = ("{label}", "a video of {label}", "a person is {label}")


def get_config(variant: str = "large") -> RunConfig:
    """Return the run at a model size, or a variant: ``SIZE,zero_shot``."""
    data = TaskData(
        train=file_source("video", "kinetics700/train.csv", "kinetics700/videos", format="kinetics"), num_train=541_279,
        eval={"val": file_source("video", "kinetics700/val.csv", "kinetics700/videos", format="kinetics")},
    )  # fmt: skip
    classes = read_class_names("kinetics700/classes.json", 700)
    return classification_recipe("kinetics700", variant, data, classes, PROMPTS, num_clips=4, num_crops=3)
