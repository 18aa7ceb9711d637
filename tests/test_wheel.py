"""A wheel of the repository, installed into an empty environment, runs a shipped recipe."""

import os
import re
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from tests.runs import ONE_LAYER


def run(*command: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    process = subprocess.run([str(word) for word in command], capture_output=True, text=True, **options)
    assert process.returncode == 0, f"{command}\n{process.stdout}\n{process.stderr}"
    return process


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_recipes_run_from_a_wheel(repository: Path, tmp_path: Path) -> None:
    run(sys.executable, "-m", "build", "--wheel", "--outdir", tmp_path / "dist", repository)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    files = set(zipfile.ZipFile(wheel).namelist())
    assert {"mplug2_jax/configs/demo.py", "mplug2_jax/report/template.html", "data_pipelines/batch.py"} <= files
    assert {"mplug2_jax/report/parts.html", "mplug2_jax/report/published.json"} <= files
    assert not any(name.startswith("tests") for name in files)
    assert {"mplug2_jax/launch/files/jobset.yaml.j2", "mplug2_jax/launch/files/Dockerfile.tpu"} <= files

    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    pins = ["-c", str(repository / "constraints.txt")] if sys.version_info[:2] == (3, 11) else []
    run(python, "-m", "pip", "install", "--quiet", "--no-compile", *pins, wheel)

    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    small = ["--config.steps=2", *ONE_LAYER, "--config.log_every=1"]
    small += [f"--config.evaluations.video.data.{field}=8" for field in ("sources.clips.max_records", "batch_size")]
    environment |= {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    process = run(
        tmp_path / "env" / "bin" / "mplug2", "train", "--config", "finetune:videoqa,tiny", *small, "--workdir",
        tmp_path / "run", cwd=tmp_path, env=environment,
    )  # fmt: skip
    assert re.search(r"^video +accuracy", process.stdout, re.MULTILINE)
    process = run(
        tmp_path / "env" / "bin" / "mplug2", "launch", "slurm", "--config", "demo", "--topology", "h100:16",
        "--workdir", "/shared/demo", cwd=tmp_path, env=environment,
    )  # fmt: skip
    assert "#SBATCH --nodes=2" in process.stdout
    assert (tmp_path / "run" / "report.html").is_file()
