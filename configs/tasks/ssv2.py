"""Something-Something v2: what somebody does with something, where left and right matter; 168,913 clips to learn from.

Data: ssv2/something-something-v2-train.json, -validation.json and -labels.json, and the clips in ssv2/videos
(https://www.qualcomm.com/developer/software/something-something-v-2-dataset).

Asked at 1 clip x 3 crops, as usual: a class is the whole of a short movement, which one clip spans already.
"""

from ml_collections import ConfigDict

from mplug2_jax.recipes.base import Sets, files, read_classes
from mplug2_jax.recipes.classification import classification

PROMPTS = ("{label}", "a video of {label}")


def get_config(form: str = "large") -> ConfigDict:
    """The run, at one of the sizes of the model, or a form of it: ``SIZE,zero_shot``."""
    name = "ssv2/something-something-v2"
    sets = Sets(
        train=files("video", f"{name}-train.json", "ssv2/videos", format="ssv2"), examples=168_913,
        asked={"validation": files("video", f"{name}-validation.json", "ssv2/videos", format="ssv2")},
    )  # fmt: skip
    return classification(
        "ssv2", form, sets, read_classes(f"{name}-labels.json", 174), PROMPTS, flip=False, num_crops=3
    )
