"""GLUE's CoLA: is a sentence English?

Data: glue/CoLA, the task's folder of https://gluebenchmark.com/tasks.
"""

from ml_collections import ConfigDict

from mplug2_jax.recipes.glue import understanding


def get_config(size: str = "large") -> ConfigDict:
    """The run, at one of the sizes of the model."""
    return understanding("cola", size)
