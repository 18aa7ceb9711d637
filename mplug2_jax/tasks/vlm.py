"""Vision-language matching: does this text match these frames?"""

from mplug2_jax.objectives.forward import ForwardPass, LossOutput
from mplug2_jax.objectives.vlm import vlm_loss
from mplug2_jax.tasks.base import Task, TaskContext
from mplug2_jax.tasks.contracts import CONTRACTS


def loss(forward: ForwardPass, context: TaskContext) -> LossOutput:
    """Compute the binary cross entropy of true pairs and hard negatives."""
    return vlm_loss(forward, context.settings.vlm, context.settings.label_smoothing)


TASK = Task(**vars(CONTRACTS["vlm"]), loss=loss)
