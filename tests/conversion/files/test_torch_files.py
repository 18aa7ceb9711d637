"""PyTorch's files without PyTorch: we read its files, it reads ours, and code in them is never run."""

import argparse
import collections
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mplug2_jax.conversion.files.open import open_source
from mplug2_jax.conversion.files.sources import DTYPES, TensorInfo
from mplug2_jax.conversion.files.torch_files import _ALLOWED, TorchSource, TorchWriter
from mplug2_jax.errors import UserError
from tests.weights import Harmful

torch = pytest.importorskip("torch", reason="PyTorch is not installed here")


def state_dict() -> dict[str, Any]:
    flat = torch.arange(10.0)
    return {
        "a.weight": torch.randn(3, 4), "transposed": torch.randn(5, 6).half().t(), "scalar": torch.tensor(7),
        "b16": torch.randn(2).bfloat16(), "empty": torch.zeros(0, 3), "parameter": torch.nn.Parameter(torch.ones(2)),
        "part": flat[3:7], "same storage": flat[2:9:2], "flags": torch.tensor([True, False]),
    }  # fmt: skip


def save(path: Path, content: Any, *, legacy: bool = False) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path


def assert_holds(source: Any, tensors: dict[str, Any]) -> None:
    assert source.names() == list(tensors)
    for name, tensor in tensors.items():
        value = source.read(name)
        assert source.info(name) == TensorInfo(value.shape, value.dtype)
        assert value.shape == tuple(tensor.shape)
        np.testing.assert_array_equal(value.astype(np.float64), tensor.detach().double().numpy())


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("top", [None, "model", "module", "state_dict", "model_state_dict", "of another name"])
def test_a_state_dict_is_read_alone_or_from_a_training_checkpoint(
    tmp_path: Path, legacy: bool, top: str | None
) -> None:
    tensors = state_dict()
    content: Any = tensors
    if top:
        optimizer = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.999)}]}
        content = {top: tensors, "optimizer": optimizer, "epoch": 3, "config": {"image_res": 224, "x": [1, None, "y"]}}
    assert_holds(open_source(save(tmp_path / "x.pth", content, legacy=legacy)), tensors)


