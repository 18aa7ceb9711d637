import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mplug2_jax.model.config import model_config
from mplug2_jax.model.mplug2 import define
from mplug2_jax.model.taps import Taps
from mplug2_jax.parallel.mesh import MeshConfig, make_mesh
from mplug2_jax.parallel.placement import place_parameters

CAPTION = ("vision", "temporal", "universal", "decoder")
QUESTION = ("vision", "temporal", "text", "universal", "fusion", "decoder")
EVERYTHING = (*QUESTION, "mlm", "contrastive", "matching")


@pytest.mark.parametrize(
    ("size", "parts", "count"),
    [
        ("base", QUESTION, 379_952_442),
        ("large", QUESTION, 1_031_533_370),
        ("base", CAPTION, 256_881_210),
        ("large", CAPTION, 621_853_498),
    ],
)
def test_parameters_are_those_that_the_releases_loss_gradient_reaches(size, parts, count):
    assert define(model_config(size), parts).count() == count


@pytest.mark.parametrize(
    ("parts", "present", "absent"),
    [
        (("text", "universal", "mlm"), {"text", "universal", "mlm"}, {"latents", "cross_attention", "visual_norm"}),
        (("vision", "universal", "classifier"), {"vision", "universal", "latents"}, {"temporal_1", "decoder", "text"}),
        (CAPTION, {"temporal_1", "decoder"}, {"text", "fusion", "contrastive"}),
    ],
)
def test_what_a_task_does_not_use_is_not_created(parts, present, absent):
    shapes = define(model_config("tiny", num_classes=10), parts).shapes
    keys = {str(key.key) for path, _ in jax.tree_util.tree_leaves_with_path(shapes) for key in path}
    assert present <= keys
    assert not absent & keys


def test_every_parameter_names_every_axis():
    definition = define(model_config("tiny", num_classes=10), (*EVERYTHING, "classifier"))
    is_axes = lambda x: isinstance(x, tuple)  # noqa: E731
    axes = jax.tree.leaves(definition.axes, is_leaf=is_axes)
    shapes = jax.tree.leaves(definition.shapes)
    assert [len(a) for a in axes] == [len(s.shape) for s in shapes]


def test_computing_in_16_bits_keeps_parameters_in_32():
    definition = define(model_config("tiny", dtype="bfloat16", dropout=0.0), QUESTION)
    params = jax.jit(definition.init)(jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    images = jnp.zeros((1, 1, 32, 32, 3), jnp.uint8)
    tokens = jax.eval_shape(lambda p: definition.bind(p).visual_tokens(images), params)
    assert tokens.dtype == jnp.bfloat16


def test_16_bit_compute_is_near_32_bit_compute():
    params = jax.jit(define(model_config("tiny"), CAPTION).init)(jax.random.key(0))
    clip = jax.random.randint(jax.random.key(1), (2, 3, 32, 32, 3), 0, 256).astype(jnp.uint8)

    def tokens(dtype):
        definition = define(model_config("tiny", dtype=dtype), CAPTION)
        return jax.jit(lambda p: definition.bind(p).visual_tokens(clip))(params)

    np.testing.assert_allclose(tokens("bfloat16").astype(jnp.float32), tokens("float32"), atol=0.1)


def test_taps_hold_what_was_asked_for_and_change_nothing():
    definition = define(model_config("tiny", dtype="float32"), CAPTION)
    params = jax.jit(definition.init)(jax.random.key(0))
    clip = jnp.ones((1, 2, 32, 32, 3))
    taps = Taps(["vision/block", "visual/out"])
    out = definition.bind(params).visual_tokens(clip, taps=taps)
    assert set(taps) == {"vision/block", "visual/out"}
    assert taps["vision/block"].shape == (4, 2, 17, 128)
    np.testing.assert_array_equal(taps["visual/out"], out)

    def program(taps):
        return str(jax.make_jaxpr(lambda p: definition.bind(p).visual_tokens(clip, taps=taps))(params))

    assert program(None) == program(Taps([]))


def test_parameters_are_made_in_their_shards():
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    definition = define(model_config("tiny"), QUESTION)
    placed = place_parameters(definition.shapes, definition.axes, mesh)
    make = jax.jit(definition.init, out_shardings=placed.shardings)
    params = make(jax.random.key(0))
    for sharded, single in zip(
        jax.tree.leaves(params), jax.tree.leaves(jax.jit(definition.init)(jax.random.key(0))), strict=True
    ):
        np.testing.assert_array_equal(sharded, single)
    kernel = params["vision"]["blocks"]["mlp"]["up"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (4, 128 // 4, 512 // 2)


@pytest.mark.slow
def test_a_large_model_is_never_whole_on_one_chip():
    from tests.tpu import topology_mesh

    mesh = topology_mesh("v5p:2x2x2", MeshConfig())
    definition = define(model_config("large"), QUESTION)
    placed = place_parameters(definition.shapes, definition.axes, mesh)
    key = jax.eval_shape(lambda: jax.random.key(0))
    with jax.set_mesh(mesh):
        compiled = jax.jit(definition.init, out_shardings=placed.shardings).lower(key).compile()
    memory = compiled.memory_analysis()
    whole = 4 * definition.count()
    assert memory.output_size_in_bytes < 1.1 * whole / 8
    assert memory.temp_size_in_bytes < 0.1 * whole


def test_official_names_of_the_large_release_are_all_accounted_for(reference):
    """Every name of the released files is in use, tied, dead for a stated reason, or the teacher's."""
    from mplug2_jax.conversion.official import TIED, dead_rules, slots, student_name

    for size, fusion_start in (("base", 9), ("large", 18)):
        for task, parts in (("caption", CAPTION), ("videoqa", QUESTION)):
            listing = json.loads((reference / f"state_dict_{task}_{size}.json").read_text())
            shapes = {row["name"]: row["shape"] for row in listing}
            used = {slot.name for slot in slots(model_config(size), parts, fusion_start)}
            rules = dead_rules(model_config(size), parts, fusion_start)
            assert used <= set(shapes)
            unexplained = [
                name for name in map(student_name, shapes)
                if name not in used and name not in TIED and not any(rule.fullmatch(name) for rule, _ in rules)
            ]  # fmt: skip
            assert not unexplained
            total = sum(int(np.prod(shapes[name])) for name in used)
            assert total == define(model_config(size), parts).count()
