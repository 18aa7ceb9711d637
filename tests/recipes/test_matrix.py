"""Every recipe of a task, from data in its public format to a report: trained, saved, evaluated, reported."""

import json
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from data_pipelines.digitworld import vocabulary_texts
from data_pipelines.tokenizers import train_wordpiece
from mplug2_jax.cli.main import main
from mplug2_jax.config import build, load_recipe, shipped_recipes
from mplug2_jax.training.config import RunConfig
from tests.recipes import public_data

# Those on data sets of TFDS are in test_tfds.py.
RECIPES = sorted(
    name for name, path in shipped_recipes().items() if path.parent.name == "tasks" and "TFDS" not in path.read_text()
)
# The first recipe of each combination of tasks runs on all devices and is evaluated again from its checkpoint.
FIRST = {
    frozenset(e.task for e in build(RunConfig, load_recipe(f"{p}:tiny")).evaluations.values()): p for p in RECIPES[::-1]
}
SMALL = {
    "steps": 2, "log_every": 1, "checkpoint.every_steps": 2, "model.vision_layers": 1, "model.text_layers": 1,
    "model.fusion_layers": 1, "model.decoder_layers": 1, "model.universal_layers": 1, "tasks.search.num_beams": 2,
    "mesh.fsdp": 1, "mesh.data": -1, "streams.set.data.visual.num_frames": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train one tokenizer for all recipes: training one each takes longer than their steps."""
    return train_wordpiece(vocabulary_texts(200), 512).save(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module", autouse=True)
def _data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Write all data sets where the recipes look for them."""
    folder = tmp_path_factory.mktemp("data")
    public_data.make(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MPLUG2_DATA", str(folder))
        yield


def overrides(config: RunConfig, vocabulary: Path) -> list[str]:
    fields: dict[str, object] = {f"evaluations.{name}.data.visual.num_frames": 2 for name in config.evaluations}
    if any(evaluation.task == "classify" for evaluation in config.evaluations.values()):
        fields["model.num_classes"] = 1000  # Kinetics and SSv2 then share one compiled program
    return [f"--config.{field}={value}" for field, value in (SMALL | fields | {"tokenizer.path": vocabulary}).items()]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_task_from_its_public_files_to_a_report(
    recipe: str, vocabulary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    if recipe not in FIRST.values():
        single = jax.devices()[:1]
        monkeypatch.setattr(jax, "devices", lambda: single)
    config = build(RunConfig, load_recipe(f"{recipe}:tiny"))
    run = tmp_path / "run"
    assert main(["train", "--config", f"{recipe}:tiny", "--workdir", str(run), *overrides(config, vocabulary)]) == 0
    out = capsys.readouterr().out
    assert not (run / "data-errors.jsonl").exists(), (run / "data-errors.jsonl").read_text()
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < line["loss"] < 1e3 for line in metrics if "loss" in line)
    for name, evaluation in config.evaluations.items():
        result = json.loads((run / "evaluations" / "2" / f"{name}.json").read_text())
        assert result["task"] == evaluation.task
        assert result["num_examples"] >= 2
        assert result["metrics"].keys() == result["baselines"].keys() == result["confidence_intervals"].keys()
        assert not result["skipped"]
        assert len((run / "evaluations" / "2" / f"{name}.jsonl").read_text().splitlines()) == result["num_examples"]
        assert name in out
    assert "<svg" in (run / "report.html").read_text()
    if recipe not in FIRST.values():
        return
    assert main(["eval", "--workdir", str(run)]) == 0
    again = json.loads((run / "evaluations" / "2" / f"{name}.json").read_text())
    assert again["metrics"] == result["metrics"]  # from the checkpoint


@pytest.mark.slow
def test_captioning_by_reward_from_public_files(vocabulary: Path, tmp_path: Path) -> None:
    changes = overrides(build(RunConfig, load_recipe("msvd_caption:tiny")), vocabulary)
    supervised, rewarded = tmp_path / "supervised", tmp_path / "rewarded"
    assert main(["train", "--config", "msvd_caption:tiny", "--workdir", str(supervised), *changes]) == 0
    start = f"--config.init_from={supervised}"
    assert main(["train", "--config", "msvd_caption:tiny,scst", "--workdir", str(rewarded), start, *changes]) == 0
    assert not (rewarded / "data-errors.jsonl").exists()
    metrics = [json.loads(line) for line in (rewarded / "metrics.jsonl").read_text().splitlines()]
    assert [line["set/scst/length"] > 0 for line in metrics if "loss" in line] == [True, True]
    result = json.loads((rewarded / "evaluations" / "2" / "test.json").read_text())
    assert (result["task"], result["num_examples"]) == ("caption", public_data.TEST)


@pytest.mark.slow
def test_zero_shot_classification_by_a_retrieval_run(vocabulary: Path, tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    changes = overrides(build(RunConfig, load_recipe("coco_retrieval:tiny")), vocabulary)
    assert main(["train", "--config", "coco_retrieval:tiny", "--workdir", str(run), *changes]) == 0
    args = ["--config", "imagenet:tiny,zero_shot", "--checkpoint", str(run), "--out", str(out)]
    assert main(["eval", *args, "--config.mesh.fsdp=1", "--config.mesh.data=8"]) == 0
    result = json.loads((out / "val.json").read_text())
    assert (result["task"], result["recipe"]) == ("zero_shot", "imagenet")
    assert result["metrics"].keys() == {"top_1", "top_5"}
    assert (out / "report.html").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "batch_size"), [("tgif_frameqa", 8), ("msvd_caption", 16)])
def test_released_variants_train_on_public_files(
    recipe: str, batch_size: int, vocabulary: Path, tmp_path: Path
) -> None:
    spec = f"{recipe}:tiny,released"
    changes = overrides(build(RunConfig, load_recipe(spec)), vocabulary)
    changes = [each.replace("streams.set", "streams.video") for each in changes]
    changes.append(f"--config.streams.video.data.batch_size={batch_size}")
    assert main(["train", "--config", spec, "--workdir", str(tmp_path / "run"), *changes]) == 0
    assert not (tmp_path / "run" / "data-errors.jsonl").exists()
    result = json.loads((tmp_path / "run" / "evaluations" / "2" / "test.json").read_text())
    assert (result["recipe"], result["num_examples"]) == (recipe, public_data.TEST)
