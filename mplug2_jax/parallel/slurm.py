"""Parsing of the environment of a SLURM step: the host of its first task, and the accelerators of a task."""

import re
from collections.abc import Mapping

from mplug2_jax.errors import UserError

_RANGES = r"\[\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*\]"
_FIRST_ENTRY = re.compile(rf"[\s,]*((?:[^\s,\[\]]|{_RANGES})+)(?:[\s,]|$)")
_VISIBLE = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
_NO_DEVICES = {"", "-1", "NoDevFiles"}
_MAX_GPUS_PER_NODE = 8  # of common nodes


def first_host(nodes: str) -> str:
    """Return the first host name to which ``scontrol show hostnames`` expands a node list.

    Brackets hold numbers and ranges with leading zeros, and may appear anywhere in a name, several times.

    Raises:
        UserError: no name, or one of digits only, which a resolver would take for an address.

    Example:
        >>> first_host("rack[02-10,12]node[3,7]-ib.cluster,login")
        'rack02node3-ib.cluster'
    """
    entry = _FIRST_ENTRY.match(nodes)
    name = re.sub(r"\[(\d+)[^\]]*\]", r"\1", entry[1]) if entry else ""
    if not re.search(r"[^\d]", name):
        raise UserError(
            f"SLURM_STEP_NODELIST={nodes} names no node; expected a list that scontrol show hostnames expands, such as "
            "node[001-004]"
        )
    return name


def local_device_ids(environment: Mapping[str, str]) -> tuple[int, ...] | None:
    """Return the indices of this task's accelerators among those that it sees; None: all of them.

    A task that SLURM binds sees its own accelerators only. Tasks that it does not bind all see those of their node, and
    share them evenly, in the order of their local ids. SLURM's counts of accelerators per task or per node tell the two
    cases apart. Without these counts, a list that starts at 0 is taken for the whole node's if it has several entries
    per task, or if a node would need more than eight accelerators for every task to have that many.

    Raises:
        UserError: accelerators that the tasks of a node cannot share evenly.
    """
    num_tasks = _tasks_on_node(environment)
    if num_tasks == 1 or environment.get("JAX_PLATFORMS") == "cpu":
        return None
    local_id = int(environment["SLURM_LOCALID"])
    per_task, on_node = _gpus_per_task(environment), _gpus_on_node(environment)
    visible_lists = [environment[name].split(",") for name in _VISIBLE if environment.get(name)]
    if not visible_lists:  # all accelerators of the node are visible
        per_task = per_task or max(1, (on_node or 0) // num_tasks)
        return tuple(range(local_id * per_task, (local_id + 1) * per_task))
    visible = min(visible_lists, key=len)
    count = len(visible)
    if count == 1 or not _NO_DEVICES.isdisjoint(visible):
        return None
    if per_task:
        is_bound = count < per_task * num_tasks
    elif on_node:
        is_bound = count < on_node
    else:
        from_zero = visible == [str(i) for i in range(count)]
        is_bound = not from_zero or (count <= num_tasks and count * num_tasks <= _MAX_GPUS_PER_NODE)
    if is_bound:
        return tuple(range(count))
    if not per_task and (count % num_tasks or count < num_tasks):
        raise UserError(
            f"{num_tasks} tasks of this node share {count} accelerators unevenly; start one task per accelerator, or "
            "bind them with srun --gpus-per-task"
        )
    share = per_task or count // num_tasks
    return tuple(range(local_id * share, (local_id + 1) * share))


def _tasks_on_node(environment: Mapping[str, str]) -> int:
    """Return the number of tasks of the step on this node; ``SLURM_STEP_TASKS_PER_NODE`` reads like "2(x3),1"."""
    groups = re.findall(r"(\d+)(?:\(x(\d+)\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    counts = [int(count) for count, repeats in groups for _ in range(int(repeats or 1))]
    node = environment.get("SLURM_NODEID", "")
    if node.isdecimal() and int(node) < len(counts):
        return counts[int(node)]
    return -(-int(environment["SLURM_STEP_NUM_TASKS"]) // max(1, int(environment["SLURM_STEP_NUM_NODES"])))


def _gpus_per_task(environment: Mapping[str, str]) -> int | None:
    """Return the accelerators requested per task, from "2", "a100:2" or "cpu=8,gres/gpu:2"; None: not requested."""
    count = re.fullmatch(r"(?:.*:)?(\d+)", environment.get("SLURM_GPUS_PER_TASK", ""))
    count = count or re.search(r"gres[/:]gpu[^,]*?[:=](\d+)(?:,|$)", environment.get("SLURM_TRES_PER_TASK", ""))
    return int(count[1]) or None if count else None


def _gpus_on_node(environment: Mapping[str, str]) -> int | None:
    """Return the number of the step's accelerators on this node, from "4", "gpu:a100:4(S:0-1)" or a list of ids."""
    count = re.fullmatch(r"(?:.*:)?(\d+)(?:\(.*\))?", environment.get("SLURM_GPUS_ON_NODE", ""))
    if count:
        return int(count[1]) or None
    gpu_ids = environment.get("SLURM_STEP_GPUS", "")
    return len(gpu_ids.split(",")) if gpu_ids else None
