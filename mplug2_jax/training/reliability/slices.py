"""Elastic slices: a run of several slices restarts with those that are there, and uses the others when they are back.

``mplug2 launch local`` and ``launch gke`` with ``--min-slices`` set ``MPLUG2_MIN_SLICES``, ``MPLUG2_SLICE_TIMEOUT`` and
``MPLUG2_ATTEMPT``, which differs in each start of the run. Before a host connects to the others it announces itself by
a file in ``slices/ATTEMPT/`` of the work directory. Once all slices are there, or the timeout has passed, one host
creates ``members.json``, exclusively, so that all read the same list. The number of members divides the number of
slices, so each step has the same global batch, in proportionally more micro-batches.
"""

import contextlib
import dataclasses
import json
import time
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path

from absl import logging

from data_pipelines.storage.file_system import file_system, write_atomically
from data_pipelines.storage.paths import RemotePath, remove_tree
from mplug2_jax.errors import Preempted, UserError
from mplug2_jax.parallel.config import elastic_slice_counts
from mplug2_jax.parallel.processes import read_int, read_text
from mplug2_jax.training.config import RunConfig
from mplug2_jax.training.config_changes import depends_on_micro_batches

POLL_SECONDS = 1.0
_LOG_SECONDS = 60.0
_MEMBERS, _FINISHED = "members.json", "finished"


@dataclasses.dataclass(frozen=True)
class Host:
    """The place of a host: its slice among ``num_slices``, and its index among the slice's ``num_hosts``."""

    slice_index: int
    num_slices: int
    index: int
    num_hosts: int
    leader: str  # address of the slice's host 0, without a port

    @classmethod
    def detect(cls, environment: Mapping[str, str]) -> "Host":
        """Read the variables of ``launch local`` or of GKE. Raises UserError if one is missing or invalid."""
        num_slices = read_int(environment, "MEGASCALE_NUM_SLICES")
        slice_index = read_int(environment, "MEGASCALE_SLICE_ID")
        if "JAX_NUM_PROCESSES" in environment:
            num_hosts = read_int(environment, "JAX_NUM_PROCESSES") // num_slices
            index = read_int(environment, "JAX_PROCESS_ID") % num_hosts
            leader = read_text(environment, "JAX_COORDINATOR_ADDRESS")
        else:
            names = environment.get("TPU_PROCESS_ADDRESSES") or read_text(environment, "TPU_WORKER_HOSTNAMES")
            leader, *others = names.split(",")
            num_hosts, index = 1 + len(others), read_int(environment, "TPU_WORKER_ID")
        return cls(slice_index, num_slices, index, num_hosts, leader.rpartition(":")[0] or leader)

    def environment(self, members: Sequence[int], leader: str, environment: Mapping[str, str]) -> dict[str, str | None]:
        """Return the variables that make this host one of the members' cluster; None: to remove.

        Args:
            members: the slices, this host's among them.
            leader: of the first of them.
            environment: this host's, for all slices.
        """
        count, rank = len(members), members.index(self.slice_index)
        if "JAX_NUM_PROCESSES" in environment:
            port = environment["JAX_COORDINATOR_ADDRESS"].rpartition(":")[2]
            return {
                "JAX_NUM_PROCESSES": str(count * self.num_hosts),
                "JAX_PROCESS_ID": str(rank * self.num_hosts + self.index),
                "JAX_COORDINATOR_ADDRESS": f"{leader}:{port}",
            }
        if count == 1:  # as GKE starts a single slice
            return {name: None for name in environment if name.startswith("MEGASCALE_")}
        _, colon, port = read_text(environment, "MEGASCALE_COORDINATOR_ADDRESS").partition(":")
        return {
            "MEGASCALE_NUM_SLICES": str(count),
            "MEGASCALE_SLICE_ID": str(rank),
            "MEGASCALE_COORDINATOR_ADDRESS": f"{leader}{colon}{port}",
        }


