"""The processes of one run: initialization, agreement and exit.

A process joins others only if its environment describes them. :func:`detect_cluster` reads it:

==========================  ================================================================================
set by ``launch local``      ``JAX_COORDINATOR_ADDRESS``, ``JAX_NUM_PROCESSES``, ``JAX_PROCESS_ID``
GKE JobSet                  ``JOBSET_NAME``, ``REPLICATED_JOB_NAME``, ``JOB_COMPLETION_INDEX``, ``JAX_NUM_PROCESSES``
SLURM                       a step of several tasks: ``SLURM_STEP_NUM_TASKS`` and related variables
TPU pod                     ``TPU_WORKER_HOSTNAMES`` and ``TPU_WORKER_ID``, or the metadata server of a TPU machine
several TPU slices          also ``MEGASCALE_NUM_SLICES``, ``_SLICE_ID``, ``_COORDINATOR_ADDRESS``, which JAX reads;
                            for elastic ones see :mod:`mplug2_jax.training.reliability.slices`
==========================  ================================================================================
"""

import dataclasses
import itertools
import json
import operator
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from mplug2_jax import console
from mplug2_jax.errors import UserError
from mplug2_jax.parallel.cpu_cluster import share_cached_programs
from mplug2_jax.parallel.slurm import first_host, local_device_ids

