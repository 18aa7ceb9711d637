"""Elastic slices: all hosts agree on the slices of a start, whichever are there, and form a smaller cluster."""

import concurrent.futures
import dataclasses
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from data_pipelines.storage.paths import to_path
from mplug2_jax.errors import Preempted, UserError
from mplug2_jax.objectives.config import VlmConfig
from mplug2_jax.parallel.config import MeshConfig
from mplug2_jax.tasks.config import TasksConfig
from mplug2_jax.training.reliability import slices as slices_module
from mplug2_jax.training.reliability.slices import Host, Slices
from tests.runs import small_run, text_run


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slices_module, "POLL_SECONDS", 0.01)


def local(process: int, *, slices: int = 2, hosts: int = 2, attempt: str = "a", **values: str) -> dict[str, str]:
    """Return the environment of ``launch local``."""
    return {
        "JAX_COORDINATOR_ADDRESS": "127.0.0.1:99", "JAX_NUM_PROCESSES": str(slices * hosts),
        "JAX_PROCESS_ID": str(process),
        "MEGASCALE_NUM_SLICES": str(slices), "MEGASCALE_SLICE_ID": str(process // hosts),
        "MPLUG2_MIN_SLICES": "1", "MPLUG2_SLICE_TIMEOUT": "1", "MPLUG2_ATTEMPT": attempt,
    } | values  # fmt: skip


def gke(slice_index: int, host: int, *, slices: int = 2) -> dict[str, str]:
    """Return the environment of a pod with TPUs."""
    names = ",".join(f"run-slice-{slice_index}-{index}.run" for index in range(2))
    return {
        "TPU_WORKER_HOSTNAMES": names, "TPU_WORKER_ID": str(host), "MEGASCALE_NUM_SLICES": str(slices),
        "MEGASCALE_SLICE_ID": str(slice_index), "MEGASCALE_COORDINATOR_ADDRESS": "run-slice-0-0.run:8080",
        "MPLUG2_MIN_SLICES": "1", "MPLUG2_SLICE_TIMEOUT": "1", "MPLUG2_ATTEMPT": "uid-3",
    }  # fmt: skip


def join(folder: Path, environments: Sequence[dict[str, str]]) -> list[Slices]:
    """Join from one thread per host; change the environments."""

    def one(environment: dict[str, str]) -> Slices:
        slices = Slices.detect(environment, folder)
        assert slices is not None
        slices.join(environment, limit=0)
        return slices

    with concurrent.futures.ThreadPoolExecutor(len(environments)) as pool:
        return list(pool.map(one, environments))


def cluster(environment: Mapping[str, str]) -> tuple[str, str]:
    return environment["JAX_NUM_PROCESSES"], environment["JAX_PROCESS_ID"]


def test_all_slices_start_without_waiting_for_the_timeout(tmp_path: Path) -> None:
    environments = [local(i, MPLUG2_SLICE_TIMEOUT="600") for i in range(4)]
    joined = join(tmp_path / "slices", environments)
    assert [each.members for each in joined] == [(0, 1)] * 4
    assert [cluster(each) for each in environments] == [("4", str(i)) for i in range(4)]


@pytest.mark.parametrize("lost", [0, 1])
def test_the_hosts_of_a_remaining_slice_are_the_cluster(tmp_path: Path, lost: int) -> None:
    environments = [local(2 * (1 - lost) + i) for i in range(2)]
    joined = join(tmp_path, environments)
    assert [each.members for each in joined] == [(1 - lost,)] * 2
    assert [cluster(each) for each in environments] == [("2", "0"), ("2", "1")]


def test_an_incomplete_slice_is_not_used_and_waits_for_the_end(tmp_path: Path) -> None:
    environments = [local(i) for i in (0, 1, 2)]
    joined = join(tmp_path, environments)
    assert [each.is_member for each in joined] == [True, True, False]
    spare = threading.Thread(target=joined[2].wait_until_finished)
    spare.start()
    joined[0].finish()
    spare.join(10)
    assert not spare.is_alive()


def test_the_number_of_members_divides_the_number_of_slices(tmp_path: Path) -> None:
    environments = [local(i, slices=4, hosts=1) for i in (0, 2, 3)]
    joined = join(tmp_path, environments)
    assert {each.members for each in joined} == {(0, 2)}
    assert [cluster(each) for each in environments[:2]] == [("2", "0"), ("2", "1")]


def test_a_slice_that_comes_later_asks_for_a_restart_of_all(tmp_path: Path) -> None:
    join(tmp_path, [local(0), local(1)])
    with pytest.raises(Preempted, match="slice 1 is here, and the run has started without it: all slices restart"):
        join(tmp_path, [local(2)])
    again = [local(i, attempt="b") for i in range(4)]
    first, *_ = join(tmp_path, again)
    assert first.members == (0, 1)
    first.remove_earlier()
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_a_start_waits_for_the_least_number_of_slices(tmp_path: Path) -> None:
    few = local(0, slices=4, hosts=1, MPLUG2_MIN_SLICES="2", MPLUG2_SLICE_TIMEOUT="0")
    waiting = threading.Thread(target=join, args=(tmp_path, [few]))
    waiting.start()
    waiting.join(0.3)
    assert waiting.is_alive()
    join(tmp_path, [local(3, slices=4, hosts=1, MPLUG2_MIN_SLICES="2")])
    waiting.join(10)
    assert cluster(few) == ("2", "0")


def test_a_number_of_slices_that_does_not_divide_is_no_minimum(tmp_path: Path) -> None:
    """Of four slices three are there, and at least two are needed: two go on, and never one."""
    environments = [local(i, slices=4, hosts=1, MPLUG2_MIN_SLICES="2") for i in (1, 2, 3)]
    assert {each.members for each in join(tmp_path, environments)} == {(1, 2)}
    one = local(0, slices=4, hosts=1, attempt="b", MPLUG2_MIN_SLICES="2", MPLUG2_SLICE_TIMEOUT="0")
    alone = threading.Thread(target=join, args=(tmp_path, [one]))
    alone.start()
    alone.join(0.3)
    assert alone.is_alive()
    join(tmp_path, [local(3, slices=4, hosts=1, attempt="b", MPLUG2_MIN_SLICES="2")])
    alone.join(10)


def test_only_a_change_of_micro_batches_by_slices_is_forced(tmp_path: Path) -> None:
    slices = Slices(tmp_path, Host.detect(local(0, slices=4, hosts=1)), "a", 2, 1)
    config = text_run(grad_accum_steps=2)
    previous = [dataclasses.replace(config, grad_accum_steps=steps) for steps in (1, 2, 4, 8)]
    assert [slices.matches_scaled_accum_steps(config, each) for each in previous] == [False, True, True, False]


def test_pods_of_gke_get_the_variables_of_the_members(tmp_path: Path) -> None:
    one = [gke(1, host) for host in range(2)]
    join(tmp_path / "one", one)
    assert not any(name.startswith("MEGASCALE") for each in one for name in each)
    two = [gke(index, host, slices=4) for index in (1, 3) for host in range(2)]
    join(tmp_path / "two", two)
    assert {each["MEGASCALE_COORDINATOR_ADDRESS"] for each in two} == {"run-slice-1-0.run:8080"}
    places = [(each["MEGASCALE_NUM_SLICES"], each["MEGASCALE_SLICE_ID"], each["TPU_WORKER_ID"]) for each in two]
    assert places == [("2", "0", "0"), ("2", "0", "1"), ("2", "1", "0"), ("2", "1", "1")]


def test_slices_meet_in_a_bucket(bucket: str) -> None:
    environments = [local(i) for i in range(4)]
    joined = join(to_path(f"{bucket}/runs/one/slices"), environments)
    assert {each.members for each in joined} == {(0, 1)}


def test_other_runs_do_not_look_for_slices(tmp_path: Path) -> None:
    assert Slices.detect({}, tmp_path) is None
    one = gke(0, 0, slices=1)
    assert Slices.detect(one, tmp_path) is None
    without = {name: value for name, value in local(0).items() if name != "MPLUG2_MIN_SLICES"}
    assert Slices.detect(without, tmp_path) is None


@pytest.mark.parametrize("missing", ["MPLUG2_ATTEMPT", "MPLUG2_SLICE_TIMEOUT", "MEGASCALE_SLICE_ID"])
def test_missing_variables_are_named(tmp_path: Path, missing: str) -> None:
    environment = {name: value for name, value in local(0).items() if name != missing}
    with pytest.raises(UserError, match=f"{missing} is not set"):
        Slices.detect(environment, tmp_path)


def test_a_timeout_beyond_the_watchdog_is_refused(tmp_path: Path) -> None:
    slices = Slices(tmp_path, Host.detect(local(0)), "a", 1, 600)
    with pytest.raises(UserError, match=r"--slice-timeout 600 is not less than config.watchdog_timeout=600"):
        slices.join(local(0), limit=600)


def test_fewer_slices_have_the_same_batch_in_more_micro_batches(tmp_path: Path) -> None:
    slices = Slices(tmp_path, Host.detect(local(0, slices=4, hosts=1)), "a", 1, 1)
    config = text_run(grad_accum_steps=2, mesh=MeshConfig(replica=4))
    for members, replica, count in (((0, 1, 2, 3), 4, 2), ((0, 2), 2, 4), ((3,), 1, 8)):
        slices.members = members
        scaled = slices.scale(config)
        assert (scaled.mesh.replica, scaled.grad_accum_steps) == (replica, count)
        rest = dataclasses.replace(scaled, mesh=config.mesh, grad_accum_steps=2)
        assert rest == config
    open_axis = text_run(mesh=MeshConfig(replica=-1, fsdp=1))
    assert slices.scale(open_axis).mesh.replica == -1
    with pytest.raises(UserError, match=r"config.mesh.replica=2 on 4 slices: only replicas may cross slices"):
        slices.scale(text_run(mesh=MeshConfig(replica=2)))


def test_fewer_examples_to_compare_are_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    slices = Slices(tmp_path, Host.detect(local(0)), "a", 1, 1)
    slices.members = (0,)
    slices.scale(small_run(mesh=MeshConfig(replica=-1, fsdp=1), tasks=TasksConfig(vlm=VlmConfig(group_size=4))))
    slices.scale(text_run(mesh=MeshConfig(replica=-1, fsdp=1)))
    mixed, text = (record.getMessage() for record in caplog.records)
    assert mixed == "1 of 2 slices: 2 micro-batches a step, in which contrast and hard negatives compare fewer examples"
    assert text == "1 of 2 slices: 2 micro-batches a step"


def test_a_config_that_would_not_fit_fewer_slices_is_refused_while_all_are_there(tmp_path: Path) -> None:
    config = text_run(batch_size=4, grad_accum_steps=2, mesh=MeshConfig(replica=-1, fsdp=1))
    for minimum in (1, 2):
        slices = Slices(tmp_path, Host.detect(local(0, slices=4, hosts=1)), "a", minimum, 1)
        slices.members = (0, 1, 2, 3)
        if minimum == 2:
            assert slices.scale(config) == config
            continue
        message = r"--min-slices 1: with 1 of 4 slices config.streams.text.data.batch_size=4 is not a multiple of "
        with pytest.raises(UserError, match=message):
            slices.scale(config)
