"""A task of DigitWorld for what the demo has pretrained, as ``digitworld:image_question``.

``mplug2 demo tasks`` runs all of them.
"""

from ml_collections import ConfigDict

from mplug2_jax.recipes.digitworld import digitworld


def get_config(task: str = "image_question") -> ConfigDict:
    """The whole run."""
    return digitworld(task)
