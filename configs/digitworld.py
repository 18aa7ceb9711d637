"""A downstream task of DigitWorld for the model that the demo pretrains, such as ``digitworld:image_question``.

``mplug2 demo tasks`` runs all of them.
"""

from mplug2_jax.recipes.api import RunConfig
from mplug2_jax.recipes.digitworld import digitworld_recipe


def get_config(task: str = "image_question") -> RunConfig:
    """Return the run of a task."""
    return digitworld_recipe(task)
