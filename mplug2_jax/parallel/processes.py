"""The processes of one run: how they find each other, agree, and leave.

A process joins others only where its environment says that there are any; ``detect`` is the one place that reads it:

==========================  ================================================================================
by name (``launch local``)  ``JAX_COORDINATOR_ADDRESS``, ``JAX_NUM_PROCESSES``, ``JAX_PROCESS_ID``
GKE JobSet                  ``JOBSET_NAME``, ``REPLICATED_JOB_NAME``, ``JOB_COMPLETION_INDEX``, ``JAX_NUM_PROCESSES``
SLURM                       a step of several tasks: ``SLURM_STEP_NUM_TASKS`` and its siblings
TPU pod                     ``TPU_WORKER_HOSTNAMES`` and ``TPU_WORKER_ID``, or the metadata server of a TPU machine
several slices of TPUs      besides, ``MEGASCALE_NUM_SLICES``, ``_SLICE_ID``, ``_COORDINATOR_ADDRESS``: JAX reads them
==========================  ================================================================================
"""

import dataclasses
import json
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
from mplug2_jax.parallel.slurm import first_host, local_device_ids

HEARTBEAT_TIMEOUT_SECONDS = 30
"""A process that was silent for so long is taken for dead, and JAX ends the others."""
DEFAULT_PORT = 8476
"""The coordinator's, where nobody says another."""


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Where a process stands among the others. What is None is left to JAX to ask of the machine."""

    source: str
    coordinator_address: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    local_device_ids: tuple[int, ...] | None = None  # which of the machine's accelerators are this process's; None: all


def detect_cluster(environment: Mapping[str, str], *, tpu: bool = False) -> Cluster | None:
    """The cluster that the environment describes, or None for a process on its own.

    Args:
        environment: such as ``os.environ``.
        tpu: whether this machine has TPUs that may be used.

    Raises:
        UserError: an environment that is set by half, or wrong.
    """
    if "JAX_COORDINATOR_ADDRESS" in environment:
        return _by_name(environment)
    if "JOBSET_NAME" in environment and not tpu:
        return _by_jobset(environment)
    for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        if name in environment:
            raise UserError(f"{name}={environment[name]} is set, but JAX_COORDINATOR_ADDRESS is not; set all or none")
    # A batch script and an interactive shell have SLURM_JOB_ID too; only a step (srun) has tasks.
    if _number(environment, "SLURM_STEP_NUM_TASKS", default=1) > 1:
        return _by_slurm(environment)
    if tpu:
        return _by_tpu(environment)
    return None


def _by_name(environment: Mapping[str, str]) -> Cluster:
    address = environment["JAX_COORDINATOR_ADDRESS"]
    if not re.fullmatch(r"\S+:\d{1,5}", address):
        raise UserError(f"JAX_COORDINATOR_ADDRESS={address} should look like HOST:PORT")
    return _checked(
        Cluster(
            "environment", address, _number(environment, "JAX_NUM_PROCESSES"), _number(environment, "JAX_PROCESS_ID")
        )
    )


def _by_jobset(environment: Mapping[str, str]) -> Cluster:
    name, job = (_text(environment, key) for key in ("JOBSET_NAME", "REPLICATED_JOB_NAME"))
    count, index = (_number(environment, key) for key in ("JAX_NUM_PROCESSES", "JOB_COMPLETION_INDEX"))
    return _checked(Cluster(f"JobSet {name}", f"{name}-{job}-0-0.{name}:{DEFAULT_PORT}", count, index))


def _by_slurm(environment: Mapping[str, str]) -> Cluster:
    count, index = (_number(environment, key) for key in ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"))
    job, nodes = _number(environment, "SLURM_JOB_ID"), _text(environment, "SLURM_STEP_NODELIST")
    if not _number(environment, "SLURM_STEP_NUM_NODES"):
        raise UserError("SLURM_STEP_NUM_NODES=0 should be at least 1")
    _number(environment, "SLURM_LOCALID")
    host, local = first_host(nodes), local_device_ids(environment)
    # Jobs that share a node need ports of their own.
    address = f"{host}:{DEFAULT_PORT + job % 4096}"
    return _checked(Cluster(f"SLURM job {job}", address, count, index, local))


def _by_tpu(environment: Mapping[str, str]) -> Cluster:
    # GKE sets the one or the other, and JAX prefers the first.
    hosts = environment.get("TPU_PROCESS_ADDRESSES", environment.get("TPU_WORKER_HOSTNAMES"))
    if hosts is None:
        if "TPU_WORKER_ID" in environment:
            raise UserError(
                f"TPU_WORKER_ID={environment['TPU_WORKER_ID']} is set, but TPU_WORKER_HOSTNAMES is not; set both or "
                "none"
            )
        return Cluster("TPU metadata")
    within = Cluster("TPU pod", num_processes=len(hosts.split(",")), process_id=_number(environment, "TPU_WORKER_ID"))
    _check_slices(environment)
    return Cluster(_checked(within).source)  # several slices make more of them: JAX counts


def _check_slices(environment: Mapping[str, str]) -> None:
    """Checks what JAX would take for the first slice if it were missing, to wait for the others for ever."""
    if "MEGASCALE_NUM_SLICES" not in environment:
        return
    slices = Cluster("TPU slices", num_processes=_number(environment, "MEGASCALE_NUM_SLICES"), process_id=0)
    if slices.num_processes != 1:
        _text(environment, "MEGASCALE_COORDINATOR_ADDRESS")
        _checked(dataclasses.replace(slices, index=_number(environment, "MEGASCALE_SLICE_ID")))


def _text(environment: Mapping[str, str], name: str) -> str:
    value = environment.get(name)
    if not value:
        raise UserError(f"{name} is not set, though its siblings are; set all that mplug2_jax.parallel.processes lists")
    return value


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    if default is not None and name not in environment:
        return default
    value = _text(environment, name)
    if not value.isdecimal():
        raise UserError(f"{name}={value} should be a whole number")
    return int(value)


def _checked(cluster: Cluster) -> Cluster:
    assert cluster.num_processes is not None
    assert cluster.process_id is not None
    if cluster.process_id >= cluster.num_processes:
        raise UserError(
            f"{cluster.source}: process {cluster.process_id} of {cluster.num_processes} cannot be: the first is 0, the "
            f"last {cluster.num_processes - 1}"
        )
    return cluster


def initialize_distributed() -> None:
    """Joins the other processes of the run, if the environment describes any, and says so in one line.

    Must run before anything asks JAX for devices.

    Raises:
        UserError: an environment that is wrong, or a coordinator that cannot be reached.
    """
    cluster = detect_cluster(os.environ, tpu=_has_tpus())
    if cluster is None:
        return
    known = cluster.coordinator_address is not None
    try:
        jax.distributed.initialize(
            cluster.coordinator_address,
            cluster.num_processes,
            cluster.process_id,
            local_device_ids=cluster.local_device_ids,
            cluster_detection_method="deactivate" if known else None,
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"{cluster.source}: cannot join the other processes at {cluster.coordinator_address} ({reason}); check the "
            "address, and that all were started"
        ) from error
    console.set_process_index(jax.process_index())
    sys.excepthook = _leave_on_exception
    logging.info(
        "%d processes (%s) with %d of %d %s devices each", jax.process_count(), cluster.source,
        jax.local_device_count(), jax.device_count(), jax.devices()[0].device_kind,
    )  # fmt: skip


def _has_tpus() -> bool:
    """Whether there are TPU chips that JAX is free to use. Asks the file system only."""
    platforms: str | None = jax.config.jax_platforms  # type: ignore[attr-defined]
    free = not platforms or "tpu" in platforms.split(",")
    return free and (Path("/dev/accel0").exists() or any(Path("/dev/vfio").glob("[0-9]*")))


def is_primary_process() -> bool:
    """Whether this process is the one that writes files and talks."""
    return jax.process_index() == 0


def allgather_objects(value: Any) -> list[Any]:
    """Every process's value, in their order. All processes must come here; ``value`` is anything that JSON can hold."""
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(data)))
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: len(data)] = data
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def check_same_across_processes(values: Mapping[str, Any]) -> None:
    """Checks that all processes were started alike; each gives what it was started with, by name.

    Raises:
        UserError: names the first thing that differs, and whose.
    """
    first, *others = allgather_objects(dict(values))
    for index, other in enumerate(others, start=1):
        for name in [*first, *other]:
            if first.get(name) != other.get(name):
                raise UserError(
                    f"process {index} has {name}={other.get(name)!r}, process 0 has {first.get(name)!r}; start all "
                    "processes with the same command, over the same files"
                )


def exit_if_distributed(status: int) -> None:
    """Ends this process at once if it runs among others, and returns otherwise.

    The usual end waits for the others, and they may wait for this process in a collective.
    """
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _leave_on_exception(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    sys.__excepthook__(kind, error, trace)
    exit_if_distributed(1)
