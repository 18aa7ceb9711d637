"""What the environment of a SLURM step says: the host of its first task, and which accelerators are a task's own."""

import re
from collections.abc import Mapping

from mplug2_jax.errors import UserError

_RANGES = r"\[\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*\]"
_FIRST_ENTRY = re.compile(rf"[\s,]*((?:[^\s,\[\]]|{_RANGES})+)(?:[\s,]|$)")
_VISIBLE = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
_NO_DEVICE = {"", "-1", "NoDevFiles"}
_USUAL_MOST = 8  # accelerators of a node


def first_host(nodes: str) -> str:
    """Return the first name that ``scontrol show hostnames`` makes of a list of nodes.

    Brackets hold numbers and ranges, keep leading zeros, and may stand anywhere in a name, several times.

    Raises:
        UserError: no name, or one of digits alone, which a resolver would take for an address.

    Example:
        >>> first_host("rack[02-10,12]node[3,7]-ib.cluster,login")
        'rack02node3-ib.cluster'
    """
    entry = _FIRST_ENTRY.match(nodes)
    name = re.sub(r"\[(\d+)[^\]]*\]", r"\1", entry[1]) if entry else ""
    if not re.search(r"[^\d]", name):
        raise UserError(
            f"SLURM_STEP_NODELIST={nodes} names no node; expected a list that scontrol show hostnames expands, as in "
            "node[001-004]"
        )
    return name


def local_device_ids(environment: Mapping[str, str]) -> tuple[int, ...] | None:
    """Return which of the accelerators that this task can see are its own; None: all.

    A task that SLURM bound sees no others than its own. Tasks that it did not bind all see those of their node, and
    share them evenly, in the order of their local numbers. Which of both it is, SLURM says by the accelerators of a
    task or of the node. Where it does not, a list from 0 on is taken for a node's if it has several for each task, or
    if a node would need more than eight for each task to have so many.

    Raises:
        UserError: accelerators that the tasks of a node cannot share evenly.
    """
    tasks = _tasks_on_node(environment)
    if tasks == 1 or environment.get("JAX_PLATFORMS") == "cpu":
        return None
    local, each, there = int(environment["SLURM_LOCALID"]), _gpus_per_task(environment), _gpus_on_node(environment)
    lists = [environment[name].split(",") for name in _VISIBLE if environment.get(name)]
    if not lists:  # nothing is hidden
        each = each or max(1, (there or 0) // tasks)
        return tuple(range(local * each, (local + 1) * each))
    seen = min(lists, key=len)
    count = len(seen)
    if count == 1 or not _NO_DEVICE.isdisjoint(seen):
        return None
    if each:
        bound = count < each * tasks
    elif there:
        bound = count < there
    else:
        bound = seen != [str(i) for i in range(count)] or (count <= tasks and count * tasks <= _USUAL_MOST)
    if bound:
        return tuple(range(count))
    share, rest = divmod(count, tasks)
    if not each and (rest or not share):
        raise UserError(
            f"{tasks} tasks of this node share {count} accelerators unevenly; start as many tasks on each node as it "
            "has accelerators, or bind them with srun --gpus-per-task"
        )
    share = each or share
    return tuple(range(local * share, (local + 1) * share))


def _tasks_on_node(environment: Mapping[str, str]) -> int:
    """Return how many tasks of the step run on this node: ``SLURM_STEP_TASKS_PER_NODE`` is like "2(x3),1"."""
    listed = re.findall(r"(\d+)(?:\(x(\d+)\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    counts = [int(count) for count, times in listed for _ in range(int(times or 1))]
    node = environment.get("SLURM_NODEID", "")
    if node.isdecimal() and int(node) < len(counts):
        return counts[int(node)]
    return -(-int(environment["SLURM_STEP_NUM_TASKS"]) // max(1, int(environment["SLURM_STEP_NUM_NODES"])))


def _gpus_per_task(environment: Mapping[str, str]) -> int | None:
    """Return the accelerators of a task, where SLURM was asked for so many: "2", "a100:2" or "cpu=8,gres/gpu:2"."""
    count = re.fullmatch(r"(?:.*:)?(\d+)", environment.get("SLURM_GPUS_PER_TASK", ""))
    count = count or re.search(r"gres[/:]gpu[^,]*?[:=](\d+)(?:,|$)", environment.get("SLURM_TRES_PER_TASK", ""))
    return int(count[1]) or None if count else None


def _gpus_on_node(environment: Mapping[str, str]) -> int | None:
    """Return the accelerators of the step on this node, from "4", "gpu:a100:4(S:0-1)" or a list of them."""
    count = re.fullmatch(r"(?:.*:)?(\d+)(?:\(.*\))?", environment.get("SLURM_GPUS_ON_NODE", ""))
    if count:
        return int(count[1]) or None
    listed = environment.get("SLURM_STEP_GPUS", "")
    return len(listed.split(",")) if listed else None
