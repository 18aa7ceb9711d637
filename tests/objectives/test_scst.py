"""Self-critical training against REINFORCE by hand, in a model that has every layer."""

import itertools

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
from mplug2_jax.tasks.config import TaskSettings
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
    settings=TaskSettings(scst=ScstConfig(num_samples=SAMPLES)), tokens=SpecialTokens(begin=1, end=2, mask=3)
)


@pytest.fixture(scope="module")
def model():
    definition = define_model(MODEL, TASK.parts)
    rng = np.random.default_rng(0)
    return definition, jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape) * 0.3, s.dtype), definition.shapes)


def batch_of(ids=range(EXAMPLES)):
    """Pictures and two references each, of examples by their ids."""
    rngs = [np.random.default_rng(i) for i in ids]
    references = np.stack([rng.integers(4, VOCABULARY, size=(2, LENGTH)) for rng in rngs]).astype(np.int32)
    references[..., 0], references[..., -1] = CONTEXT.tokens.begin, CONTEXT.tokens.end
    frames = np.stack([rng.integers(0, 256, size=(1, 8, 8, 3)) for rng in rngs]).astype(np.uint8)
    return jax.device_put({"frames": frames, "references": references, "example_id": np.asarray(ids, np.int32)})


def drawn(model, batch):
    """The captions that a step draws."""
    definition, params = model
    bound, search = (
        definition.bind(params),
        SearchConfig(num_beams=SAMPLES, min_length=0, max_length=LENGTH - 1, top_p=1.0),
    )
    memory, key = ForwardPass(bound, batch).caption_memory, named_key(RNG, "scst")
    return generate(bound.decoder, *memory, search, CONTEXT.tokens, batch["example_id"], key=key)


def test_its_gradient_is_reinforce_by_hand(model):
    """Dropout is on, but neither for what is drawn nor for what is learned."""
    definition, params = model
    batch = batch_of()
    found = jax.jit(lambda p: drawn((definition, p), batch))(params)
    ids, lengths = np.asarray(found.ids), np.asarray(found.lengths)
    rewards = np.asarray(cider_d(found.ids, batch["references"], uniform_frequencies(), CONTEXT.tokens))
    assert rewards.std(1).min() > 0

    def by_hand(params):
        bound = definition.bind(params)
        memory, seen = (jnp.repeat(x, SAMPLES, axis=0) for x in ForwardPass(bound, batch).caption_memory)
        logits = bound.decoder(jnp.asarray(ids.reshape(-1, ids.shape[-1])), None, memory, seen)
        chances = jax.nn.log_softmax(logits).reshape(*ids.shape, VOCABULARY)
        total = 0.0
        for b, k in itertools.product(range(EXAMPLES), range(SAMPLES)):
            said = ids[b, k, 1 : lengths[b, k]]
            others = (rewards[b].sum() - rewards[b, k]) / (SAMPLES - 1)
            total -= (rewards[b, k] - others) * chances[b, k, np.arange(len(said)), said].sum()
        return total / (lengths - 1).sum()

    def ours(params):
        outcome = TASK.loss(ForwardPass(definition.bind(params), batch, RNG), CONTEXT)
        return outcome.loss, outcome.metrics

    (loss, metrics), gradients = jax.jit(jax.value_and_grad(ours, has_aux=True))(params)
    expected, hand = jax.jit(jax.value_and_grad(by_hand))(params)
    assert_close(loss, expected, CHAIN)
    assert_close(metrics["reward"], 100 * rewards.mean())
    assert_close(metrics["length"], (lengths - 1).mean())
    assert max(float(abs(g).max()) for g in jax.tree.leaves(gradients)) > 1e-3
    assert_close(gradients, hand, CHAIN)


def test_an_examples_captions_do_not_depend_on_its_neighbours(model):
    whole, other = drawn(model, batch_of((0, 1, 2))), drawn(model, batch_of((5, 2)))
    np.testing.assert_array_equal(whole.ids[2], other.ids[1])
    assert (np.asarray(whole.ids[0]) != np.asarray(whole.ids[1])).any()


def test_padding_counts_for_nothing(model):
    definition, params = model
    measure = jax.jit(lambda batch: TASK.loss(ForwardPass(definition.bind(params), batch, RNG), CONTEXT).metrics)
    alone, padded = batch_of((0, 1)), batch_of((0, 1, 2)) | {"example_mask": jnp.asarray([True, True, False])}
    ours, theirs = measure(alone), measure(padded)
    assert_close(ours, theirs, CHAIN)


def test_a_caption_is_measured_by_the_mean_of_the_others():
    assert_close(advantages(jnp.asarray([[1.0, 2.0, 6.0], [3.0, 3.0, 3.0]])), [[-3, -1.5, 4.5], [0] * 3])


@pytest.mark.parametrize(("field", "value"), [("num_samples", 1), ("num_documents", 0)])
def test_settings_out_of_range_are_refused(field, value):
    with pytest.raises(UserError, match=f"config.tasks.scst.{field}"):
        ScstConfig(**{field: value})
