"""The release's fine-tuning with its quirks: ``released:caption`` or ``released:videoqa``, with ``,tiny`` to try it.

DigitWorld replaces its data, so that the recipe runs anywhere. Recipes of the real data sets have it as a variant, such
as ``msrvtt_qa:large,released``. ``mplug2_jax/recipes/released.py`` lists the quirks; our own recipes have none.
"""

from mplug2_jax.recipes.api import RunConfig, UserError, check_size, did_you_mean, released_recipe

TASKS = ("caption", "videoqa")


def get_config(arg: str = "videoqa") -> RunConfig:
    """Return the run of a task at a model size."""
    task, _, size = arg.partition(",")
    if task not in TASKS:
        raise UserError(f"recipe released:{task}: {did_you_mean(task, TASKS)}")
    if size:
        check_size(size, f"released:{arg}")
    return released_recipe(f"released_{task}", size or "large", task)
