"""Checkpoints: restored onto any mesh, old ones deleted, and an error message for every kind of damage."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mplug2_jax.errors import UserError
from mplug2_jax.objectives.queue import init_queue
from mplug2_jax.parallel.config import MeshConfig
from mplug2_jax.parallel.mesh import make_mesh
from mplug2_jax.training.checkpoint.checkpoints import Checkpoints, DamagedCheckpointError
from mplug2_jax.training.checkpoint.metadata import FORMAT_VERSION, DataPosition
from mplug2_jax.training.config import CheckpointConfig


def make_state(value: float) -> dict[str, Any]:
    return {
        "params": {"decoder": {"kernel": jnp.full((8, 4), value), "bias": jnp.arange(4.0)}},
        "opt": (jnp.full((8, 4), value + 1),),
        "queues": {"image_text": init_queue(jax.random.key(0), 4, 2)},
        "step": jnp.asarray(int(value), jnp.int32),
    }


ALL = MeshConfig(fsdp=8)
REPLICATED = PartitionSpec()


def state_specs(spec: PartitionSpec = REPLICATED, mesh: MeshConfig = ALL) -> dict[str, Any]:
    sharding = NamedSharding(make_mesh(mesh), spec)

    def leaf(x: jax.Array) -> jax.ShapeDtypeStruct:
        leaf_sharding = sharding if x.ndim == 2 and x.shape[0] == 8 else NamedSharding(sharding.mesh, PartitionSpec())
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=leaf_sharding)

    return jax.tree.map(leaf, make_state(0.0))


def position(step: int) -> DataPosition:
    return DataPosition(step, {"image_text": {"batch_size": 8, "source_size": 10, "seed": 0}})


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    checkpoints = Checkpoints(folder, CheckpointConfig(keep_last=2))
    for step in (1, 2, 3):
        checkpoints.save(make_state(float(step)), position(step))
        checkpoints.wait_until_finished()
    checkpoints.close()
    return folder


@pytest.fixture
def folder(two_checkpoints: Path, tmp_path: Path) -> Path:
    """Return a copy of a folder with the checkpoints of steps 2 and 3."""
    return shutil.copytree(two_checkpoints, tmp_path / "checkpoints")


def reader(folder: Path) -> Checkpoints:
    return Checkpoints(folder, CheckpointConfig(keep_last=2), read_only=True)


def test_the_newest_are_kept_and_the_last_is_the_default(folder: Path) -> None:
    checkpoints = reader(folder)
    assert checkpoints.steps() == [2, 3]
    state, restored_position = checkpoints.restore(state_specs())
    assert restored_position == position(3)
    jax.tree.map(np.testing.assert_array_equal, state, make_state(3.0))
    older, restored_position = checkpoints.restore(state_specs(), 2)
    assert restored_position.step == 2
    assert float(older["params"]["decoder"]["kernel"][0, 0]) == 2.0


@pytest.mark.parametrize(
    ("spec", "mesh"),
    [
        (PartitionSpec("fsdp"), MeshConfig(fsdp=8)),
        (PartitionSpec("data", "tensor"), MeshConfig(data=4, fsdp=1, tensor=2)),
    ],
)
def test_a_checkpoint_is_restored_onto_any_mesh(folder: Path, spec: PartitionSpec, mesh: MeshConfig) -> None:
    like = state_specs(spec, mesh)
    state, _ = reader(folder).restore(like)
    kernel = state["params"]["decoder"]["kernel"]
    assert kernel.sharding == like["params"]["decoder"]["kernel"].sharding
    np.testing.assert_array_equal(kernel, make_state(3.0)["params"]["decoder"]["kernel"])


def test_parameters_are_restored_alone(folder: Path) -> None:
    params, step = reader(folder).restore_params(state_specs()["params"])
    assert step == 3
    jax.tree.map(np.testing.assert_array_equal, params, make_state(3.0)["params"])


def test_a_missing_step_lists_the_saved_ones(folder: Path) -> None:
    with pytest.raises(UserError, match=r"no checkpoint of step 7; there are \[2, 3\]"):
        reader(folder).restore(state_specs(), 7)


def test_an_empty_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no checkpoint"):
        reader(tmp_path / "none").restore(state_specs())


def test_another_size_names_the_array_and_both_shapes(folder: Path) -> None:
    like = state_specs()
    like["params"]["decoder"]["kernel"] = jax.ShapeDtypeStruct((16, 4), jnp.float32)
    with pytest.raises(UserError, match=r"another size: params/decoder/kernel is \[8, 4\] there, \[16, 4\]"):
        reader(folder).restore(like)


def test_another_model_names_the_missing_array(folder: Path) -> None:
    like = state_specs()
    like["params"]["fusion"] = jax.ShapeDtypeStruct((2,), jnp.float32)
    with pytest.raises(UserError, match="lacks params/fusion"):
        reader(folder).restore(like)


def test_a_newer_format_is_refused(folder: Path) -> None:
    path = folder / "3" / "meta" / "metadata"
    meta = json.loads(path.read_text()) | {"format": FORMAT_VERSION + 1}
    path.write_text(json.dumps(meta))
    with pytest.raises(
        UserError, match=f"has format {FORMAT_VERSION + 1}, but this version reads up to {FORMAT_VERSION}"
    ):
        reader(folder).restore(state_specs())


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)


def test_any_truncated_file_is_one_error_and_the_earlier_step_still_opens(folder: Path) -> None:
    """Truncate every file of a step in turn: either it is not needed, or the error names the checkpoint."""
    errors = []
    for path in files_of(folder / "3" / "state"):
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        try:
            state, _ = reader(folder).restore(state_specs())
            jax.tree.map(np.testing.assert_array_equal, state, make_state(3.0))
        except UserError as error:
            errors.append(str(error))
        path.write_bytes(content)
    assert len(errors) >= 2
    assert all(str(folder / "3") in message and "\n" not in message for message in errors)
    assert reader(folder).restore(state_specs(), 2)[1].step == 2


def test_an_unfinished_save_is_no_checkpoint(folder: Path) -> None:
    (folder / "4.orbax-checkpoint-tmp").mkdir()
    assert reader(folder).steps() == [2, 3]


def test_another_dtype_is_restored_and_still_checked(folder: Path) -> None:
    like = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, jnp.bfloat16, sharding=s.sharding), state_specs()["params"]
    )
    params, _ = reader(folder).restore_params(like)
    assert params["decoder"]["kernel"].dtype == jnp.bfloat16
    flip_checksum(folder / "3", "params/decoder/kernel")
    with pytest.raises(DamagedCheckpointError, match="params/decoder/kernel differs from what was saved"):
        reader(folder).restore_params(like)


def flip_checksum(folder: Path, name: str) -> None:
    """Simulate a bit of an array that flipped on disk unnoticed by its codec."""
    path = folder / "meta" / "metadata"
    meta = json.loads(path.read_text())
    meta["digests"][name] ^= 1
    path.write_text(json.dumps(meta))


@pytest.mark.parametrize("damage", ["bit", "meta", "state", "empty"])
def test_a_damaged_checkpoint_is_quarantined_and_the_one_before_it_used(folder: Path, damage: str, caplog) -> None:
    step_folder = folder / "3"
    if damage == "bit":
        flip_checksum(step_folder, "opt/0")
    elif damage == "empty":
        (folder / "9").mkdir()
    else:
        shutil.rmtree(step_folder / damage)
    checkpoints = Checkpoints(folder, CheckpointConfig(keep_last=2))
    state, restored_position = checkpoints.restore_last_good(state_specs())
    intact = 3 if damage == "empty" else 2
    assert restored_position == position(intact)
    assert float(state["params"]["decoder"]["kernel"][0, 0]) == intact
    quarantined = f"damaged-{9 if damage == 'empty' else 3}-0"
    assert (folder / quarantined).is_dir()
    assert f"renamed it to {quarantined}" in caplog.text
    for step in (10, 11, 12):  # what is quarantined is no checkpoint, so it is never deleted
        checkpoints.save(make_state(float(step)), position(step))
    checkpoints.close()
    assert (folder / quarantined).is_dir()
    assert reader(folder).steps() == [11, 12]


def test_nothing_is_moved_if_all_are_damaged(folder: Path) -> None:
    for step in ("2", "3"):
        shutil.rmtree(folder / step / "meta")
    with pytest.raises(DamagedCheckpointError, match=r"none of the 2 checkpoints can be used: .*3 is incomplete"):
        Checkpoints(folder, CheckpointConfig()).restore_last_good(state_specs())
    assert reader(folder).steps() == [2, 3]


def test_a_full_disk_keeps_earlier_checkpoints_and_a_later_save_succeeds(tmp_path: Path, caplog) -> None:
    """On a small file system in memory, if one can be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here")
    try:
        large = {"params": jax.random.normal(jax.random.key(0), (500_000,))}
        checkpoints = Checkpoints(disk / "checkpoints", CheckpointConfig(keep_last=2))
        for step in (1, 2):
            checkpoints.save(large, position(step))
            checkpoints.wait_until_finished()
        assert checkpoints.save_failed
        assert "saving the checkpoint of step 2 failed" in caplog.text
        assert checkpoints.steps() == [1]
        jax.tree.map(np.testing.assert_array_equal, checkpoints.restore(large)[0], large)
        subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
        checkpoints.save(large, position(3))
        checkpoints.close()
        assert checkpoints.save_failed is False
        assert reader(disk / "checkpoints").steps() == [1, 3]
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
