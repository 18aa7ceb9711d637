"""Generation on a mesh matches one device, and gathers the decoder once."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mplug2_jax.generation.beam import DecodeOutput
from mplug2_jax.generation.config import SearchConfig
from mplug2_jax.generation.decode import generate
from mplug2_jax.model.config import SpecialTokens
from mplug2_jax.model.mplug2 import Params, define_model
from mplug2_jax.parallel.config import MeshConfig
from mplug2_jax.parallel.mesh import make_mesh
from mplug2_jax.parallel.placement import batch_sharding, make_param_shardings, replicated_sharding
from mplug2_jax.planning.traffic import parse_collectives
from tests.close import assert_close
from tests.runs import small_model

DEFINITION = define_model(dataclasses.replace(small_model(), decoder_layers=2), ("text", "decoder"))
SEARCH = SearchConfig(num_beams=2, max_length=6)
TOKENS = SpecialTokens(begin=1, end=2, mask=3)
BATCH, LENGTH = 8, 5


def decode(params: Params, memory: jax.Array) -> DecodeOutput:
    mask = jnp.ones(memory.shape[:2], bool)
    return generate(DEFINITION.bind(params).decoder, memory, mask, SEARCH, TOKENS)


def make_memory() -> jax.Array:
    return jax.random.normal(jax.random.key(1), (BATCH, LENGTH, DEFINITION.config.width))


@pytest.mark.parametrize("config", [MeshConfig(), MeshConfig(fsdp=4, tensor=2)], ids=["fsdp", "fsdp and tensor"])
def test_a_mesh_matches_one_device_and_gathers_the_decoder_once(config: MeshConfig) -> None:
    params = jax.jit(DEFINITION.init)(jax.random.key(0))
    expected = jax.jit(decode)(params, make_memory())
    mesh = make_mesh(config)
    sharded = jax.device_put(params, make_param_shardings(DEFINITION.shapes, DEFINITION.logical_axes, mesh).shardings)
    with jax.set_mesh(mesh):
        arguments = (sharded, jax.device_put(make_memory(), batch_sharding(mesh)))
        compiled = jax.jit(decode, out_shardings=replicated_sharding(mesh)).lower(*arguments).compile()
        found = compiled(*arguments)
    np.testing.assert_array_equal(found.ids, expected.ids)
    assert_close(found.scores, expected.scores)
    sent = parse_collectives(compiled.as_text(), mesh)
    # The loop over tokens, of unknown trip count, communicates all scores once (on CPUs), and no parameters.
    scores = 4 * BATCH * SEARCH.num_beams * DEFINITION.config.vocab_size
    per_token = [c for c in sent if not c.has_known_count and "fsdp" in c.axes]
    assert any(c.kind == "all-gather" for c in sent if c not in per_token)
    assert sum(c.bytes_sent for c in per_token) <= scores
