"""The PyTorch runtime equals whole golden folders, and works without JAX."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest

from mplug2_jax.cli.main import main
from mplug2_jax.conversion.parity import jax_runner
from mplug2_jax.conversion.parity.jax_runner import run_parity


@pytest.mark.parametrize(("folder", "least"), [("c1_fc", 2383), ("c1_eq", 2067)])
def test_a_whole_folder_passes(reference: Path, tmp_path: Path, folder: str, least: int, capsys) -> None:
    report = tmp_path / "rows.json"
    command = ["convert", "parity", str(reference / "goldens" / folder), "--framework", "torch"]
    status = main([*command, "--summary", "--json", str(report)])
    printed = capsys.readouterr().out
    assert status == 0, printed
    rows = json.loads(report.read_text())
    assert len(rows) >= least
    assert all(row["passed"] for row in rows)
    # Every kind of number: arrays, gradients, the teacher's update, training, ranking, beams.
    names = {(row["section"], row["name"]) for row in rows}
    assert {("videoqa", "rank_ids"), ("videoqa", "beam5_ids"), ("caption", "beam1_scores")} <= names
    assert {("videoqa.train", "losses"), ("caption.train", "losses")} <= names
    sections = {row["section"] for row in rows}
    assert {"caption.grads", "videoqa.grads_distill_alpha0.4", "videoqa.teacher_after_1_update"} <= sections
    assert "FAIL" not in printed
    assert "converted, " in next(line for line in printed.splitlines() if "weights:" in line)


def test_models_that_the_runtime_lacks_are_computed_by_jax_and_the_output_says_so(
    reference: Path, monkeypatch, capsys
) -> None:
    folder = reference / "goldens" / "v1_itc_itm"
    monkeypatch.setattr(jax_runner, "run_parity", lambda *args: itertools.islice(run_parity(*args), 1))  # the first row
    assert main(["convert", "parity", str(folder), "--framework", "torch", "--summary"]) == 0
    output = capsys.readouterr().out.splitlines()[-1]
    assert output == "retrieval: the PyTorch runtime has no retrieval model, so these rows are jax's"
    monkeypatch.undo()
    assert [row.note for row in itertools.islice(run_parity(folder), 1)] == [""]


def test_without_torch_the_extra_is_named(reference: Path, monkeypatch, capsys) -> None:
    for name in [*sys.modules]:
        if name.startswith(("mplug2_jax.conversion.torch_runtime", "mplug2_jax.conversion.parity.torch_runner")):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch", None)
    assert main(["convert", "parity", str(reference / "goldens" / "c1_eq"), "--framework", "torch"]) == 2
    output = capsys.readouterr().err
    assert output == "mplug2: error: --framework torch needs PyTorch: pip install 'mplug2-jax[torch]'\n"


def test_the_runtime_imports_nothing_of_jax(repository: Path) -> None:
    program = (
        "import sys, mplug2_jax.conversion.torch_runtime\n"
        "print({'jax', 'flax', 'optax', 'orbax', 'jaxtyping'} & {name.partition('.')[0] for name in sys.modules})\n"
        "print(sorted(n for n in sys.modules if n.startswith('mplug2_jax.') and 'torch_runtime' not in n))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=repository, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["set()", "['mplug2_jax.conversion', 'mplug2_jax.errors']"]
