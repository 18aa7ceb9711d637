"""Transfer: the search of the learning rate, the data of validation and test, the table and the page."""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from data_pipelines.digitworld.source import DigitWorld
from mplug2_jax.experiments import transfer as module
from mplug2_jax.experiments.transfer import Difference, TaskTransfer, count_better, transfer, write_transfer_page
from mplug2_jax.recipes.digitworld import FINETUNES
from mplug2_jax.training.config import RunConfig
from mplug2_jax.training.durations import load_run_config


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, RunConfig]]:
    """Replace runs by a score that is best at 1e-3 from scratch, and at 3e-3 if pretrained; return the runs."""
    runs = []

    def train_to_end(config: RunConfig, folder: Path, *, keep_checkpoints: bool) -> Mapping[str, Mapping[str, Any]]:
        arm, rate = folder.parent.name, config.optimizer.learning_rate
        runs.append((f"{arm} {folder.name}", config))
        folder.mkdir(parents=True)
        lines = [{"step": step, "loss": 4.0 - step / 100 + config.seed} for step in range(2, 21, 2)]
        (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        score = 0.9 - abs(math.log10(rate / (1e-3 if arm == "scratch" else 3e-3))) / 2
        best = {"digit": score + 0.01 * config.seed, "validation": score}
        return {
            name: {"metrics": {"top_1": value - 0.5 * (arm == "scratch")}, "baselines": {"top_1": 0.1}}
            for name, value in best.items()
        }

    monkeypatch.setattr(module, "train_to_end", train_to_end)
    monkeypatch.setattr(module, "with_init_from", lambda path, config: config)
    monkeypatch.setattr(module, "evaluate_zero_shot", lambda name, path, overrides: {})
    return runs


def run_digit(folder: Path) -> TaskTransfer:
    (task,) = transfer(
        {"digit": load_run_config("digitworld:digit", [])},
        Path("demo"),
        folder,
        seeds=3,
        learning_rates=(1e-4, 1e-3, 3e-3),
    )
    return task


def test_each_arm_has_the_rate_that_is_best_on_validation_examples(
    ran: list[tuple[str, RunConfig]], tmp_path: Path
) -> None:
    task = run_digit(tmp_path)
    assert (task.scratch.learning_rate, task.pretrained.learning_rate) == (1e-3, 3e-3)
    search = ("0.0001-0", "0.001-0", "0.003-0")
    assert [name for name, _ in ran] == [
        *(f"scratch {name}" for name in (*search, "0.001-1", "0.001-2")),
        *(f"pretrained {name}" for name in (*search, "0.003-1", "0.003-2")),
    ]
    (row,) = task.rows
    assert row.scratch == pytest.approx([0.4, 0.41, 0.42])
    assert row.pretrained == pytest.approx([0.9, 0.91, 0.92])
    assert row.is_better
    assert row.cells() == ("digit", "top_1", "10.0%", "–", "41.0%", "91.0%", "50.0%", "50.0% to 50.0%")
    assert list(task.scratch.loss().means) == pytest.approx([5.0 - step / 100 for step in range(2, 21, 2)])


@pytest.mark.parametrize("name", FINETUNES)
def test_validation_examples_are_neither_trained_on_nor_reported(name: str) -> None:
    config = load_run_config(f"digitworld:{name}", [])
    with_validation = module._with_validation(name, config, 1e-3, 1)
    assert with_validation.evaluations.keys() == config.evaluations.keys() | {"validation"}
    assert with_validation.evaluations["validation"].task == config.evaluations[name].task
    evaluations = {key: each.data.sources["digits"] for key, each in with_validation.evaluations.items()}
    validation, test = evaluations["validation"], evaluations[name]
    assert (validation.split, test.split) == ("heldout", "heldout")
    worlds = [DigitWorld("image", split=each.split, seed=each.seed, size=64) for each in (validation, test)]
    first, second = ({repr(world.scene(i)) for i in range(64)} for world in worlds)
    assert not first & second


def test_an_interval_with_zero_is_not_better() -> None:
    rows = [
        Difference("a", "top_1", 0.1, math.nan, [0.1, 0.1, 0.1], [0.2, 0.2, 0.1]),
        Difference("b", "top_1", 0.1, math.nan, [0.3, 0.3, 0.3], [0.1, 0.1, 0.1]),
        Difference("c", "cider", 10.0, 12.0, [20.0, 21.0, 22.0], [60.0, 62.0, 64.0]),
    ]
    assert [row.is_better for row in rows] == [False, False, True]
    assert rows[2].cells()[2:6] == ("10.0", "12.0", "21.0", "62.0")


def test_the_page_has_the_table_and_a_curve_of_each_task(ran: list[tuple[str, RunConfig]], tmp_path: Path) -> None:
    task, page = run_digit(tmp_path / "runs"), tmp_path / "transfer.html"
    assert count_better([task]) == "Pretraining is better on 1 of 1 evaluations, by a 95% CI above 0."
    retrieval = Difference("video_retrieval", "text_to_visual_r1", 0.004, 0.2, [0.1, 0.1], [0.3, 0.4])
    clips = dataclasses.replace(task, name="video_retrieval", rows=[retrieval])
    write_transfer_page([task, clips], Path("runs/<b>demo"), page)
    html = page.read_text()
    assert "&lt;b&gt;demo" in html
    assert "<b>demo" not in html
    assert html.count("<figure>") == 2
    assert "<path" in html
    for cell in (
        "top-1 accuracy",
        "41.0%",
        "91.0%",
        "50.0% to 50.0%",
        "0.001",
        "0.003",
        "text → video R@1",
        count_better([task, clips]),
    ):
        assert cell in html
