"""Cluster detection: every supported environment, and errors for incomplete ones."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mplug2_jax.errors import UserError
from mplug2_jax.parallel.processes import (
    DEFAULT_PORT,
    Cluster,
    all_processes,
    allgather_objects,
    any_process,
    check_same_across_processes,
    detect_cluster,
)

NAMED = {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
JOBSET = {
    "JOBSET_NAME": "run", "REPLICATED_JOB_NAME": "workers", "JOB_COMPLETION_INDEX": "5", "JAX_NUM_PROCESSES": "8"
}  # fmt: skip
SLURM = {
    "SLURM_JOB_ID": "4097", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "2", "SLURM_PROCID": "7",
    "SLURM_LOCALID": "3", "SLURM_STEP_NODELIST": "node[003-4,9]",
}  # fmt: skip
TPU = {"TPU_WORKER_HOSTNAMES": "t0,t1", "TPU_WORKER_ID": "1"}
SLICES = TPU | {
    "MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1", "MEGASCALE_COORDINATOR_ADDRESS": "run-slice-0-0.run"
}  # fmt: skip


def without(environment: dict[str, str], name: str) -> dict[str, str]:
    return {key: value for key, value in environment.items() if key != name}


@pytest.mark.parametrize(
    ("environment", "tpu", "cluster"),
    [
        ({}, False, None),
        (TPU, False, None),  # a TPU host whose TPUs are not used
        (NAMED, False, Cluster("environment", "10.0.0.1:1234", 4, 3)),
        (TPU | JOBSET | SLURM | NAMED, True, Cluster("environment", "10.0.0.1:1234", 4, 3)),
        (JOBSET, False, Cluster("JobSet run", f"run-workers-0-0.run:{DEFAULT_PORT}", 8, 5)),
        (without(JOBSET, "JAX_NUM_PROCESSES") | TPU, True, Cluster("TPU pod")),
        (SLURM, False, Cluster("SLURM job 4097", f"node003:{DEFAULT_PORT + 1}", 8, 7, (3,))),
        (SLURM | {"SLURM_STEP_NUM_NODES": "8"}, False, Cluster("SLURM job 4097", f"node003:{DEFAULT_PORT + 1}", 8, 7)),
        (SLURM | {"CUDA_VISIBLE_DEVICES": "3"}, False, Cluster("SLURM job 4097", f"node003:{DEFAULT_PORT + 1}", 8, 7)),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, False, None),
        (without(SLURM, "SLURM_STEP_NUM_TASKS"), False, None),  # a batch script, not a step
        ({}, True, Cluster("TPU metadata")),
        (SLICES, True, Cluster("TPU pod")),
        (TPU | {"MEGASCALE_NUM_SLICES": "1"}, True, Cluster("TPU pod")),
        ({"TPU_PROCESS_ADDRESSES": "t0:1,t1:1", "TPU_WORKER_ID": "1"}, True, Cluster("TPU pod")),
    ],
)
def test_detected_clusters(environment: dict[str, str], tpu: bool, cluster: Cluster | None) -> None:
    assert detect_cluster(environment, tpu=tpu) == cluster


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (without(NAMED, "JAX_COORDINATOR_ADDRESS"), "JAX_NUM_PROCESSES=4 is set, but JAX_COORDINATOR_ADDRESS is not"),
        ({"JAX_PROCESS_ID": "0"}, "JAX_PROCESS_ID=0 is set, but JAX_COORDINATOR_ADDRESS is not; set all or none"),
        (without(NAMED, "JAX_NUM_PROCESSES"), "JAX_NUM_PROCESSES is not set, but related variables are"),
        (without(NAMED, "JAX_PROCESS_ID"), "JAX_PROCESS_ID is not set, but related variables are"),
        (NAMED | {"JAX_NUM_PROCESSES": "four"}, "JAX_NUM_PROCESSES=four is not a whole number"),
        (NAMED | {"JAX_PROCESS_ID": "-1"}, "JAX_PROCESS_ID=-1 is not a whole number"),
        (NAMED | {"JAX_PROCESS_ID": "4"}, "environment: process id 4 is out of range for 4 processes; expected 0 to 3"),
        (
            NAMED | {"JAX_COORDINATOR_ADDRESS": "10.0.0.1"},
            "JAX_COORDINATOR_ADDRESS=10.0.0.1 is invalid; expected HOST:PORT",
        ),
        (without(JOBSET, "REPLICATED_JOB_NAME"), "REPLICATED_JOB_NAME is not set"),
        (without(JOBSET, "JOB_COMPLETION_INDEX"), "JOB_COMPLETION_INDEX is not set"),
        (without(JOBSET, "JAX_NUM_PROCESSES"), "JAX_NUM_PROCESSES is not set"),
        (without(SLURM, "SLURM_PROCID"), "SLURM_PROCID is not set"),
        (SLURM | {"SLURM_STEP_NODELIST": "[1-2]"}, r"SLURM_STEP_NODELIST=\[1-2\] names no node"),
    ],
)
def test_invalid_environments_are_refused(environment: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        detect_cluster(environment)


def test_an_incomplete_tpu_pod_is_refused() -> None:
    with pytest.raises(UserError, match="TPU_WORKER_ID=1 is set, but TPU_WORKER_HOSTNAMES is not; set both or none"):
        detect_cluster(without(TPU, "TPU_WORKER_HOSTNAMES"), tpu=True)
    with pytest.raises(UserError, match="TPU_WORKER_ID is not set"):
        detect_cluster(without(TPU, "TPU_WORKER_ID"), tpu=True)
    with pytest.raises(UserError, match="TPU pod: process id 2 is out of range for 2"):
        detect_cluster(TPU | {"TPU_WORKER_ID": "2"}, tpu=True)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (without(SLICES, "MEGASCALE_SLICE_ID"), "MEGASCALE_SLICE_ID is not set, but related variables are"),
        (without(SLICES, "MEGASCALE_COORDINATOR_ADDRESS"), "MEGASCALE_COORDINATOR_ADDRESS is not set"),
        (SLICES | {"MEGASCALE_SLICE_ID": "2"}, "TPU slices: process id 2 is out of range for 2"),
        (SLICES | {"MEGASCALE_NUM_SLICES": "two"}, "MEGASCALE_NUM_SLICES=two is not a whole number"),
    ],
)
def test_incomplete_slice_variables_are_refused(environment: dict[str, str], message: str) -> None:
    """JAX would take each for slice 0 and wait forever."""
    with pytest.raises(UserError, match=message):
        detect_cluster(environment, tpu=True)


@given(
    st.sampled_from([NAMED, JOBSET, SLURM]).flatmap(
        lambda complete: st.fixed_dictionaries(
            {}, optional={key: st.just(v) | st.text("0a[,:-") for key, v in complete.items()}
        )
    )
)
def test_any_environment_is_a_cluster_or_an_error(environment: dict[str, str]) -> None:
    with contextlib.suppress(UserError):
        cluster = detect_cluster(environment)
        assert cluster is None or (
            cluster.num_processes and cluster.process_id is not None and cluster.process_id < cluster.num_processes
        )


def test_collectives_of_a_single_process() -> None:
    assert allgather_objects({"a": [1, None]}) == [{"a": [1, None]}]
    check_same_across_processes({"a": 1})
    assert [(all_processes(holds), any_process(holds)) for holds in (True, False)] == [(True, True), (False, False)]
