"""``mplug2 demo tasks``: the board of what was pretrained, what it learns, and names that are none."""

from pathlib import Path

import pytest

from mplug2_jax.cli.main import main
from mplug2_jax.config import build, load_recipe
from mplug2_jax.recipes.digitworld import FINETUNES
from mplug2_jax.training.config import RunConfig
from mplug2_jax.training.loop import train

# The demo's vision tower in one layer; the tokeniser and all else as recipes have it.
THIN = {"vision_layers": 1, "fusion_layers": 1, "decoder_layers": 1}


def test_a_task_that_is_none_is_refused_with_the_nearest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "tasks", "--pretrained", str(tmp_path), "--only", "caption"]) == 2
    assert "--only caption is no task of the demo: did you mean '" in capsys.readouterr().err


def test_a_field_that_is_none_is_refused_before_anything_is_pretrained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["demo", "tasks", "--pretrained", str(tmp_path / "new"), "--workdir", str(tmp_path / "tasks")]
    assert main([*words, "--config.modle.width=3"]) == 2
    assert "config.modle is not a field: did you mean 'model'?" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_each_evaluation_of_the_board_has_a_run_and_a_name_of_its_own() -> None:
    names = [name for trial in FINETUNES.values() for name in trial.asked]
    assert len(set(names)) == len(names) == 13
    assert all(run in trial.asked for run, trial in FINETUNES.items())


@pytest.mark.slow
def test_the_board_is_printed_from_a_pretrained_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    thin = [f"--config.model.{field}={value}" for field, value in THIN.items()]
    pretrained, runs = tmp_path / "pretrained", tmp_path / "tasks"
    sparse = load_recipe("demo", ["--config.steps=1", *thin])
    del sparse.streams.video_text, sparse.streams.text
    sparse.evaluations = {}
    train(build(RunConfig, sparse), pretrained)
    only = ["--only", "image_retrieval", "--only", "digit", "--only", "action"]
    few = ["--config.steps=1", "--config.model.scan_unroll=1", *thin]
    assert main(["demo", "tasks", "--pretrained", str(pretrained), "--workdir", str(runs), *only, *few]) == 0
    printed = capsys.readouterr().out
    board = {line.split()[0]: line for line in printed[printed.index("task  ") :].splitlines()[2:]}
    assert list(board) == ["image_retrieval", "image_colour_by_prompts", "digit", "action"]
    for name, line in board.items():
        before = [cell.strip() for cell in line.split("  ")][-6:]
        assert "vision" in line
        assert ("-" in before) == (name in ("digit", "action")), "heads are fresh, contrast is not"
    assert "starting from" in printed
    assert "fresh: classifier" in printed
    assert "fresh: classifier, temporal" in printed
    for name in ("image_retrieval", "digit", "action"):
        assert (runs / name / "report.html").is_file()
