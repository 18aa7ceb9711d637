"""Kinetics-600: the action in a video of ten seconds; about 390,191 training videos.

Data: kinetics600/train.csv and val.csv (label, youtube_id, time_start, time_end) and the videos in kinetics600/videos
(https://github.com/cvdfoundation/kinetics-dataset); kinetics600/classes.json, a list of the labels.

Evaluated at 4 clips x 3 crops, the usual protocol of vision transformers: the action may happen anywhere in a long
video, and outside its center crop.
"""

from mplug2_jax.recipes.api import RunConfig, TaskData, classification_recipe, file_source, read_class_names

PROMPTS = ("{label}", "a video of {label}", "a person is {label}")


def get_config(variant: str = "large") -> RunConfig:
    """Return the run at a model size, or a variant: ``SIZE,zero_shot``."""
    data = TaskData(
        train=file_source("video", "kinetics600/train.csv", "kinetics600/videos", format="kinetics"), num_train=390_191,
        eval={"val": file_source("video", "kinetics600/val.csv", "kinetics600/videos", format="kinetics")},
    )  # fmt: skip
    classes = read_class_names("kinetics600/classes.json", 600)
    return classification_recipe("kinetics600", variant, data, classes, PROMPTS, num_clips=4, num_crops=3)