class Slices:
    """The slices of one start of a run.

    Args:
        folder: of the rendezvous of all starts, in the work directory.
        host: this one.
        attempt: names this start of the run.
        minimum: number of slices that suffice.
        timeout: seconds to wait for more of them.
    """

    def __init__(self, folder: Path, host: Host, attempt: str, minimum: int, timeout: int) -> None:
        self._folder, self._attempt, self._host = folder, folder / attempt, host
        self._counts, self._timeout = elastic_slice_counts(host.num_slices, minimum), timeout
        self.members: tuple[int, ...] = ()
        self._leader = ""

    @classmethod
    def detect(cls, environment: Mapping[str, str], folder: Path) -> "Slices | None":
        """Return the slices that the environment describes; None unless it allows to go on with some of several.

        Raises:
            UserError: variables that are missing or invalid.
        """
        if "MPLUG2_MIN_SLICES" not in environment or environment.get("MEGASCALE_NUM_SLICES", "1") == "1":
            return None
        minimum, timeout = (read_int(environment, f"MPLUG2_{name}") for name in ("MIN_SLICES", "SLICE_TIMEOUT"))
        return cls(folder, Host.detect(environment), read_text(environment, "MPLUG2_ATTEMPT"), minimum, timeout)

    @property
    def is_member(self) -> bool:
        """Return whether this host's slice takes part."""
        return self._host.slice_index in self.members

    def join(self, environment: MutableMapping[str, str], limit: int) -> None:
        """Wait for the other slices, and make ``environment`` that of the members' cluster.

        Args:
            environment: to change.
            limit: ``config.watchdog_timeout``, which ends the wait.

        Raises:
            UserError: the limit would come before the timeout.
            Preempted: the run has started without this slice; a restart of all slices uses it.
        """
        if 0 < limit <= self._timeout:
            raise UserError(
                f"--slice-timeout {self._timeout} is not less than config.watchdog_timeout={limit}, which would end "
                "the wait; lower the former or raise the latter"
            )
        host, since = self._host, time.monotonic()
        if self._read_members():  # a host of a member has announced itself before
            raise Preempted(
                f"slice {host.slice_index} is here, and the run has started without it: all slices restart to use it"
            )
        if not isinstance(self._attempt, RemotePath):
            self._attempt.mkdir(parents=True, exist_ok=True)
        write_atomically(str(self._path(host.slice_index, host.index)), json.dumps({"leader": host.leader}).encode())
        logged = since
        while not self._read_members():
            now = time.monotonic()
            if host.index == 0:  # one host of each slice looks for the others
                present = self._present()
                counts = [count for count in self._counts if count <= len(present)]
                if len(present) == host.num_slices or (counts and now - since >= self._timeout):
                    self._create_members(present[: counts[-1]])
                    continue
            if now - logged >= _LOG_SECONDS:
                logging.warning("waiting for the other slices of %d, for %.0f s now", host.num_slices, now - since)
                logged = now
            time.sleep(POLL_SECONDS)
        if self.is_member:
            for name, value in host.environment(self.members, self._leader, environment).items():
                environment.pop(name, None)
                if value is not None:
                    environment[name] = value

    def scale(self, config: RunConfig) -> RunConfig:
        """Return the config of a run on all slices for the members: the same batch, in more micro-batches.

        Raises:
            UserError: the config is not one of several slices, or not valid for a number of them that may remain.
        """
        total, members, replica = self._host.num_slices, len(self.members), config.mesh.replica
        if replica > 0 and replica % total:
            raise UserError(
                f"config.mesh.replica={replica} on {total} slices: only replicas may cross slices; set it to -1, or to "
                f"a multiple of {total}"
            )
        configs = {count: self._scale_to(count, config) for count in self._counts}  # errors are found now, not later
        scaled = configs[members]
        if members == total:
            return scaled
        fewer = ", in which contrast and hard negatives compare fewer examples" * depends_on_micro_batches(config)
        logging.warning("%d of %d slices: %d micro-batches a step%s", members, total, scaled.grad_accum_steps, fewer)
        return scaled

    def _scale_to(self, count: int, config: RunConfig) -> RunConfig:
        total, replica = self._host.num_slices, config.mesh.replica
        mesh = dataclasses.replace(config.mesh, replica=replica if replica < 0 else replica * count // total)
        try:
            return dataclasses.replace(config, mesh=mesh, grad_accum_steps=config.grad_accum_steps * total // count)
        except UserError as error:
            raise UserError(f"--min-slices {self._counts[0]}: with {count} of {total} slices {error}") from error

    def matches_scaled_accum_steps(self, config: RunConfig, previous: RunConfig) -> bool:
        """Return whether ``previous`` accumulates as often as ``config`` does on one of the possible numbers of slices.

        Args:
            config: of the run on all slices.
            previous: the run's config until now.
        """
        steps = {config.grad_accum_steps * self._host.num_slices // count for count in self._counts}
        return previous.grad_accum_steps in steps

    def remove_earlier(self) -> None:
        """Delete the files of earlier starts, after all members of this one have joined."""
        with contextlib.suppress(OSError):
            for folder in self._folder.iterdir():
                if folder.name != self._attempt.name:
                    remove_tree(folder)

    def finish(self) -> None:
        """Let the hosts that wait for the end of the run exit."""
        write_atomically(str(self._attempt / _FINISHED), b"")

    def wait_until_finished(self) -> None:
        """Wait for the end of a run that does not use this host."""
        logging.warning(
            "slice %d is not used: %d of %d slices are there, and the run uses %d", self._host.slice_index,
            len(self._present()), self._host.num_slices, len(self.members),
        )  # fmt: skip
        while not (self._attempt / _FINISHED).exists():
            time.sleep(POLL_SECONDS)

    def _path(self, slice_index: int, host_index: int) -> Path:
        return self._attempt / f"slice-{slice_index}-host-{host_index}.json"

    def _present(self) -> list[int]:
        """Return the slices of which all hosts are there."""
        names = {path.name for path in self._attempt.iterdir()}
        indices = range(self._host.num_hosts)
        return [s for s in range(self._host.num_slices) if all(self._path(s, i).name in names for i in indices)]

    def _create_members(self, slices: Sequence[int]) -> None:
        """Create the list of members, unless another host has done so."""
        leader = json.loads(self._path(slices[0], 0).read_text(encoding="utf-8"))["leader"]
        fs, fs_path = file_system(str(self._attempt / _MEMBERS))
        members = {"slices": slices, "leader": leader, "by": self._host.slice_index}
        fs.create(fs_path, json.dumps(members).encode())

    def _read_members(self) -> bool:
        """Read the list of members, and return whether there is one."""
        with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):  # which another host is writing
            members = json.loads((self._attempt / _MEMBERS).read_text(encoding="utf-8"))
            self.members, self._leader = tuple(members["slices"]), members["leader"]
        return bool(self.members)
