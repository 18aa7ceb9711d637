"""The slowest host is named with its cause if it matters, and is an event after five minutes at twice the median."""

import numpy as np
import pytest

from mplug2_jax.training.telemetry.slow_hosts import (
    EVENT_SECONDS,
    HostTable,
    SlowHost,
    SlowHostRule,
    find_slow_host,
    summarize,
)


def table(num_hosts: int = 4, **rows: tuple[float, float, float]) -> HostTable:
    """Return the measurements of hosts that differ little, but for some: ``p2=(data, step, memory)``."""
    noise = np.random.default_rng(0).uniform(0, 0.02, (num_hosts, 3))
    values = np.array([0.01, 0.05, 0.3]) + noise
    for name, row in rows.items():
        values[int(name[1:])] = row
    return values


@pytest.mark.parametrize("num_hosts", [2, 3, 4, 128])
@pytest.mark.parametrize(
    ("row", "cause"),
    [
        ((0.9, 0.05, 0.3), "data"),
        ((0.02, 0.95, 0.3), "step"),
        ((0.3, 0.4, 0.3), "step"),
        ((0.9, 0.05, 0.95), "memory"),  # a host that swaps is slow in everything
        ((0.01, 0.05, 0.95), "memory"),
    ],
)
def test_the_slowest_host_is_named_with_its_cause(num_hosts: int, row: tuple[float, float, float], cause: str) -> None:
    found = find_slow_host(table(num_hosts, p1=row))
    assert found is not None
    assert (found.process, found.cause) == (1, cause)
    assert found.share == row[["data", "step", "memory"].index(cause)]
    assert found.median_of_others == pytest.approx(
        0.31 if cause == "memory" else 0.02 if cause == "data" else 0.06, abs=0.015
    )


def test_of_two_slow_hosts_the_slower_is_named() -> None:
    found = find_slow_host(table(p0=(0.1, 0.5, 0.3), p3=(0.9, 0.05, 0.3)))
    assert found is not None
    assert (found.process, found.cause) == (3, "data")


@pytest.mark.parametrize(
    "values",
    [
        table(0), table(1), table(1, p0=(0.9, 0.1, 0.9)), table(4), table(128),
        table(p2=(0.1, 0.1, 0.3)),  # twice the others, but little of the step
        table(p2=(0.02, 0.06, 0.7)),  # more memory than the others, but enough is left
        np.full((4, 3), 0.9), np.zeros((4, 3)),
    ],
)  # fmt: skip
def test_hosts_that_do_not_slow_the_others_down_are_not_named(values: HostTable) -> None:
    assert find_slow_host(values) is None


def test_the_message_names_the_straggler_its_share_of_the_step_and_the_median() -> None:
    assert str(SlowHost(1, "data", 0.912, 0.03)) == "waits for data for 91% of a step, the others 3%"
    assert str(SlowHost(1, "step", 0.7, 0.1)) == "works on the host for 70% of a step, the others 10%"
    assert str(SlowHost(1, "memory", 0.95, 0.3)) == "uses 95% of its memory, the others 30%"


SLOW = SlowHost(2, "data", 0.9, 0.1)


def test_five_minutes_at_twice_the_median_are_one_event() -> None:
    rule = SlowHostRule()
    times = [0.0, 100.0, EVENT_SECONDS - 1, EVENT_SECONDS, EVENT_SECONDS + 1, 10 * EVENT_SECONDS]
    assert [rule.observe(SLOW, now) for now in times] == [False, False, False, True, False, False]


@pytest.mark.parametrize(
    "other", [None, SlowHost(2, "data", 0.9, 0.46), SlowHost(3, "data", 0.9, 0.1)], ids=["none", "less", "another"]
)
def test_the_five_minutes_start_again_when_the_host_recovers(other: SlowHost | None) -> None:
    rule = SlowHostRule()
    assert not rule.observe(SLOW, 0.0)
    assert not rule.observe(other, 200.0)
    assert not rule.observe(SLOW, 210.0)
    assert not rule.observe(SLOW, 209 + EVENT_SECONDS)
    assert rule.observe(SLOW, 210 + EVENT_SECONDS)
    assert not rule.observe(other, 1000.0)
    assert not rule.observe(SLOW, 1010.0)
    assert rule.observe(SlowHost(2, "step", 1.0, 0.5), 1010 + EVENT_SECONDS)  # the cause may change


def test_metrics_do_not_grow_with_the_hosts() -> None:
    small, large = (summarize(table(count, p1=(0.9, 0.05, 0.3))) for count in (2, 128))
    assert len(small) == len(large) == 10
    assert (large["hosts/slowest"], large["hosts/data_max"]) == (1, 0.9)
    assert 0.01 <= large["hosts/data_min"] <= large["hosts/data_median"] <= 0.03
