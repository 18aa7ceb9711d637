"""Faults inside a run: skipped updates, rollbacks, a full disk, corrupt devices; and replay after them."""

import dataclasses
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data_pipelines.config import BatchStage
from data_pipelines.storage.jsonl import read_jsonl
from mplug2_jax.config import build, to_dict
from mplug2_jax.errors import UserError
from mplug2_jax.inference.replay import replay_step
from mplug2_jax.launch.local import find_free_port
from mplug2_jax.model.config import SpecialTokens
from mplug2_jax.parallel.config import MeshConfig
from mplug2_jax.parallel.mesh import make_mesh
from mplug2_jax.training import loop
from mplug2_jax.training.checkpoint.metadata import DataPosition
from mplug2_jax.training.config import CheckpointConfig, FaultConfig, RunConfig
from mplug2_jax.training.loop import open_streams, train
from mplug2_jax.training.reliability.faults import FaultDetector, apply_later_rollbacks
from mplug2_jax.training.reliability.sdc_check import CorruptionError, SdcCheck, check_same_bits, rotate_devices
from mplug2_jax.training.state import make_run_spec
from mplug2_jax.training.step import make_train_step
from mplug2_jax.training.telemetry.events import EventLog, read_events
from mplug2_jax.training.telemetry.metric_log import read_step_lines, read_train_metrics
from mplug2_jax.training.telemetry.monitor import TrainMonitor
from mplug2_jax.training.workdir import WorkDir
from tests.close import assert_close
from tests.runs import text_run
from tests.scrape import scrape


@pytest.fixture(scope="module")
def compiled() -> Iterator[Any]:
    """Return the step of :func:`text_run`, compiled once for all runs of this module."""
    steps: dict[Any, Any] = {}

    def once(spec: Any) -> Any:
        return steps.setdefault(tuple(spec.mesh.shape.items()), make_train_step(spec))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_train_step", once)
        patch.setattr("mplug2_jax.inference.replay.make_train_step", once)
        patch.setattr("mplug2_jax.training.telemetry.monitor.TrainMonitor.compile", lambda *args: None)
        yield once


class _NumberedBatches(dict[str, Any]):
    """Batches that know their number in the order of the data."""

    number: int


def inject_faults(monkeypatch: pytest.MonkeyPatch, seen: list[int], scales: dict[int, float]) -> None:
    """Scale the losses of some batches, by their number in the order of the data."""
    load_batches = loop.device_batches

    def numbered(streams: Any, mesh: Any, start: int) -> Any:
        for i, item in enumerate(load_batches(streams, mesh, start)):
            batches = _NumberedBatches(item[0])
            batches.number = start + i
            yield batches, item[1]

    class FaultyStep(SdcCheck):
        def __call__(self, step: int, state: Any, batches: Any) -> Any:
            seen.append(batches.number)
            state, metrics = super().__call__(step, state, dict(batches))
            return state, metrics | {"loss": metrics["loss"] * scales.get(batches.number, 1.0)}

    monkeypatch.setattr(loop, "device_batches", numbered)
    monkeypatch.setattr(loop, "SdcCheck", FaultyStep)


