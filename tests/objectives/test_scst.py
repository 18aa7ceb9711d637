"""Self-critical sequence training against a plain REINFORCE, in a model with every layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mplug2_jax.errors import UserError
from mplug2_jax.generation.config import SearchConfig
from mplug2_jax.generation.decode import generate
from mplug2_jax.model.config import SpecialTokens, model_config
from mplug2_jax.model.mplug2 import define_model
from mplug2_jax.objectives.cider import cider_d, uniform_frequencies
from mplug2_jax.objectives.config import ScstConfig
from mplug2_jax.objectives.forward import ForwardPass, named_key
from mplug2_jax.objectives.scst import advantages
from mplug2_jax.tasks.base import TaskContext
from mplug2_jax.tasks.config import TasksConfig
from mplug2_jax.tasks.table import TASKS
from tests.close import CHAIN, assert_close

EXAMPLES, SAMPLES, LENGTH, VOCABULARY = 3, 4, 6, 8
MODEL = model_config(
    "tiny", dtype="float32", width=16, heads=2, mlp_width=16, vision_width=16, vision_heads=2, vision_layers=1,
    image_size=8, text_layers=1, universal_layers=1, decoder_layers=1, num_latents=2, vocab_size=VOCABULARY,
    max_positions=8, dropout=0.3,
)  # fmt: skip
TASK, RNG = TASKS["scst"], jax.random.key(3)
CONTEXT = TaskContext(
    config=TasksConfig(scst=ScstConfig(num_samples=SAMPLES)), tokens=SpecialTokens(begin=1, end=2, mask=3)
)


@pytest.fixture(scope="module")
def model():
    model_def = define_model(MODEL, TASK.parts)
    rng = np.random.default_rng(0)
    return model_def, jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape) * 0.3, s.dtype), model_def.shapes)


def make_batch(ids=range(EXAMPLES)):
    """Make images with two references each, by example id."""
    rngs = [np.random.default_rng(i) for i in ids]
    references = np.stack([rng.integers(4, VOCABULARY, size=(2, LENGTH)) for rng in rngs]).astype(np.int32)
    references[..., 0], references[..., -1] = CONTEXT.tokens.begin, CONTEXT.tokens.end
    frames = np.stack([rng.integers(0, 256, size=(1, 8, 8, 3)) for rng in rngs]).astype(np.uint8)
    return jax.device_put({"frames": frames, "references": references, "example_id": np.asarray(ids, np.int32)})


def sample_captions(model, batch):
    """Sample the captions of a training step."""
    model_def, params = model
    bound, search = (
        model_def.bind(params),
        SearchConfig(num_beams=SAMPLES, min_length=0, max_length=LENGTH - 1, top_p=1.0),
    )
    memory, key = ForwardPass(bound, batch).caption_memory, named_key(RNG, "scst")
    return generate(bound.decoder, *memory, search, CONTEXT.tokens, batch["example_id"], key=key)


def test_the_gradient_is_that_of_reinforce(model):
    """Check that neither sampling nor the loss uses dropout, although the model has it."""
    model_def, params = model
    batch = make_batch()
    output = jax.jit(lambda p: sample_captions((model_def, p), batch))(params)
    ids, lengths = np.asarray(output.ids), np.asarray(output.lengths)
    reward = jax.jit(lambda ids: cider_d(ids, batch["references"], uniform_frequencies(), CONTEXT.tokens))
    rewards = np.asarray(reward(output.ids))
    assert rewards.std(1).min() > 0

    def reinforce(params):
        bound = model_def.bind(params)
        memory, memory_mask = (jnp.repeat(x, SAMPLES, axis=0) for x in ForwardPass(bound, batch).caption_memory)
        logits = bound.decoder(jnp.asarray(ids.reshape(-1, ids.shape[-1])), None, memory, memory_mask)
        log_probs = jax.nn.log_softmax(logits).reshape(*ids.shape, VOCABULARY)
        sampled = jnp.take_along_axis(log_probs[:, :, :-1], ids[:, :, 1:, None], axis=-1)[..., 0]
        sampled = jnp.where(np.arange(1, ids.shape[-1]) < lengths[..., None], sampled, 0.0).sum(-1)
        baselines = (rewards.sum(1, keepdims=True) - rewards) / (SAMPLES - 1)
        return -((rewards - baselines) * sampled).sum() / (lengths - 1).sum()

    def scst(params):
        result = TASK.loss(ForwardPass(model_def.bind(params), batch, RNG), CONTEXT)
        return result.loss, result.metrics

    (loss, metrics), grads = jax.jit(jax.value_and_grad(scst, has_aux=True))(params)
    expected, expected_grads = jax.jit(jax.value_and_grad(reinforce))(params)
    assert_close(loss, expected, CHAIN)
    assert_close(metrics["reward"], 100 * rewards.mean())
    assert_close(metrics["length"], (lengths - 1).mean())
    assert max(float(abs(g).max()) for g in jax.tree.leaves(grads)) > 1e-3
    assert_close(grads, expected_grads, CHAIN)


def test_samples_of_an_example_do_not_depend_on_its_batch(model):
    model_def, params = model
    sample = jax.jit(lambda batch: sample_captions((model_def, params), batch))
    three, two = sample(make_batch((0, 1, 2))), sample(make_batch((5, 2)))
    np.testing.assert_array_equal(three.ids[2], two.ids[1])
    assert (np.asarray(three.ids[0]) != np.asarray(three.ids[1])).any()


def test_padding_has_no_effect(model):
    model_def, params = model
    compute_metrics = jax.jit(lambda batch: TASK.loss(ForwardPass(model_def.bind(params), batch, RNG), CONTEXT).metrics)
    unpadded, padded = make_batch((0, 1)), make_batch((0, 1, 2)) | {"example_mask": jnp.asarray([True, True, False])}
    assert_close(compute_metrics(padded), compute_metrics(unpadded), CHAIN)


def test_the_baseline_is_the_mean_of_the_other_samples():
    assert_close(advantages(jnp.asarray([[1.0, 2.0, 6.0], [3.0, 3.0, 3.0]])), [[-3, -1.5, 4.5], [0] * 3])


@pytest.mark.parametrize(("field", "value"), [("num_samples", 1), ("num_documents", 0)])
def test_settings_out_of_range_are_refused(field, value):
    with pytest.raises(UserError, match=f"config.tasks.scst.{field}"):
        ScstConfig(**{field: value})
