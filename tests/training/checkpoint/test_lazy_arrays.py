"""Arrays computed while they are written: stored like any others, and never all in memory."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mplug2_jax.errors import UserError
from mplug2_jax.training.checkpoint.checkpoints import Checkpoints
from mplug2_jax.training.checkpoint.lazy_arrays import LazyArray, _write_batches
from mplug2_jax.training.checkpoint.metadata import DataPosition
from mplug2_jax.training.config import CheckpointConfig


def lazy_arrays(values: dict[str, np.ndarray], computed: list[int]) -> dict[str, Any]:
    """Return lazy arrays; ``computed`` receives the size of each when the writer computes it."""

    def compute(value: np.ndarray) -> np.ndarray:
        computed.append(value.nbytes)
        return value

    return {
        name: LazyArray(value.shape, value.dtype, lambda value=value: compute(value)) for name, value in values.items()
    }


def test_a_lazy_state_is_stored_like_any_other(tmp_path: Path) -> None:
    values = {f"x{i}": np.random.default_rng(i).standard_normal((3, i + 1)).astype(np.float32) for i in range(5)}
    computed: list[int] = []
    checkpoints = Checkpoints(tmp_path / "checkpoints", CheckpointConfig(), lazy=True)
    checkpoints.save({"params": lazy_arrays(values, computed)}, DataPosition(0, {}))
    checkpoints.close()
    assert len(computed) == 5
    reader = Checkpoints(tmp_path / "checkpoints", CheckpointConfig(), read_only=True)
    assert reader.array_specs() == {("params", name): (value.shape, value.dtype) for name, value in values.items()}
    for (_, name), value in reader.read_arrays(list(reader.array_specs())).items():
        np.testing.assert_array_equal(value, values[name])
    with pytest.raises(UserError, match="did not record its model"):
        reader.model_metadata()


def test_large_arrays_are_written_alone_and_small_ones_together() -> None:
    def lazy(megabytes: int) -> LazyArray:
        return LazyArray((megabytes, 2**18), np.dtype(np.float32), lambda: np.zeros(0, np.float32))

    sizes = [1, 1, 100, 30, 30, 30, 200, 1]
    batches = _write_batches([lazy(size) for size in sizes])
    assert [sizes[batch] for batch in batches] == [[1, 1], [100], [30, 30], [30], [200], [1]]