@pytest.mark.slow
def test_a_spike_rolls_back_and_skips_its_data_and_replay_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: Any
) -> None:
    """Batch 4, which step 5 sees, spikes after a checkpoint of step 4: batch 4 is skipped, batch 5 is next.

    It is the last one of a ramp of the batch size.
    """
    seen: list[int] = []
    served: list[dict[tuple[str, ...], float]] = []
    port, close = find_free_port(), TrainMonitor.close
    ramp = (BatchStage(last_step=5, batch_size=8),)
    config = text_run(
        batch_size=16, batch_ramp=ramp, steps=7, log_example_ids=True, metrics_port=port,
        faults=FaultConfig(spike_zscore=6.0, spike_window=3),
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainMonitor, "close", lambda self: (served.append(scrape(port)[1]), close(self))[1])
        inject_faults(patch, seen, {4: 100.0})
        train(config, tmp_path / "run")
    (values,) = served
    assert (values["mplug2_step",], values["mplug2_events_total", "rolled_back"]) == (7, 1)
    assert seen == [0, 1, 2, 3, 4, 5, 5, 6, 7]  # a step was in flight when the spike was seen
    lines = read_train_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 8))
    (event,) = [line for line in read_events(tmp_path / "run" / "events.jsonl") if line["event"] == "rolled_back"]
    assert (event["step"], event["to_step"], event["data_offset"]) == (5, 4, 1)
    (fault,) = read_jsonl(tmp_path / "run" / "faults.jsonl")
    assert fault["fault"] == "spike"
    assert len(fault["examples"]) == 8
    steady = open_streams(text_run(batch_size=8), WorkDir(tmp_path / "run").load_tokenizer(config))
    batches = itertools.islice(loop.device_batches(steady, make_mesh(MeshConfig()), 0), 11)
    ids = [batch["text"]["example_id"].tolist() for batch, _ in batches]
    found = [line["text"] for line in read_step_lines(tmp_path / "run" / "examples.jsonl")]
    assert found == [*ids[:4], *(ids[i] + ids[i + 1] for i in (5, 7, 9))]
    again = replay_step(WorkDir(tmp_path / "run"), 7, num_ranked=2)
    assert (again.batch, again.start_step) == (7, 6)
    assert again.recorded
    assert again.differences == {}
    assert len(again.contributions) == 2
    early = replay_step(WorkDir(tmp_path / "run"), 2, num_ranked=1)
    assert (early.batch, early.start_step, early.differences) == (1, 0, {})
    assert_close(sum(part.share for part in again.contributions), 1.0)


def spec_of(config: RunConfig, devices: int = 1) -> Any:
    return make_run_spec(
        config, SpecialTokens(begin=1, end=2, mask=3), make_mesh(MeshConfig(), jax.devices()[:devices])
    )


def batch() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {
        "text": {
            "text": jnp.asarray(rng.integers(4, 200, (8, 12)), jnp.int32), "text_mask": jnp.ones((8, 12), bool),
            "example_id": jnp.arange(8, dtype=jnp.int32), "example_mask": jnp.ones(8, jnp.float32),
        }
    }  # fmt: skip


@pytest.fixture(scope="module")
def stepped() -> tuple[Any, Any]:
    spec = spec_of(text_run())
    return spec, make_train_step(spec)


def test_an_update_that_is_not_finite_changes_nothing_but_the_count(stepped: tuple[Any, Any]) -> None:
    spec, step = stepped
    state, metrics = step(spec.init(), batch())
    assert int(metrics["skipped"]) == 0
    before = jax.tree.map(np.asarray, state)
    poisoned = batch()
    poisoned["text"]["example_mask"] = jnp.full(8, jnp.nan, jnp.float32)
    state, metrics = step(state, poisoned)
    assert (int(metrics["skipped"]), int(state["step"])) == (1, 2)
    assert not np.isfinite(float(metrics["loss"]))
    for name in ("params", "opt"):
        jax.tree.map(np.testing.assert_array_equal, state[name], before[name])
    _, metrics = step(state, batch())
    # The schedule counts updates, and the rate that is logged is the one that is used.
    assert_close(metrics["learning_rate/rest"], spec.schedules["rest"](1))


def numbers(loss: float, skipped: int = 0) -> dict[str, jax.Array]:
    return {"loss": jnp.float32(loss), "gradient_norm": jnp.float32(loss), "skipped": jnp.int32(skipped)}


def test_too_many_skipped_steps_in_a_row_stop_the_run(tmp_path: Path) -> None:
    events = EventLog(tmp_path / "events.jsonl")
    detector = FaultDetector(FaultConfig(max_consecutive_skips=2), tmp_path / "faults.jsonl", events)
    assert not detector.observe(1, numbers(np.nan, 1), [])
    assert not detector.observe(2, numbers(1.0), [])
    assert not detector.observe(3, numbers(np.inf, 1), [])
    with pytest.raises(
        UserError, match=r"^2 updates in a row, steps 3 to 4, were skipped .*config.faults.max_consecutive_skips"
    ):
        detector.observe(4, numbers(np.nan, 1), [])
    lines = read_jsonl(tmp_path / "faults.jsonl")
    assert [line["step"] for line in lines] == [1, 3, 4]
    assert lines[0]["metrics"] == ["gradient_norm", "loss"]


