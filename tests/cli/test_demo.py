"""``mplug2 demo tasks | scaling | ablation``: what they print, and options that they refuse."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from mplug2_jax.cli.main import main
from mplug2_jax.config import build, load_recipe
from mplug2_jax.experiments import scaling
from mplug2_jax.experiments.scaling import ScalingRun
from mplug2_jax.recipes.digitworld import FINETUNES
from mplug2_jax.training.config import RunConfig
from mplug2_jax.training.loop import train

# The demo's vision tower with one layer; everything else as in the recipes.
ONE_LAYER = {"vision_layers": 1, "fusion_layers": 1, "decoder_layers": 1}


def test_an_unknown_task_is_refused_with_the_closest_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "tasks", "--pretrained", str(tmp_path), "--only", "caption"]) == 2
    assert "--only caption is not a task of the demo: did you mean '" in capsys.readouterr().err


def test_an_unknown_field_is_refused_before_pretraining(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["demo", "tasks", "--pretrained", str(tmp_path / "new"), "--workdir", str(tmp_path / "tasks")]
    assert main([*args, "--config.modle.width=3"]) == 2
    assert "config.modle is not a field: did you mean 'model'?" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_evaluation_names_are_unique_and_include_their_run() -> None:
    names = [name for run in FINETUNES.values() for name in run.evaluations]
    assert len(set(names)) == len(names) == 13
    assert all(name in run.evaluations for name, run in FINETUNES.items())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seeds", "0"], "--seeds 0 must be at least 1"),
        (["--learning-rates", "1e-3", "-1"], "--learning-rates -1 must be a positive number"),
        (["--learning-rates", "nan"], "--learning-rates nan must be a positive number"),
        (["--config.optimizer.learning_rate=1e-3"], "each run has its own; use --learning-rates"),
        (["--config.seed=3"], "each run has its own; use --seeds"),
    ],
)
def test_invalid_options_are_refused(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", "tasks", "--pretrained", str(tmp_path / "new"), *words]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seeds", "0"], "--seeds 0 must be at least 1"),
        (["--only", "universal layers"], "--only 'universal layers' is not a variant: did you mean 'no universal"),
        (["--config.seed=3"], "each model has its own; use --seeds"),
        (["--config.modle.width=3"], "config.modle is not a field"),
    ],
)
def test_invalid_options_of_the_ablation_are_refused(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", "ablation", "--workdir", str(tmp_path / "new"), *words]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["scaling", "ablation"])
def test_a_plot_that_exists_is_not_overwritten(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (png := tmp_path / "mine.png").write_bytes(b"mine")
    assert main(["demo", command, "--workdir", str(tmp_path / "runs"), "--png", str(png)]) == 2
    assert f"--png {png} exists" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [png]
    assert png.read_bytes() == b"mine"


def test_the_scaling_grid_is_printed_and_plotted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def train_grid(config: RunConfig, folder: Path) -> Sequence[ScalingRun]:
        assert (config.steps, config.seed, config.streams["image_text"].data.batch_size) == (200, 3, 128)
        assert folder == tmp_path / "runs"
        return [
            ScalingRun(1.0, steps, steps * 1e12, {"image_text/vlc": loss}, {"image_retrieval/text_to_visual_r1": 0.25})
            for steps, loss in ((100, 2.0), (200, 2.5))
        ]

    monkeypatch.setattr(scaling, "train_grid", train_grid)
    assert main(["demo", "scaling", "--workdir", str(tmp_path / "runs"), "--config.seed=3"]) == 0
    out = capsys.readouterr().out
    assert [line.split() for line in out.splitlines()[2:5]] == [
        ["TFLOP", "100.0", "200.0"],
        ["image_text/vlc", "2.000", "2.500"],
        ["image_retrieval/text_to_visual_r1", "25.0%", "25.0%"],
    ]
    assert "not monotone: width x1: image_text/vlc rises from 2.0000 after 100 steps to 2.5000 after 200" in out
    assert (tmp_path / "runs" / "scaling.png").is_file()


@pytest.mark.slow
def test_both_arms_are_trained_once_and_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one_layer = [f"--config.model.{field}={value}" for field, value in ONE_LAYER.items()]
    pretrained, runs = tmp_path / "pretrained", tmp_path / "tasks"
    recipe = load_recipe("demo", ["--config.steps=1", *one_layer])
    del recipe.streams.video_text, recipe.streams.text
    recipe.evaluations = {}
    train(build(RunConfig, recipe), pretrained)
    args = ["demo", "tasks", "--pretrained", str(pretrained), "--workdir", str(runs), "--only", "image_retrieval"]
    args += ["--only", "action", "--seeds", "1", "--learning-rates", "1e-3"]
    args += ["--config.steps=1", "--config.model.scan_unroll=1", *one_layer]
    assert main(args) == 0
    out, err = capsys.readouterr()
    table = {line.split()[0]: line for line in out[out.index("evaluation  ") :].splitlines()[2:-1]}
    assert list(table) == ["image_retrieval", "image_colour_by_prompts", "action"]
    zero_shot = {name: line.split()[3] for name, line in table.items()}
    assert zero_shot["action"] == "–", "its head is fresh"
    assert "–" not in (zero_shot["image_retrieval"], zero_shot["image_colour_by_prompts"]), "contrast is not"
    assert "Pretraining is better on 0 of 3 evaluations" in out, "one seed has no interval"
    assert "initializing from" in err
    assert "fresh: classifier, temporal" in err
    page = (runs / "transfer.html").read_text()
    assert page.count("<figure>") == 2
    assert main(args) == 0
    again, err = capsys.readouterr()
    assert again == out
    assert "step 1/1" not in err, "finished runs are read"
