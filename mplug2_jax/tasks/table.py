"""All tasks by name, with their objectives and predictions."""

from collections.abc import Mapping

from mplug2_jax.tasks import (
    answer,
    caption,
    classify,
    glue,
    ground,
    ilm,
    mlm,
    rerank,
    scst,
    summarization,
    vlc,
    vlm,
    vqa,
    zero_shot,
)
from mplug2_jax.tasks.base import Task

_MODULES = (mlm, vlc, vlm, rerank, ilm, caption, scst, answer, vqa, summarization, ground, classify, zero_shot)
TASKS: Mapping[str, Task] = {module.TASK.name: module.TASK for module in _MODULES} | dict(glue.TASKS)
