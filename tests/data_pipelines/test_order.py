"""The data order: the same for any number of processes and after any restart, every record once per epoch."""

import itertools
from collections import Counter

import grain
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.errors import DataError
from data_pipelines.order import BatchSchedule, HostShards, HostSlice, RecordRef, infinite_shuffled_mixture

SIZES = st.dictionaries(st.sampled_from("abc"), st.integers(1, 2000), min_size=1)


def equal(records: dict[str, int]) -> dict[str, float]:
    return dict.fromkeys(records, 1.0)


def step_of(order, batch_size: int, hosts: list[tuple[int, ...]], start: int, step: int) -> list[RecordRef]:
    """Return the global batch of a step as built by hosts with these shards that started at step ``start``."""
    count = len({part for parts in hosts for part in parts})
    picks = {}
    for parts in hosts:
        shard = HostShards(parts, count)
        rows, numbers = HostSlice(order, BatchSchedule([batch_size]), shard, start), shard.rows(batch_size)
        for place, number in enumerate(numbers):
            picks.setdefault(number, []).append(rows[(step - start) * len(numbers) + place])
    assert all(len(set(same)) == 1 for same in picks.values())
    return [picks[number][0] for number in range(batch_size)]


@settings(max_examples=60)
@given(
    records=SIZES, seed=st.integers(0, 2**31), step=st.integers(0, 10**6), back=st.integers(0, 50),
    multiple=st.integers(1, 3),
    # Neighbouring parts, parts that lie apart, and parts that two hosts hold.
    hosts=st.sampled_from([[(0,), (1,), (2,), (3,)], [(0, 1), (2, 3)], [(0, 3), (1, 2)], [(0, 1), (0, 1), (2,), (3,)]]),
)  # fmt: skip
def test_a_step_is_the_same_for_any_hosts_and_any_restart(records, seed, step, back, multiple, hosts) -> None:
    order = infinite_shuffled_mixture(records, equal(records), stream="s", seed=seed)
    batch_size = 8 * multiple
    alone = step_of(order, batch_size, [(0,)], 0, step)
    again = infinite_shuffled_mixture(records, equal(records), stream="s", seed=seed)
    assert step_of(again, batch_size, hosts, max(0, step - back), step) == alone


RAMPS = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 4)), max_size=4)


@settings(max_examples=60)
@given(ramp=RAMPS, final=st.integers(1, 4), start=st.integers(0, 200), host=st.sampled_from([(0,), (1, 3), (3, 0)]))
def test_batches_of_several_sizes_are_consecutive_slices(ramp, final, start, host) -> None:
    sizes = [4 * size for _, size in ramp] + [4 * final]
    schedule = BatchSchedule(sizes, list(itertools.accumulate(count for count, _ in ramp)))
    expected = [size for (count, _), size in zip(ramp, sizes, strict=False) for _ in range(count)]
    expected += [sizes[-1]] * (260 - len(expected))
    assert [schedule.size(batch) for batch in range(260)] == expected
    firsts = list(itertools.accumulate(expected, initial=0))
    assert [schedule.start(batch) for batch in range(260)] == firsts[:-1]
    found = [schedule.locate(position) for position in range(firsts[-1])]
    assert found == [(batch, row) for batch, size in enumerate(expected) for row in range(size)]
    shards = HostShards(host, 4)
    rows = HostSlice(grain.MapDataset.range(firsts[-1]), schedule, shards, start)
    own = [firsts[batch] + row for batch in range(start, start + 20) for row in shards.rows(expected[batch])]
    assert [rows[i] for i in range(len(own))] == own


@settings(max_examples=30)
@given(length=st.integers(1, 60), seed=st.integers(0, 2**31), epoch=st.integers(0, 1000))
def test_every_epoch_has_every_record_once(length, seed, epoch) -> None:
    order = infinite_shuffled_mixture({"a": length}, {"a": 1.0}, stream="s", seed=seed)
    picks = [order[epoch * length + i] for i in range(length)]
    assert sorted(pick.index for pick in picks) == list(range(length))
    assert {pick.epoch for pick in picks} == {epoch}


def test_epochs_streams_and_seeds_have_different_orders() -> None:
    def order(stream: str, seed: int, epoch: int) -> tuple[int, ...]:
        picks = infinite_shuffled_mixture({"a": 50}, {"a": 1.0}, stream=stream, seed=seed)
        return tuple(picks[50 * epoch + i].index for i in range(50))

    orders = [order("s", 0, 0), order("s", 0, 1), order("s", 1, 0), order("t", 0, 0)]
    assert len(set(orders)) == 4


