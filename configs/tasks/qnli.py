"""GLUE's QNLI: does a sentence contain the answer to a question?

Data: glue/QNLI, the task's folder of https://gluebenchmark.com/tasks.
"""

from mplug2_jax.recipes.api import RunConfig, glue_recipe


def get_config(size: str = "large") -> RunConfig:
    """Return the run at a model size."""
    return glue_recipe("qnli", size)
