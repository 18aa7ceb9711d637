"""Learning rates: the cosine's endpoints, and the release's schedules against its traces, step by step."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mplug2_jax.training.config import ScheduleConfig
from mplug2_jax.training.optim.schedule import make_schedule
from tests.close import assert_close


def learning_rates(config: ScheduleConfig, peak: float, steps: int, grad_accum_steps: int = 1) -> np.ndarray:
    schedule = make_schedule(config, peak, steps, grad_accum_steps)
    return np.asarray(jax.jit(jax.vmap(schedule))(jnp.arange(steps)))


def test_warm_up_then_cosine() -> None:
    rates = learning_rates(ScheduleConfig(warmup_steps=10, init_lr=1e-6, end_lr=1e-5), 1e-3, 100)
    assert_close(rates[0], 1e-6, 1e-6, scale=1e-3)  # which it warms up to
    assert rates.argmax() == 10
    assert_close(rates[10], 1e-3)
    assert (np.diff(rates[:11]) > 0).all()
    assert (np.diff(rates[10:]) < 0).all()
    assert_close(rates[-1], 1e-5, 0.1)


@pytest.mark.parametrize(
    ("config", "expected"),  # at steps 5, 10, 40, 90, 95
    [
        (ScheduleConfig(kind="constant"), (0.5, 1, 1, 1, 1)),
        (ScheduleConfig(kind="linear", end_lr=0.1), (0.5, 1, 0.7, 0.2, 0.15)),
        (ScheduleConfig(kind="rsqrt"), (0.5, 1, 0.5, 1 / 3, (10 / 95) ** 0.5)),
        (ScheduleConfig(kind="wsd"), (0.5, 1, 1, 1, 1)),
        (ScheduleConfig(kind="wsd", decay_steps=20, end_lr=0.2), (0.5, 1, 1, 0.6, 0.4)),
    ],
    ids=lambda value: value.kind if isinstance(value, ScheduleConfig) else "",
)
def test_what_follows_the_warm_up(config: ScheduleConfig, expected: tuple[float, ...]) -> None:
    rates = learning_rates(dataclasses.replace(config, warmup_steps=10), 1.0, 100)
    assert_close(rates[[5, 10, 40, 90, 95]], np.array(expected))


def test_a_decay_that_begins_at_a_resume_leaves_the_steps_before_it() -> None:
    stable = ScheduleConfig(kind="wsd", warmup_steps=10)
    decaying = learning_rates(dataclasses.replace(stable, decay_steps=20), 1.0, 60)
    assert_close(decaying[:41], learning_rates(stable, 1.0, 100)[:41])
    assert_close(decaying[-1], 1 / 20)


def test_a_run_shorter_than_its_warm_up_still_has_a_schedule() -> None:
    assert np.isfinite(learning_rates(ScheduleConfig(warmup_steps=100), 1e-3, 5)).all()
    assert np.isfinite(learning_rates(ScheduleConfig(warmup_steps=100), 1e-3, 1)).all()


@pytest.mark.parametrize("trace", range(4))
def test_the_released_schedules_equal_the_release(reference: Path, trace: int) -> None:
    golden = json.loads((reference / "goldens" / "recipe.json").read_text())["lr"][trace]
    config = ScheduleConfig(
        kind="released" if golden["task"] == "videoqa" else "released_caption", warmup_steps=golden["warmup"],
        init_lr=golden["warmup_lr"], end_lr=golden["min_lr"], steps_per_epoch=golden["steps_per_epoch"],
    )  # fmt: skip
    expected = np.array(golden["lr_at_step"])
    for group, peak in enumerate(golden["base_lr"]):
        assert_close(learning_rates(config, peak, len(expected)), expected[:, group])


def test_with_two_micro_batches_a_step_has_every_second_rate_of_the_release(reference: Path) -> None:
    golden = json.loads((reference / "goldens" / "recipe.json").read_text())["lr"][2]
    config = ScheduleConfig(
        kind="released_caption", warmup_steps=200, init_lr=1e-6, end_lr=1e-6,
        steps_per_epoch=golden["steps_per_epoch"] // 2,
    )  # fmt: skip
    expected = np.array(golden["lr_at_step"])[1::2, 0]
    assert_close(learning_rates(config, golden["base_lr"][0], len(expected), 2), expected)