DEFAULT_PORT = 8476
"""Port of the coordinator, unless the environment names one."""


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Arguments of ``jax.distributed.initialize``, and what they were read from. JAX detects those that are None."""

    source: str
    coordinator_address: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    local_device_ids: tuple[int, ...] | None = None  # None: all accelerators of the host


def detect_cluster(environment: Mapping[str, str], *, tpu: bool = False) -> Cluster | None:
    """Return the cluster that the environment describes, or None for a single process.

    Args:
        environment: such as ``os.environ``.
        tpu: whether this host has TPUs that JAX may use.

    Raises:
        UserError: variables that are missing or invalid.
    """
    if "JAX_COORDINATOR_ADDRESS" in environment:
        return _from_jax_variables(environment)
    if "JOBSET_NAME" in environment and not tpu:
        return _from_jobset(environment)
    for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        if name in environment:
            raise UserError(f"{name}={environment[name]} is set, but JAX_COORDINATOR_ADDRESS is not; set all or none")
    # SLURM_JOB_ID is also set in batch scripts and interactive shells; only a step (srun) has tasks.
    if read_int(environment, "SLURM_STEP_NUM_TASKS", default=1) > 1:
        return _from_slurm(environment)
    if tpu:
        return _from_tpu_pod(environment)
    return None


def _from_jax_variables(environment: Mapping[str, str]) -> Cluster:
    address = environment["JAX_COORDINATOR_ADDRESS"]
    if not re.fullmatch(r"\S+:\d{1,5}", address):
        raise UserError(f"JAX_COORDINATOR_ADDRESS={address} is invalid; expected HOST:PORT")
    count, index = (read_int(environment, key) for key in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
    return _check_process_id(Cluster("environment", address, count, index))


def _from_jobset(environment: Mapping[str, str]) -> Cluster:
    name, job = (read_text(environment, key) for key in ("JOBSET_NAME", "REPLICATED_JOB_NAME"))
    count, index = (read_int(environment, key) for key in ("JAX_NUM_PROCESSES", "JOB_COMPLETION_INDEX"))
    return _check_process_id(Cluster(f"JobSet {name}", f"{name}-{job}-0-0.{name}:{DEFAULT_PORT}", count, index))


def _from_slurm(environment: Mapping[str, str]) -> Cluster:
    count, index = (read_int(environment, key) for key in ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"))
    job, nodes = read_int(environment, "SLURM_JOB_ID"), read_text(environment, "SLURM_STEP_NODELIST")
    if not read_int(environment, "SLURM_STEP_NUM_NODES"):
        raise UserError("SLURM_STEP_NUM_NODES=0 must be at least 1")
    read_int(environment, "SLURM_LOCALID")
    # Jobs that share a node need different ports.
    address = f"{first_host(nodes)}:{DEFAULT_PORT + job % 4096}"
    return _check_process_id(Cluster(f"SLURM job {job}", address, count, index, local_device_ids(environment)))


def _from_tpu_pod(environment: Mapping[str, str]) -> Cluster:
    # GKE sets one of these; JAX prefers the first.
    hosts = environment.get("TPU_PROCESS_ADDRESSES", environment.get("TPU_WORKER_HOSTNAMES"))
    if hosts is None:
        if "TPU_WORKER_ID" in environment:
            raise UserError(
                f"TPU_WORKER_ID={environment['TPU_WORKER_ID']} is set, but TPU_WORKER_HOSTNAMES is not; set both or "
                "none"
            )
        return Cluster("TPU metadata")
    pod = Cluster("TPU pod", num_processes=len(hosts.split(",")), process_id=read_int(environment, "TPU_WORKER_ID"))
    _check_slices(environment)
    return Cluster(_check_process_id(pod).source)  # JAX counts the processes of all slices


def _check_slices(environment: Mapping[str, str]) -> None:
    """Check variables without which JAX would take this slice for the first one and wait forever for the others."""
    if "MEGASCALE_NUM_SLICES" not in environment:
        return
    slices = Cluster("TPU slices", num_processes=read_int(environment, "MEGASCALE_NUM_SLICES"), process_id=0)
    if slices.num_processes != 1:
        read_text(environment, "MEGASCALE_COORDINATOR_ADDRESS")
        _check_process_id(dataclasses.replace(slices, process_id=read_int(environment, "MEGASCALE_SLICE_ID")))


def read_text(environment: Mapping[str, str], name: str) -> str:
    """Return a variable that must be set. Raises UserError."""
    value = environment.get(name)
    if not value:
        raise UserError(f"{name} is not set, but related variables are; set all that {__name__} lists, or none")
    return value


def read_int(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    """Return a variable that is a whole number; it must be set unless there is a default. Raises UserError."""
    if default is not None and name not in environment:
        return default
    value = read_text(environment, name)
    if not value.isdecimal():
        raise UserError(f"{name}={value} is not a whole number")
    return int(value)


def _check_process_id(cluster: Cluster) -> Cluster:
    assert cluster.num_processes is not None
    assert cluster.process_id is not None
    if cluster.process_id >= cluster.num_processes:
        raise UserError(
            f"{cluster.source}: process id {cluster.process_id} is out of range for {cluster.num_processes} processes; "
            f"expected 0 to {cluster.num_processes - 1}"
        )
    return cluster


def initialize_distributed(heartbeat_timeout: int = 100) -> None:
    """Initialize JAX's distributed runtime if the environment describes other processes.

    Call it before anything asks JAX for devices.

    Args:
        heartbeat_timeout: seconds after which JAX takes a silent process for dead, and ends the others; JAX's default.

    Raises:
        UserError: an invalid environment, or a coordinator that cannot be reached.
    """
    cluster = detect_cluster(os.environ, tpu=_has_tpus())
    if cluster is None:
        return
    if cluster.process_id is not None:
        console.set_process_index(cluster.process_id)
    try:
        jax.distributed.initialize(
            cluster.coordinator_address,
            cluster.num_processes,
            cluster.process_id,
            local_device_ids=cluster.local_device_ids,
            cluster_detection_method="deactivate" if cluster.coordinator_address else None,
            heartbeat_timeout_seconds=heartbeat_timeout,
        )
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"{cluster.source}: cannot connect to the coordinator at {cluster.coordinator_address} ({reason}); check "
            "the address, and that all processes were started"
        ) from error
    if jax.default_backend() == "cpu":
        share_cached_programs()
    console.set_process_index(jax.process_index())
    sys.excepthook = _exit_on_exception
    logging.info(
        "%d processes (%s) with %d of %d %s devices each", jax.process_count(), cluster.source,
        jax.local_device_count(), jax.device_count(), jax.devices()[0].device_kind,
    )  # fmt: skip


def _has_tpus() -> bool:
    """Return whether there are TPU chips that JAX may use, by looking at the file system only."""
    platforms: str | None = jax.config.jax_platforms  # type: ignore[attr-defined]
    allowed = not platforms or "tpu" in platforms.split(",")
    return allowed and (Path("/dev/accel0").exists() or any(Path("/dev/vfio").glob("[0-9]*")))


def is_primary_process() -> bool:
    """Return whether this is process 0, which writes the files and the log of a run."""
    return jax.process_index() == 0


def key_value_client() -> Any:
    """Return JAX's client of the key-value store of a run's processes; None if there is only one.

    Unlike a collective it needs no device and waits for no other process.
    """
    state = getattr(getattr(multihost_utils, "distributed", None), "global_state", None)
    return getattr(state, "client", None)


def allgather_objects(value: Any) -> list[Any]:
    """Gather a JSON-serializable value from every process, in process order. A collective: all processes call it."""
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(data)))
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: len(data)] = data
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def all_processes(condition: bool) -> bool:
    """Return whether a condition holds in all processes. A collective: all of them call it."""
    if jax.process_count() == 1:
        return condition
    return bool(multihost_utils.process_allgather(np.asarray(condition)).all())


def any_process(condition: bool) -> bool:
    """Return whether a condition holds in at least one process. A collective: all of them call it."""
    return not all_processes(not condition)


def allgather_dict(values: Mapping[int, Any]) -> dict[int, Any]:
    """Merge dicts of JSON-serializable values from all processes, sorted by key. A collective."""
    items = itertools.chain.from_iterable(allgather_objects(list(values.items())))
    return dict(sorted(items, key=operator.itemgetter(0)))


def check_same_across_processes(values: Mapping[str, Any]) -> None:
    """Check that named values are the same in all processes. A collective: all of them call it.

    Raises:
        UserError: names the first value that differs, and the process.
    """
    expected, *gathered = allgather_objects(dict(values))
    for index, found in enumerate(gathered, start=1):
        for name in [*expected, *found]:
            if expected.get(name) != found.get(name):
                raise UserError(
                    f"process {index} has {name}={found.get(name)!r}, process 0 has {expected.get(name)!r}; start all "
                    "processes with the same command and the same files"
                )


def exit_if_distributed(status: int) -> None:
    """Exit at once if there are other processes; return otherwise.

    The usual interpreter exit waits for the other processes, which may be waiting for this one in a collective.
    """
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _exit_on_exception(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    sys.__excepthook__(kind, error, trace)
    exit_if_distributed(1)