def test_a_torchscript_archive_is_read_as_a_state_dict(tmp_path: Path) -> None:
    class Tower(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = torch.nn.Parameter(torch.randn(2, 3))
            self.blocks = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.blocks(x)

    class Clip(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.visual = Tower().half()
            self.sizes = [1, 2]
            self.register_buffer("input_resolution", torch.tensor(224))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.visual(x)

    model = torch.jit.script(Clip())
    model.save(str(tmp_path / "clip.pt"))
    source = open_source(tmp_path / "clip.pt")
    expected = dict(model.state_dict())
    assert set(source.names()) == set(expected)
    for name, tensor in expected.items():
        np.testing.assert_array_equal(source.read(name), tensor.numpy())


@pytest.mark.parametrize("legacy", [False, True])
def test_other_content_of_training_checkpoints_is_skipped(tmp_path: Path, legacy: bool) -> None:
    """As far as torch allows it: DeepSpeed's sets, shapes and dtypes, a run's settings, random states."""
    tensors = state_dict()
    decorated = torch.nn.Parameter(torch.ones(2))
    decorated.partitioned = {"by": "DeepSpeed"}
    content = {
        "module": {"model": tensors}, "args": argparse.Namespace(lr=1e-4, inner=argparse.Namespace(x=(1, 2))),
        "sparse_tensor_module_names": {"a", "b"}, "param_shapes": [collections.OrderedDict(x=torch.Size([2, 3]))],
        "dtype": torch.float16, "seen": collections.Counter("aab"), "raw": b"\x00\xff", "bytes": bytearray(b"ab"),
        "complex": 1 + 2j, "device": torch.device("cpu"), "rng": torch.get_rng_state(), "decorated": decorated,
    }  # fmt: skip
    path = save(tmp_path / "x.pt", content, legacy=legacy)
    with torch.serialization.safe_globals([argparse.Namespace]):
        torch.load(path, weights_only=True)
    assert_holds(open_source(path), tensors)


def test_the_allowlist_has_nothing_that_torch_does_not_allow() -> None:
    from torch._weights_only_unpickler import _get_allowed_globals

    allowed = {*_get_allowed_globals(), "argparse.Namespace"}
    names = {f"{module}.{name}" for module, name in _ALLOWED if module != "torch.jit._pickle"}  # TorchScript's own
    assert names <= allowed


@pytest.mark.parametrize(
    "extra", [np.float64(0.5), Path("x"), collections.defaultdict(list), frozenset("ab"), range(3), len, str],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_what_torch_does_not_allow_is_rejected_by_name(tmp_path: Path, extra: Any) -> None:
    path = save(tmp_path / "x.pt", {"model": {"x": torch.ones(1)}, "extra": extra})
    with torch.serialization.safe_globals([argparse.Namespace]), pytest.raises(Exception, match="GLOBAL"):
        torch.load(path, weights_only=True)
    with pytest.raises(UserError, match="is rejected: its pickle contains"):
        TorchSource(path)


def test_tensors_of_before_pytorch_0_4_are_read_and_views_of_storages_rejected(tmp_path: Path) -> None:
    def write(path: Path, view: Any) -> Path:
        class OldPickler(pickle.Pickler):
            def persistent_id(self, value: Any) -> Any:
                return ("storage", torch.FloatStorage, "7", "cpu", 6, view) if value == "the storage" else None

            def reducer_override(self, value: Any) -> Any:
                if isinstance(value, torch.Tensor):
                    return torch._utils._rebuild_tensor, ("the storage", 1, (2, 2), (2, 1))
                return NotImplemented

        with path.open("wb") as file:
            for header in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}):
                pickle.dump(header, file, protocol=2)
            OldPickler(file, protocol=2).dump({"x": torch.zeros(2, 2)})
            pickle.dump(["7"], file, protocol=2)
            file.write((6).to_bytes(8, "little") + np.arange(6, dtype=np.float32).tobytes())
        return path

    path = write(tmp_path / "old.pth", None)
    np.testing.assert_array_equal(TorchSource(path).read("x"), [[1, 2], [3, 4]])
    np.testing.assert_array_equal(torch.load(path, weights_only=True)["x"], [[1, 2], [3, 4]])
    with pytest.raises(UserError, match="its pickle contains a view of another storage"):
        TorchSource(write(tmp_path / "view.pth", ("8", 2, 4)))


def test_several_unnamed_state_dicts_are_an_error(tmp_path: Path) -> None:
    path = save(tmp_path / "x.pt", {"student": {"x": torch.ones(1)}, "teacher": {"x": torch.ones(1)}})
    with pytest.raises(UserError, match=r"holds tensors under student, teacher; save the model's state dict alone"):
        TorchSource(path)
    content: dict[str, Any] = {"model": {}}
    content["model"]["model"] = content  # recursive
    with pytest.raises(UserError, match="holds no named tensors"):
        TorchSource(save(tmp_path / "y.pt", content))


@pytest.mark.parametrize("legacy", [False, True])
def test_a_file_with_code_is_rejected_and_the_code_is_not_run(tmp_path: Path, legacy: bool) -> None:
    trace = tmp_path / "it ran"
    path = save(tmp_path / "evil.pth", {"model": {"x": torch.ones(1)}, "extra": Harmful(trace)}, legacy=legacy)
    with pytest.raises(UserError, match=r"is rejected: its pickle contains \w+\.mkdir, which is not a plain tensor"):
        TorchSource(path)
    assert not trace.exists()


@pytest.mark.parametrize("legacy", [False, True])
def test_a_file_truncated_anywhere_is_an_error(tmp_path: Path, legacy: bool) -> None:
    data = save(tmp_path / "whole.pth", state_dict(), legacy=legacy).read_bytes()
    path = tmp_path / "cut.pth"
    for cut in [*range(1, 40, 7), *range(40, len(data) - 1, len(data) // 25), len(data) - 2]:
        path.write_bytes(data[:cut])
        with pytest.raises(UserError, match=r"cut\.pth"):
            open_source(path)


def test_a_file_without_named_tensors_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no named tensors"):
        TorchSource(save(tmp_path / "x.pth", torch.ones(3)))


@pytest.mark.parametrize("mmap", [False, True])
def test_torch_reads_our_files(tmp_path: Path, mmap: bool) -> None:
    rng = np.random.default_rng(0)
    tensors = {
        "f32": rng.standard_normal((3, 4)).astype(np.float32), "ids": np.arange(5)[None], "scalar": np.array(2.0),
        "b16": rng.standard_normal(4).astype(DTYPES["BF16"]), "empty": np.zeros((0, 2), np.float16),
    }  # fmt: skip
    writer = TorchWriter(tmp_path / "x.pth", {name: TensorInfo(x.shape, x.dtype) for name, x in tensors.items()})
    for name in reversed(tensors):
        writer.write(name, tensors[name])
    writer.close()
    read = torch.load(tmp_path / "x.pth", weights_only=True, mmap=mmap)
    assert list(read) == list(tensors)
    for name, value in tensors.items():
        assert read[name].dtype == getattr(torch, value.dtype.name)
        np.testing.assert_array_equal(read[name].float().numpy(), value.astype(np.float32))
    assert_holds(open_source(tmp_path / "x.pth"), read)
