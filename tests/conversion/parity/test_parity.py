"""The parity command: whole golden folders pass, and any difference fails."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from data_pipelines.storage.paths import to_path, upload_folder
from mplug2_jax.cli.main import main
from mplug2_jax.conversion.parity.comparison import compare


@pytest.fixture
def copy(reference: Path, tmp_path: Path) -> Path:
    """Copy the smallest golden folder."""
    folder = tmp_path / "golden"
    shutil.copytree(reference / "goldens" / "v1_itc_itm", folder, copy_function=shutil.copyfile)
    folder.chmod(0o755)
    return folder


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("folder", "least"),
    [
        ("v1_itc_itm", 139),
        pytest.param("c1_fc", 2383, marks=pytest.mark.slow),
        pytest.param("c1_eq", 2067, marks=pytest.mark.slow),
    ],
)
def test_a_whole_folder_in_a_bucket_passes(reference: Path, bucket: str, folder: str, least: int, capsys) -> None:
    goldens, report = to_path(f"{bucket}/goldens"), to_path(f"{bucket}/rows.json")
    upload_folder(str(reference / "goldens" / folder), goldens)
    status = main(["convert", "parity", str(goldens), "--summary", "--json", str(report)])
    printed = capsys.readouterr().out
    assert status == 0, printed
    assert "FAIL" not in printed
    rows = json.loads(report.read_text())
    assert len(rows) >= least
    assert all(row["passed"] for row in rows)


@pytest.mark.parametrize("size", [1e-4, 1.0, 31.0, 1e5])
def test_errors_are_relative_to_the_largest_magnitude_of_an_array(size: float) -> None:
    theirs = size * np.linspace(-1, 1, 5)

    def passes(error: float) -> bool:
        return compare("model", "array", theirs + np.asarray([0, 0, error * size, 0, 0]), theirs).passed

    assert (passes(0.9e-5), passes(1.1e-5), passes(np.nan)) == (True, False, False)


@pytest.mark.parametrize(("theirs", "near"), [([0.0, 0.0], [0.0, 1e-30]), ([100_000, 200_000], [100_000, 200_001])])
def test_zeros_and_integers_are_compared_exactly(theirs: list[float], near: list[float]) -> None:
    assert compare("model", "array", np.asarray(theirs), np.asarray(theirs)).passed
    assert not compare("model", "array", np.asarray(near), np.asarray(theirs)).passed


def test_a_different_number_fails(copy: Path, capsys) -> None:
    data = dict(np.load(copy / "data.npz"))
    data["image_feat"] = data["image_feat"] + 1e-4
    np.savez(copy / "data.npz", **data)
    assert main(["convert", "parity", str(copy), "--summary"]) == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if "FAIL" in line]
    assert len(failed) == 1
    assert "image_feat" in failed[0]


def test_an_array_that_nothing_computes_fails(copy: Path, capsys) -> None:
    data = dict(np.load(copy / "data.npz"))
    np.savez(copy / "data.npz", **data, pooled=np.zeros(3, np.float32))
    assert main(["convert", "parity", str(copy), "--summary"]) == 1
    assert "FAIL: not computed" in capsys.readouterr().out


def test_a_changed_weight_fails(copy: Path, capsys) -> None:
    weights = load_file(copy / "weights.safetensors")
    weights["itm_head.weight"] = weights["itm_head.weight"] * 1.01
    save_file(weights, copy / "weights.safetensors")
    assert main(["convert", "parity", str(copy), "--summary"]) == 1
    assert "loss_itm" in next(line for line in capsys.readouterr().out.splitlines() if "FAIL" in line)


def test_a_json_file_is_never_overwritten(copy: Path, tmp_path: Path, capsys) -> None:
    existing = tmp_path / "existing.json"
    existing.write_text("precious")
    assert main(["convert", "parity", str(copy), "--json", str(existing)]) == 2
    assert "choose another name" in capsys.readouterr().err
    assert existing.read_text() == "precious"
