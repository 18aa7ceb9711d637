"""What the README tells people to type works, in its order."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from mplug2_jax.training.telemetry.metric_log import read_train_metrics


def commands(repository: Path) -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", (repository / "README.md").read_text(), flags=re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line and not line.startswith("#")]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_command_of_the_readme_works(repository: Path, reference: Path, tmp_path: Path) -> None:
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    lines = commands(repository)
    assert len(lines) >= 7
    for line in lines:
        words = shlex.split(line)
        assert words[0] == "mplug2"
        # The golden folder stands beside the checkout, and the tests may run anywhere.
        words = [w.replace("../shared/reference", str(reference)) for w in words[1:]]
        done = subprocess.run(
            [sys.executable, "-m", "mplug2_jax.cli.main", *words],
            cwd=tmp_path,
            env=environment | {"PYTHONPATH": str(repository)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    losses = [row["loss"] for row in read_train_metrics(tmp_path / "runs" / "short" / "metrics.jsonl")]
    assert losses[-1] < losses[0]
    assert (tmp_path / "runs" / "short" / "report.html").stat().st_size > 10_000


def test_files_that_the_readme_names_exist(repository: Path) -> None:
    text = (repository / "README.md").read_text()
    named = set(re.findall(r"`((?:configs|mplug2_jax|data_pipelines|docs|benchmarks)/[\w/.]*)`", text))
    assert len(named) >= 8
    assert not [name for name in named if not (repository / name).exists()]
