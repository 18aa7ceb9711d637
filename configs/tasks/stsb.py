"""GLUE's STS-B: how similar are two sentences, from 0 to 5?

Data: glue/STS-B, the task's folder of https://gluebenchmark.com/tasks.
"""

from mplug2_jax.recipes.api import RunConfig, glue_recipe


def get_config(size: str = "large") -> RunConfig:
    """Return the run at a model size."""
    return glue_recipe("stsb", size)
