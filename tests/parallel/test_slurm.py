"""SLURM's node lists in every form, and the accelerators of one task of a node."""

import pytest

from mplug2_jax.errors import UserError
from mplug2_jax.parallel.slurm import first_host, local_device_ids

STEP = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "2", "SLURM_LOCALID": "1"}
VISIBLE = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("a", "a"), ("a,b", "a"), (" a, b", "a"), ("a-1,b", "a-1"), ("n[1-3]", "n1"), ("n[07,9]", "n07"),
        ("x-n[12],y", "x-n12"), ("rack[0-1]node[3-4]", "rack0node3"), ("r[01,03-4]u[2]n[009-10]x,z", "r01u2n009x"),
        ("node[1-3]-ib", "node1-ib"), ("n[1-2].cluster.example", "n1.cluster.example"), ("10.0.0.[7-9]", "10.0.0.7"),
        ("node1.a.b,node2.a.b", "node1.a.b"), ("[2-3]node", "2node"), ("c1[1-2],c[3-4]", "c11"),
    ],
)  # fmt: skip
def test_first_host_of_a_node_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


@pytest.mark.parametrize("nodes", ["", ",", "[1-2]", "7", "n[", "n[1-2", "n[]", "[a-b]", "n[1-]", "n]", "n[1[2]]"])
def test_a_node_list_without_a_name_is_refused(nodes: str) -> None:
    with pytest.raises(UserError, match=r"SLURM_STEP_NODELIST=.* names no node"):
        first_host(nodes)


@pytest.mark.parametrize("name", VISIBLE)
@pytest.mark.parametrize(
    ("visible", "variables", "ids"),
    [
        ("3", {}, None),
        ("MIG-1,MIG-2", {}, (0, 1)),  # names are of bound accelerators
        ("2,3", {}, (0, 1)),
        ("0,1", {}, (0, 1)),
        ("0,1,2,3", {}, (2, 3)),
        ("0,1,2,3", {"SLURM_GPUS_ON_NODE": "8"}, (0, 1, 2, 3)),
        ("0,1,2,3", {"SLURM_GPUS_ON_NODE": "gpu:h100:4(S:0-1)"}, (2, 3)),
        ("0,1", {"SLURM_GPUS_ON_NODE": "2"}, (1,)),
        ("4,5,6,7", {"SLURM_STEP_GPUS": "4,5,6,7"}, (2, 3)),
        ("4,5", {"SLURM_STEP_GPUS": "4,5,6,7"}, (0, 1)),
        ("0,1,2,3", {"SLURM_GPUS_PER_TASK": "h100:4", "SLURM_GPUS_ON_NODE": "4"}, (0, 1, 2, 3)),
        ("0,1,2,3", {"SLURM_GPUS_PER_TASK": "2"}, (2, 3)),
        ("0,1,2,3", {"SLURM_GPUS_PER_TASK": "1"}, (1,)),
        ("0,1,2,3", {"SLURM_TRES_PER_TASK": "cpu=8,gres/gpu:h100=2,mem=1G"}, (2, 3)),
        ("0,1,2,3", {"SLURM_STEP_TASKS_PER_NODE": "3,1", "SLURM_NODEID": "1"}, None),  # alone on its node
        ("0,1,2,3", {"SLURM_STEP_TASKS_PER_NODE": "1,2(x2)", "SLURM_NODEID": "2"}, (2, 3)),
        ("0,1,2,3", {"SLURM_STEP_NUM_NODES": "1"}, (1,)),  # four for each of four tasks: more than a node has
        ("0,1,2,3", {"SLURM_STEP_NUM_NODES": "4"}, None),
        ("NoDevFiles", {}, None),
        ("", {}, (1,)),
        ("", {"SLURM_GPUS_ON_NODE": "8"}, (4, 5, 6, 7)),
        ("", {"SLURM_GPUS_PER_TASK": "2"}, (2, 3)),
    ],
)
def test_a_task_uses_the_accelerators_that_slurm_gave_it(
    name: str, visible: str, variables: dict[str, str], ids: tuple[int, ...] | None
) -> None:
    assert local_device_ids(STEP | {name: visible} | variables) == ids


def test_the_shortest_of_several_lists_counts() -> None:
    assert local_device_ids(STEP | dict(zip(VISIBLE, ("2,3", "2,3", "1"), strict=True))) is None


def test_accelerators_that_tasks_cannot_share_evenly_are_refused() -> None:
    with pytest.raises(UserError, match="2 tasks of this node share 3 accelerators unevenly; start one task"):
        local_device_ids(STEP | {"CUDA_VISIBLE_DEVICES": "0,1,2", "SLURM_GPUS_ON_NODE": "3"})
