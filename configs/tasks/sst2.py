"""GLUE's SST-2: is a review's sentence for or against?

Data: glue/SST-2, the task's folder of https://gluebenchmark.com/tasks.
"""

from ml_collections import ConfigDict

from mplug2_jax.recipes.glue import understanding


def get_config(size: str = "large") -> ConfigDict:
    """The run, at one of the sizes of the model."""
    return understanding("sst2", size)
