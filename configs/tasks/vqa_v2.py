"""VQA v2: questions about COCO's pictures, each answered by ten people; 443,757 to learn from, 214,354 to be asked.

Data, all of https://visualqa.org/download.html: vqa_v2/ with the questions' and the annotations' files of both splits;
the pictures in coco/train2014 and coco/val2014.
"""

from ml_collections import ConfigDict

from mplug2_jax.recipes.base import Sets, files
from mplug2_jax.recipes.question_answering import answering


def get_config(size: str = "large") -> ConfigDict:
    """The run, at one of the sizes of the model."""
    sets = Sets(
        train=files("image", "vqa_v2/v2_*mscoco_train2014_*.json", "coco/train2014", format="vqa_v2"),
        examples=443_757,
        asked={"val": files("image", "vqa_v2/v2_*mscoco_val2014_*.json", "coco/val2014", format="vqa_v2")},
    )
    return answering("vqa_v2", size, sets, task="vqa")
