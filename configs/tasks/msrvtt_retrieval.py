"""MSRVTT retrieval, split 1k-A: 9,000 training videos, 1,000 test videos with one caption each.

Data: msrvtt_retrieval/train.json (video, caption) and MSRVTT_JSFUSION_test.csv (video_id, sentence); the videos in
msrvtt/videos.
"""

from mplug2_jax.recipes.api import RunConfig, TaskData, file_source, retrieval_recipe


def get_config(size: str = "large") -> RunConfig:
    """Return the run at a model size."""
    data = TaskData(
        train=file_source("video", "msrvtt_retrieval/train.json", "msrvtt/videos"), num_train=180_000,
        eval={"test": file_source("video", "msrvtt_retrieval/MSRVTT_JSFUSION_test.csv", "msrvtt/videos")},
    )  # fmt: skip
    return retrieval_recipe("msrvtt_retrieval", size, data, epochs=5)