def test_dropping_the_remainder_keeps_batches_inside_an_epoch() -> None:
    order = infinite_shuffled_mixture({"a": 23}, {"a": 1.0}, stream="s", seed=0, multiple=5)
    for step in range(40):
        picks = [order[step * 5 + i] for i in range(5)]
        assert {pick.epoch for pick in picks} == {step // 4}
        assert len({pick.index for pick in picks}) == 5
    assert {order[i].index for i in range(20 * 30)} == set(range(23)), "every record has its turn in some epoch"


@settings(max_examples=30)
@given(shares=st.lists(st.integers(1, 9), min_size=2, max_size=4), start=st.integers(0, 10**6))
def test_mixtures_are_exact(shares, start) -> None:
    names = "abcd"[: len(shares)]
    weights = dict(zip(names, map(float, shares), strict=True))
    order = infinite_shuffled_mixture(dict.fromkeys(names, 5000), weights, stream="s", seed=0)
    window = 10 * sum(shares)
    counts = Counter(order[start + i].source for i in range(window))
    for name in names:
        assert abs(counts[name] - 10 * weights[name]) <= 0.02 * window + 1


@settings(max_examples=30)
@given(
    weights=st.lists(st.floats(0.01, 9.0), min_size=2, max_size=4), start=st.integers(0, 10**12),
    records=st.integers(1, 50),
)  # fmt: skip
def test_a_mixture_without_stages_is_grains(weights, start, records) -> None:
    names = "abcd"[: len(weights)]
    sizes = dict.fromkeys(names, records)
    order = infinite_shuffled_mixture(sizes, dict(zip(names, weights, strict=True)), stream="s", seed=0)
    alone = [infinite_shuffled_mixture({name: records}, {}, stream="s", seed=0) for name in names]
    mixed = grain.MapDataset.mix(alone, weights)
    assert [order[start + i] for i in range(50)] == [mixed[start + i] for i in range(50)]


STAGES = st.lists(
    st.tuples(st.integers(0, 100), st.lists(st.integers(0, 9), min_size=3, max_size=3).filter(any)),
    min_size=1, max_size=4,
)  # fmt: skip


@settings(max_examples=20)
@given(records=st.lists(st.integers(1, 70), min_size=3, max_size=3), stages=STAGES)
def test_every_source_continues_its_order_when_the_weights_change(records, stages) -> None:
    sizes = dict(zip("abc", records, strict=True))
    starts = list(itertools.accumulate((length for length, _ in stages), initial=0))
    changes = {start: dict(zip("abc", map(float, shares), strict=True))
               for start, (_, shares) in zip(starts, stages, strict=False)}  # fmt: skip
    order = infinite_shuffled_mixture(sizes, equal(sizes), stream="s", seed=1, changes=changes)
    picks = [order[i] for i in range(starts[-1])]
    for name in sizes:
        drawn = [pick for pick in picks if pick.source == name]
        alone = infinite_shuffled_mixture({name: sizes[name]}, {}, stream="s", seed=1)
        assert drawn == [alone[i] for i in range(len(drawn))]
    for start, (length, shares) in zip(starts, stages, strict=False):
        counts = Counter(pick.source for pick in picks[start : start + length])
        for name, share in zip("abc", shares, strict=True):
            assert abs(counts[name] - length * share / sum(shares)) <= (0.01 * length + 2 if share else 0)


def test_the_generator_depends_on_all_its_inputs() -> None:
    def draw(source="a", index=1, epoch=0, seed=0, stream="s", purpose="text") -> float:
        return RecordRef(source, index, epoch).rng(seed, stream, purpose).random()

    variants = [
        draw(), draw(source="b"), draw(index=2), draw(epoch=1), draw(seed=1), draw(stream="t"), draw(purpose="visual")
    ]  # fmt: skip
    assert len(set(variants)) == len(variants)
    assert draw() == variants[0]


def test_a_batch_size_that_is_no_multiple_of_the_shards() -> None:
    with pytest.raises(DataError, match="batch_size=6 is not a multiple of the 4 shards over all hosts"):
        HostShards((0,), 4).rows(6)
