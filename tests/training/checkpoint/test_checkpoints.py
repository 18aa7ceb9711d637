"""Checkpoints: one unit, onto any mesh, the oldest dropped, and a sentence for everything that is wrong with one."""

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
from mplug2_jax.training.checkpoint.metadata import FORMAT, DataPosition
from mplug2_jax.training.config import CheckpointConfig


def state_of(value: float) -> dict[str, Any]:
    return {
        "params": {"decoder": {"kernel": jnp.full((8, 4), value), "bias": jnp.arange(4.0)}},
        "opt": (jnp.full((8, 4), value + 1),),
        "queues": {"image_text": init_queue(jax.random.key(0), 4, 2)},
        "step": jnp.asarray(int(value), jnp.int32),
    }


ALL = MeshConfig(fsdp=8)
WHOLE = PartitionSpec()


def described(spec: PartitionSpec = WHOLE, mesh: MeshConfig = ALL) -> dict[str, Any]:
    sharding = NamedSharding(make_mesh(mesh), spec)

    def leaf(x: jax.Array) -> jax.ShapeDtypeStruct:
        own = sharding if x.ndim == 2 and x.shape[0] == 8 else NamedSharding(sharding.mesh, PartitionSpec())
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=own)

    return jax.tree.map(leaf, state_of(0.0))


def position(step: int) -> DataPosition:
    return DataPosition(step, {"image_text": {"batch_size": 8, "source_size": 10, "seed": 0}})


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    checkpoints = Checkpoints(folder, CheckpointConfig(keep_last=2))
    for step in (1, 2, 3):
        checkpoints.save(state_of(float(step)), position(step))
        checkpoints.wait_until_finished()
    checkpoints.close()
    return folder


@pytest.fixture
def saved(original: Path, tmp_path: Path) -> Path:
    """A copy of two checkpoints, of steps 2 and 3."""
    return shutil.copytree(original, tmp_path / "checkpoints")


def reader(folder: Path) -> Checkpoints:
    return Checkpoints(folder, CheckpointConfig(keep_last=2), read_only=True)


def test_the_last_ones_are_kept_and_the_newest_is_the_default(saved: Path) -> None:
    checkpoints = reader(saved)
    assert checkpoints.steps() == [2, 3]
    state, where = checkpoints.restore(described())
    assert where == position(3)
    jax.tree.map(np.testing.assert_array_equal, state, state_of(3.0))
    older, where = checkpoints.restore(described(), 2)
    assert where.step == 2
    assert float(older["params"]["decoder"]["kernel"][0, 0]) == 2.0


@pytest.mark.parametrize(
    ("spec", "mesh"),
    [
        (PartitionSpec("fsdp"), MeshConfig(fsdp=8)),
        (PartitionSpec("data", "tensor"), MeshConfig(data=4, fsdp=1, tensor=2)),
    ],
)
def test_any_mesh_may_restore(saved: Path, spec: PartitionSpec, mesh: MeshConfig) -> None:
    like = described(spec, mesh)
    state, _ = reader(saved).restore(like)
    kernel = state["params"]["decoder"]["kernel"]
    assert kernel.sharding == like["params"]["decoder"]["kernel"].sharding
    np.testing.assert_array_equal(kernel, state_of(3.0)["params"]["decoder"]["kernel"])


def test_parameters_alone(saved: Path) -> None:
    params, step = reader(saved).restore_params(described()["params"])
    assert step == 3
    jax.tree.map(np.testing.assert_array_equal, params, state_of(3.0)["params"])


def test_a_step_that_is_not_there_lists_those_that_are(saved: Path) -> None:
    with pytest.raises(UserError, match=r"no checkpoint of step 7; there are \[2, 3\]"):
        reader(saved).restore(described(), 7)


def test_an_empty_folder_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no checkpoint"):
        reader(tmp_path / "none").restore(described())


def test_another_size_names_the_array_and_both_shapes(saved: Path) -> None:
    like = described()
    like["params"]["decoder"]["kernel"] = jax.ShapeDtypeStruct((16, 4), jnp.float32)
    with pytest.raises(UserError, match=r"another size: params/decoder/kernel is \[8, 4\] there, \[16, 4\]"):
        reader(saved).restore(like)


