"""The teacher's moving average."""

import jax
import jax.numpy as jnp
import numpy as np

from mplug2_jax.objectives.config import DistillationConfig
from mplug2_jax.objectives.ema import ema_update
from tests.close import assert_close


def parameters(value):
    return {"text": {"words": jnp.full((2, 3), value)}, "fusion": {"layers": {"kernel": jnp.full(4, value)}}}


def test_the_teacher_moves_towards_the_student_by_what_momentum_leaves():
    update = jax.jit(lambda t, s: ema_update(t, s, 0.9))
    teacher, student = parameters(0.0), parameters(1.0)
    for step in range(1, 4):
        teacher = update(teacher, student)
        assert_close(teacher, parameters(1 - 0.9**step))


def test_frozen_parts_stay_as_they_are():
    moved = ema_update(parameters(0.0), parameters(1.0), 0.5, frozen=("fusion",))
    np.testing.assert_array_equal(moved["fusion"]["layers"]["kernel"], 0)
    np.testing.assert_array_equal(moved["text"]["words"], 0.5)


def test_the_released_teachers_fusion_is_frozen_and_ours_is_not():
    assert DistillationConfig(average_fusion=False).frozen == ("fusion",)
    assert DistillationConfig().frozen == ()


def test_a_teacher_of_some_parts_follows_those_alone():
    moved = ema_update({"text": parameters(0.0)["text"]}, parameters(1.0), 0.75)
    assert_close(moved, {"text": parameters(0.25)["text"]})
