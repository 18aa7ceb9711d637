"""GLUE's SST-2: is a sentence of a review positive or negative?

Data: glue/SST-2, the task's folder of https://gluebenchmark.com/tasks.
"""

from mplug2_jax.recipes.api import RunConfig, glue_recipe


def get_config(size: str = "large") -> RunConfig:
    """Return the run at a model size."""
    return glue_recipe("sst2", size)