def test_another_model_names_what_is_lacking(saved: Path) -> None:
    like = described()
    like["params"]["fusion"] = jax.ShapeDtypeStruct((2,), jnp.float32)
    with pytest.raises(UserError, match="lacks params/fusion"):
        reader(saved).restore(like)


def test_a_newer_format_is_refused(saved: Path) -> None:
    path = saved / "3" / "meta" / "metadata"
    meta = json.loads(path.read_text()) | {"format": FORMAT + 1}
    path.write_text(json.dumps(meta))
    with pytest.raises(UserError, match=f"has format {FORMAT + 1}, but this version reads up to {FORMAT}"):
        reader(saved).restore(described())


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)


def test_whatever_file_is_truncated_there_is_one_sentence_and_the_step_before_still_opens(saved: Path) -> None:
    """Every file of a step in turn: either nothing needed it, or the error names the checkpoint."""
    sentences = []
    for path in files_of(saved / "3" / "state"):
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        try:
            state, _ = reader(saved).restore(described())
            jax.tree.map(np.testing.assert_array_equal, state, state_of(3.0))
        except UserError as error:
            sentences.append(str(error))
        path.write_bytes(whole)
    assert len(sentences) >= 2
    assert all(str(saved / "3") in sentence and "\n" not in sentence for sentence in sentences)
    assert reader(saved).restore(described(), 2)[1].step == 2


def test_a_save_that_was_cut_short_does_not_count(saved: Path) -> None:
    (saved / "4.orbax-checkpoint-tmp").mkdir()
    assert reader(saved).steps() == [2, 3]


def test_another_type_may_restore_and_is_still_checked(saved: Path) -> None:
    like = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, jnp.bfloat16, sharding=s.sharding), described()["params"]
    )
    params, _ = reader(saved).restore_params(like)
    assert params["decoder"]["kernel"].dtype == jnp.bfloat16
    change_digest(saved / "3", "params/decoder/kernel")
    with pytest.raises(DamagedCheckpointError, match="params/decoder/kernel differs from what was saved"):
        reader(saved).restore_params(like)


def change_digest(folder: Path, name: str) -> None:
    """As if one bit of an array had flipped on the disk, where its codec does not notice."""
    path = folder / "meta" / "metadata"
    meta = json.loads(path.read_text())
    meta["digests"][name] ^= 1
    path.write_text(json.dumps(meta))


@pytest.mark.parametrize("how", ["bit", "meta", "state", "empty"])
def test_a_damaged_checkpoint_is_named_and_set_aside_and_the_one_before_used(saved: Path, how: str, caplog) -> None:
    folder = saved / "3"
    if how == "bit":
        change_digest(folder, "opt/0")
    elif how == "empty":
        (saved / "9").mkdir()
    else:
        shutil.rmtree(folder / how)
    checkpoints = Checkpoints(saved, CheckpointConfig(keep_last=2))
    state, where = checkpoints.restore_last_good(described())
    good = 3 if how == "empty" else 2
    assert where == position(good)
    assert float(state["params"]["decoder"]["kernel"][0, 0]) == good
    damaged = f"damaged-{9 if how == 'empty' else 3}-0"
    assert (saved / damaged).is_dir()
    assert f"renamed it to {damaged}" in caplog.text
    for step in (10, 11, 12):  # what is set aside is no checkpoint, so it is never deleted
        checkpoints.save(state_of(float(step)), position(step))
    checkpoints.close()
    assert (saved / damaged).is_dir()
    assert reader(saved).steps() == [11, 12]


def test_where_all_are_damaged_nothing_is_moved(saved: Path) -> None:
    for step in ("2", "3"):
        shutil.rmtree(saved / step / "meta")
    with pytest.raises(DamagedCheckpointError, match=r"none of the 2 checkpoints can be used: .*3 is incomplete"):
        Checkpoints(saved, CheckpointConfig()).restore_last_good(described())
    assert reader(saved).steps() == [2, 3]


def test_a_disk_that_is_full_keeps_what_is_there_and_a_later_try_succeeds(tmp_path: Path, caplog) -> None:
    """A small file system in memory, where one can be mounted."""
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
