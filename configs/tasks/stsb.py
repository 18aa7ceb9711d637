"""GLUE's STS-B: how alike are two sentences, from 0 to 5?

Data: glue/STS-B, the task's folder of https://gluebenchmark.com/tasks.
"""

from ml_collections import ConfigDict

from mplug2_jax.recipes.glue import understanding


def get_config(size: str = "large") -> ConfigDict:
    """The run, at one of the sizes of the model."""
    return understanding("stsb", size)
