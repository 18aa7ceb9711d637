"""Exponential moving averages of parameters."""

import jax
import jax.numpy as jnp
import numpy as np

from mplug2_jax.objectives.config import DistillationConfig
from mplug2_jax.objectives.ema import ema_update
from tests.close import assert_close


def make_params(value):
    return {"text": {"words": jnp.full((2, 3), value)}, "fusion": {"layers": {"kernel": jnp.full(4, value)}}}


def test_the_average_moves_by_1_minus_momentum():
    update = jax.jit(lambda t, s: ema_update(t, s, 0.9))
    teacher, student = make_params(0.0), make_params(1.0)
    for step in range(1, 4):
        teacher = update(teacher, student)
        assert_close(teacher, make_params(1 - 0.9**step))


def test_frozen_parts_are_unchanged():
    updated = ema_update(make_params(0.0), make_params(1.0), 0.5, frozen=("fusion",))
    np.testing.assert_array_equal(updated["fusion"]["layers"]["kernel"], 0)
    np.testing.assert_array_equal(updated["text"]["words"], 0.5)


def test_only_the_releases_form_freezes_fusion():
    assert DistillationConfig(average_fusion=False).frozen == ("fusion",)
    assert DistillationConfig().frozen == ()


def test_an_average_of_some_parts():
    updated = ema_update({"text": make_params(0.0)["text"]}, make_params(1.0), 0.75)
    assert_close(updated, {"text": make_params(0.25)["text"]})