def test_a_run_that_spikes_again_and_again_stops(tmp_path: Path) -> None:
    detector = FaultDetector(
        FaultConfig(max_rollbacks=2), tmp_path / "faults.jsonl", EventLog(tmp_path / "events.jsonl")
    )
    saved = now = DataPosition(4, {})
    for _ in range(2):
        now = detector.roll_back(6, saved, now)
    assert now.offsets == ((4, 4),)
    assert apply_later_rollbacks(saved, tmp_path / "events.jsonl") == now
    with pytest.raises(UserError, match="rolled back 2 times to step 4"):
        detector.roll_back(6, saved, now)


def test_offsets_of_several_rollbacks_add_up() -> None:
    position = DataPosition(10, {}).after_rollback(13)
    assert [position.batch_index(step) for step in (10, 11, 12)] == [9, 13, 14]
    later = dataclasses.replace(position, step=20).after_rollback(21)
    assert [later.batch_index(step) for step in (10, 11, 20, 21)] == [9, 13, 22, 24]
    assert build(DataPosition, json.loads(json.dumps(to_dict(later)))) == later


def test_a_full_disk_stops_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog, compiled: Any) -> None:
    from mplug2_jax.training.checkpoint import checkpoints

    plain = checkpoints.ocp.CheckpointManager.save

    def full(self: Any, step: int, **how: Any) -> bool:
        if step == 4:
            raise OSError(28, "No space left on device")
        return plain(self, step, **how)

    monkeypatch.setattr(checkpoints.ocp.CheckpointManager, "save", full)
    monkeypatch.setattr(checkpoints, "RETRY_SECONDS", 0.0)
    train(text_run(steps=5, checkpoint=CheckpointConfig(every_steps=2)), tmp_path / "run")
    assert "saving the checkpoint of step 4 failed" in caplog.text
    kept = sorted(int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir() if p.name.isdecimal())
    assert kept == [2, 5]
    names = [line["event"] for line in read_events(tmp_path / "run" / "events.jsonl")]
    assert [name for name in names if name.startswith("save")] == ["saved", "save_failed", "saved"]


def test_a_bit_that_differs_names_its_device() -> None:
    mesh = make_mesh(MeshConfig(fsdp=8))
    rotated = rotate_devices(mesh)
    spec = jax.sharding.PartitionSpec("fsdp")
    rows = np.arange(32, dtype=np.float32).reshape(8, 4)

    def on(mesh: Any, broken: int | None) -> dict[str, jax.Array]:
        sharding = jax.sharding.NamedSharding(mesh, spec)

        def shard(device: Any, index: Any) -> jax.Array:
            part = rows[index].copy()
            if device.id == broken:
                part.view(np.uint32)[0, 1] ^= 1
            return jax.device_put(part, device)

        parts = [shard(d, i) for d, i in sharding.addressable_devices_indices_map(rows.shape).items()]
        return {"w": jax.make_array_from_single_device_arrays(rows.shape, sharding, parts)}

    check_same_bits(3, on(mesh, None), on(rotated, None))
    with pytest.raises(CorruptionError, match=r"step 3 was repeated .* different bits in w; device \S*5 of process 0"):
        check_same_bits(3, on(mesh, 5), on(rotated, 5))
    with pytest.raises(CorruptionError, match="one of these"):
        check_same_bits(3, on(mesh, 5), on(rotated, None))


@pytest.mark.slow
def test_a_run_that_is_checked_for_sdc_on_rotated_devices_gives_the_same_bits(tmp_path: Path) -> None:
    train(text_run(steps=3, faults=FaultConfig(sdc_check_every=2), mesh=MeshConfig(fsdp=2, data=4)), tmp_path / "run")
    assert len(read_train_metrics(tmp_path / "run" / "metrics.jsonl")) == 3
