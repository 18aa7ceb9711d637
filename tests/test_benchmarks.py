"""The benchmarks run at small sizes and print the numbers that the lab notes quote."""

import ast
import collections
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.close import CHAIN, FLOAT64


def run_benchmark(repository: Path, script: str, *args: str) -> str:
    environment = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(repository), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    command = [sys.executable, str(repository / "benchmarks" / script), *args]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, env=os.environ | environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


BENCHMARKS = sorted((Path(__file__).parents[1] / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.stem)
def test_what_a_benchmark_imports_from_the_package_exists(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(("mplug2_jax", "data_pipelines")):
            module = importlib.import_module(str(node.module))
            for alias in node.names:
                if not hasattr(module, alias.name):  # a submodule that nothing has imported yet
                    importlib.import_module(f"{node.module}.{alias.name}")


SPEEDS = r" +[\d.]+ s +[\d.]+ s +[\d.]+$"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "figures"),
    [
        ("step.py --size tiny --steps 2 --matmul 256",
         (r"step \(median of +2\) +[\d.]+ s", r"process +[\d.]+ GiB", r"matmul rate +[\d.]+%")),
        ("torch_runtime.py --size tiny --rounds 1",
         (f"^forward{SPEEDS}", f"^training step{SPEEDS}", f"^beam search{SPEEDS}",
          r"^release's search +- +[\d.]+ s +[\d.]+$")),
        ("feed.py --images 16 --videos 2 --steps 6 --repeats 1",
         (r"^video: CPU time of an example; with the GIL +[\d.]+ ms; [\d.]+ ms$",
          r"^pretrain:large on v5p:8x8x8 +[\d.]+ s +\d+ +\d+ +\d+$",
          r"^image: relative to a minimal loop on one core +\d+%", r"^video: two workers / one +[\d.]+x",
          r"^image, two workers: this / PyTorch DataLoader +", r"waiting for data +[\d.]+%")),
        ("index.py --samples 200000 --tars 8",
         (r"^200,000 samples: opened in +[\d.]+ s$", r"^800 samples: opened in +[\d.]+ s, \d+ requests$",
          r"batch of 256 of step 1,000,000 +[\d.]+ s, 256 requests", r"within 60 s and 4 GiB +yes")),
        ("overhead.py --steps 2 --batch 2",
         (r"bare step \(median of 2\) +[\d.]+ ms", r"overhead +-?[\d.]+%", r"MiB of state +[\d.]+ ms")),
        ("checkpoints.py --mib 16 --repeats 1",
         (r"^bucket +\d+ ms +\d+ MiB/s +\d+ MiB/s$", r"^bucket / local disk +[\d.]+x")),
    ],
    ids=["step", "torch_runtime", "feed", "index", "overhead", "checkpoints"],
)  # fmt: skip
def test_figures_are_printed(command: str, figures: tuple[str, ...], repository: Path) -> None:
    if command.startswith("torch"):
        pytest.importorskip("torch")
    out = run_benchmark(repository, *command.split())
    for figure in figures:
        assert re.search(figure, out, re.MULTILINE), out


def test_generation_takes_at_most_a_fiftieth_of_the_release_s_flops(repository: Path) -> None:
    out = run_benchmark(repository, "generation.py")
    assert "4,097 visual tokens" in out
    assert float(re.findall(r"1/([\d.]+)", out)[-1]) >= 50


def test_scores_equal_those_of_reference_implementations(repository: Path) -> None:
    out = run_benchmark(repository, "scores.py", "--examples", "300")
    figures = re.compile(r"^(\S.*?) +[\d.]+ +([\d.]+)  \S.* ([\d.]+e[-+]\d+)(?: +([\d.]+e[-+]\d+))?$", re.MULTILINE)
    rows = figures.findall(out)
    assert len(rows) == len(out.splitlines()) - 1 == 25, out
    for name, reference, *differences in rows:
        assert all(float(difference or 0) <= FLOAT64 * float(reference) for difference in differences), name


@pytest.mark.slow
def test_meshes_agree_with_one_device(repository: Path) -> None:
    out = run_benchmark(repository, "meshes.py", "--only", "2x1x1x2x2", "--steps", "5")
    *sizes, loss, parameters, _ = out.splitlines()[-1].split()
    assert sizes == ["2", "1", "1", "2", "2"]
    assert float(loss) < 1e-5
    assert float(parameters) < CHAIN


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_drills(repository: Path, tmp_path: Path) -> None:
    """All drills run in one process because they share the reference runs."""
    out = run_benchmark(
        repository, "drills.py", "all", "--quick", "--times", "2", "--bound", "90", "--work", str(tmp_path)
    )
    passed = re.findall(r"^(elastic|preempt|kill) .*  ok  ", out.rpartition("details")[2], re.MULTILINE)
    assert collections.Counter(passed) == {"elastic": 2, "preempt": 2, "kill": 3}


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_runs_in_a_bucket_survive_its_faults(repository: Path, tmp_path: Path) -> None:
    out = run_benchmark(repository, "drills.py", "storage", "--quick", "--work", str(tmp_path))
    passed = re.findall(r"^(faults|kill|upload) .*  ok  ", out.rpartition("details")[2], re.MULTILINE)
    assert passed == ["faults", "kill", "upload"], out


@pytest.mark.slow
def test_caption_scores_equal_the_toolkit_s(repository: Path) -> None:
    out = run_benchmark(repository, "metrics.py")
    rows = re.findall(r"^(\w+) +[\d.]+ +([\d.]+) +(-?[\d.e+-]+) +[\d.]+$", out, re.MULTILINE)
    assert {"cider", "bleu_1", "bleu_4", "rouge_l"} <= {name for name, *_ in rows}, out
    assert all(abs(float(difference)) <= FLOAT64 * float(reference) for _, reference, difference in rows), out


@pytest.mark.slow
def test_throughput_with_and_without_a_cache_and_on_a_mesh(repository: Path) -> None:
    sizes = ("--size", "tiny", "--frames", "1", "--videos", "2", "--tokens", "3", "--repeat", "1", "--devices", "2")
    rows = re.findall(
        r"^(\w.*?) +[\d.]+ +[\d.]+ +[\d.]+$", run_benchmark(repository, "throughput.py", *sizes), re.MULTILINE
    )
    assert [row.partition(",")[0] for row in rows] == ["with the cache", "without", "without", "with the cache"]
