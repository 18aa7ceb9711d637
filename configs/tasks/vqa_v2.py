"""VQA v2: questions about COCO's images with ten answers each; 443,757 training and 214,354 validation questions.

Data, all from https://visualqa.org/download.html: vqa_v2/ with the question and annotation files of both splits; the
images in coco/train2014 and coco/val2014.
"""

from mplug2_jax.recipes.api import RunConfig, TaskData, file_source, vqa_recipe


def get_config(size: str = "large") -> RunConfig:
    """Return the run at a model size."""
    data = TaskData(
        train=file_source("image", "vqa_v2/v2_*mscoco_train2014_*.json", "coco/train2014", format="vqa_v2"),
        num_train=443_757,
        eval={"val": file_source("image", "vqa_v2/v2_*mscoco_val2014_*.json", "coco/val2014", format="vqa_v2")},
    )
    return vqa_recipe("vqa_v2", size, data, task="vqa")
