"""Something-Something v2: actions with objects, some of which tell left from right; 168,913 training videos.

Data: ssv2/something-something-v2-train.json, -validation.json and -labels.json, and the videos in ssv2/videos
(https://www.qualcomm.com/developer/software/something-something-v-2-dataset).

Evaluated at 1 clip x 3 crops, as usual: an action takes the whole of a short video, which one clip covers.
"""

from mplug2_jax.recipes.api import RunConfig, TaskData, classification_recipe, file_source, read_class_names

PROMPTS = ("{label}", "a video of {label}")


def get_config(variant: str = "large") -> RunConfig:
    """Return the run at a model size, or a variant: ``SIZE,zero_shot``."""
    name = "ssv2/something-something-v2"
    data = TaskData(
        train=file_source("video", f"{name}-train.json", "ssv2/videos", format="ssv2"), num_train=168_913,
        eval={"validation": file_source("video", f"{name}-validation.json", "ssv2/videos", format="ssv2")},
    )  # fmt: skip
    return classification_recipe(
        "ssv2", variant, data, read_class_names(f"{name}-labels.json", 174), PROMPTS, flip=False, num_crops=3
    )
