"""The runs of an experiment: trained once, then read; and confidence intervals over seeds."""

import dataclasses
import json
import math
import statistics
from pathlib import Path

import pytest

from mplug2_jax.errors import UserError
from mplug2_jax.experiments.runs import mean_ci, train_to_end
from mplug2_jax.training.config import RunConfig
from mplug2_jax.training.durations import load_run_config
from mplug2_jax.training.workdir import WorkDir


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Replace training by writing what it leaves; return the folders of the runs that were trained."""
    folders = []

    def train(config: RunConfig, path: Path) -> None:
        folders.append(path)
        workdir = WorkDir(path)
        if not workdir.exists():
            workdir.initialize(config, None)
        evaluations = workdir.evaluation_folder(config.steps)
        for folder in (evaluations, workdir.checkpoints / str(config.steps)):
            folder.mkdir(parents=True, exist_ok=True)
        for name in config.evaluations:
            (evaluations / f"{name}.json").write_text(json.dumps({"metrics": {"top_1": len(folders) / 4}}))

    monkeypatch.setattr("mplug2_jax.experiments.runs.train", train)
    return folders


def test_a_finished_run_is_read_and_an_unfinished_one_resumed(trained: list[Path], tmp_path: Path) -> None:
    config, folder = load_run_config("digitworld:digit", ["--config.steps=2"]), tmp_path / "a"
    first = train_to_end(config, folder)
    assert first == train_to_end(config, folder) == {"digit": {"metrics": {"top_1": 0.25}}}
    assert trained == [folder]
    (WorkDir(folder).evaluation_folder(2) / "digit.json").unlink()
    assert train_to_end(config, folder) == {"digit": {"metrics": {"top_1": 0.5}}}
    with pytest.raises(UserError, match=r"seed was 0 and is 1\. Use the same config to resume it, or a new --workdir$"):
        train_to_end(dataclasses.replace(config, seed=1), folder)


def test_a_run_without_its_checkpoints_is_finished_too(trained: list[Path], tmp_path: Path) -> None:
    config, folder = load_run_config("digitworld:digit", ["--config.steps=2"]), tmp_path / "a"
    for _ in range(2):
        train_to_end(config, folder, keep_checkpoints=False)
        assert not WorkDir(folder).checkpoints.exists()
    assert len(trained) == 1
    train_to_end(config, folder)  # trains it again for the checkpoint that is asked for
    assert len(trained) == 2


def test_the_interval_of_a_mean_is_student_s() -> None:
    low, high = mean_ci([1.0, 2.0, 3.0])
    assert (low + high) / 2 == pytest.approx(2)
    assert (high - low) / 2 == pytest.approx(4.302653 * statistics.stdev([1, 2, 3]) / math.sqrt(3), rel=1e-6)
    assert mean_ci([4.0]) == (-math.inf, math.inf)
    assert mean_ci([0.5] * 3) == (0.5, 0.5)
