"""The release's own fine-tuning, quirks included: ``released:caption`` or ``released:videoqa``, ``,tiny`` to try it.

DigitWorld stands in for its data, so that it runs anywhere. On the data themselves it is a form of their pages, as
``msrvtt_qa:large,released``; our own recipes have none of the quirks, which ``mplug2_jax/recipes/released.py`` tells.
"""

from ml_collections import ConfigDict

from mplug2_jax.errors import UserError, did_you_mean
from mplug2_jax.recipes.base import check_size
from mplug2_jax.recipes.released import released

TASKS = ("caption", "videoqa")


def get_config(arg: str = "videoqa") -> ConfigDict:
    """The recipe of a task, at one of the sizes of the table."""
    task, _, size = arg.partition(",")
    if task not in TASKS:
        raise UserError(f"recipe released:{task}: {did_you_mean(task, TASKS)}")
    if size:
        check_size(size, f"released:{arg}")
    return released(f"released_{task}", size or "large", task)
