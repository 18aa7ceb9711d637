"""Gigaword: the headline of a news text from its first sentence; 3,803,957 training and 1,951 test examples.

Data: gigaword/train.jsonl and test.jsonl (document, summary), as in
https://huggingface.co/datasets/Harvard/gigaword.
"""

from mplug2_jax.recipes.api import RunConfig, TaskData, file_source, summarization_recipe


def get_config(size: str = "large") -> RunConfig:
    """Return the run at a model size."""
    data = TaskData(
        train=file_source("text", "gigaword/train.jsonl"), num_train=3_803_957,
        eval={"test": file_source("text", "gigaword/test.jsonl")},
    )  # fmt: skip
    return summarization_recipe("gigaword", size, data)
