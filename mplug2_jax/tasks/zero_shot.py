"""Classification without a head: an image or video has the class whose prompts are nearest by contrast.

Prompts are encoded once for all batches. Of wordings of one text, the unit vectors of a class are averaged and
normalized again (Radford et al. 2021, arXiv 2103.00020, section 3.1.4). Where prompts describe different things, an
example is near one of them and far from their average: then the probabilities of a class's prompts are added.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mplug2_jax.model.heads import l2_normalize
from mplug2_jax.model.mplug2 import Mplug2
from mplug2_jax.objectives.contrast import matmul_float32
from mplug2_jax.objectives.forward import DeviceBatch, ForwardPass
from mplug2_jax.parallel.sharding import constrain
from mplug2_jax.tasks import classify
from mplug2_jax.tasks.base import Predictions, Task, TaskContext
from mplug2_jax.tasks.specs import TASK_SPECS


def precompute(model: Mplug2, context: TaskContext) -> Predictions:
    """Return ``class_features`` [c, r, e]: the unit vectors of each class's prompts, or of their mean with r = 1."""
    prompts = context.prompts
    assert prompts is not None

    def encode(ids: Int[Array, "r l"]) -> Float[Array, "r e"]:
        ids = constrain(ids, "batch", None)
        return model.contrastive.text_features(model.encode_text(ids, ids != context.tokens.pad))

    features = jax.lax.map(encode, jnp.asarray(prompts.ids))
    features = features.reshape(-1, features.shape[-1])[: prompts.num_classes * prompts.num_templates]
    features = features.reshape(prompts.num_classes, prompts.num_templates, -1)
    if prompts.pooling == "features":
        features = l2_normalize(features.mean(1))[:, None]
    return {"class_features": features}


def predict(model: Mplug2, batch: DeviceBatch, context: TaskContext) -> Predictions:
    """Return the probability of each class."""
    del context
    visual = model.contrastive.visual_features(ForwardPass(model, batch).visual)
    features = batch["class_features"]
    logits = matmul_float32(visual, features.reshape(-1, features.shape[-1]).T) / model.contrastive.temperature
    probabilities = jax.nn.softmax(logits, axis=-1).reshape(-1, *features.shape[:2])
    return {"probabilities": probabilities.sum(-1)}


TASK = Task(
    **vars(TASK_SPECS["zero_shot"]), averages_views=True, precompute=precompute, predict=predict, score=classify.score
)
