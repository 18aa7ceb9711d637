"""Evaluation of checkpoints: only the needed parts are read, and the EMA parameters if there are any."""

from pathlib import Path
from typing import Any

import jax
import pytest

from data_pipelines.config import DataConfig, ExampleConfig, InstructionConfig, SourceConfig
from mplug2_jax.evaluation.config import EvaluationConfig
from mplug2_jax.inference.checkpoint_eval import CheckpointEvaluator, CheckpointSource
from mplug2_jax.parallel.config import MeshConfig
from mplug2_jax.parallel.mesh import make_mesh
from mplug2_jax.training.checkpoint.checkpoints import Checkpoints
from mplug2_jax.training.checkpoint.metadata import DataPosition, ModelMetadata
from mplug2_jax.training.config import CheckpointConfig, RunConfig
from mplug2_jax.training.state import make_run_spec
from mplug2_jax.training.workdir import WorkDir, special_tokens
from tests.close import assert_equal
from tests.runs import SMALL, recipe_file, small_run

FREEZE = ("text", "universal", "mlm")


def heldout(task: str, kind: str, examples: ExampleConfig) -> EvaluationConfig:
    sources = {"digits": SourceConfig(kind=kind, split="heldout", max_records=3)}
    return EvaluationConfig(
        task=task, data=DataConfig(sources=sources, visual=SMALL, examples=examples, batch_size=8), num_samples=0
    )


def run_config(**overrides: Any) -> RunConfig:
    """Return a run with all parts, and an evaluation of parts that the EMA does not cover."""
    instructions = {"caption": InstructionConfig(templates=("what?",))}
    evaluations = {
        "words": heldout("mlm", "text", ExampleConfig(text="sentence", text_length=12)),
        "captions": heldout(
            "caption", "image", ExampleConfig(instructions=instructions, instruction_length=6, target_length=6)
        ),
    }
    return small_run(evaluations=evaluations, mesh=MeshConfig(fsdp=8), **overrides)


@pytest.fixture(scope="module")
def state() -> dict[str, Any]:
    return {}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, state: dict[str, Any]) -> Path:
    """Save a run with two checkpoints, whose EMA parameters differ from its parameters; its recipe has no EMA."""
    path, config = tmp_path_factory.mktemp("runs") / "run", run_config(ema_decay=0.9, freeze=FREEZE)
    workdir = WorkDir(path)
    tokenizer = workdir.load_tokenizer(config)
    workdir.initialize(config, tokenizer)
    spec = make_run_spec(config, special_tokens(tokenizer), make_mesh(config.mesh))
    state |= spec.init()
    state["ema"] = jax.tree.map(lambda x: x + 1, state["ema"])
    identity = ModelMetadata(config.model, spec.model_def.parts)
    checkpoints = Checkpoints(workdir.checkpoints, CheckpointConfig(), model=identity)
    for step in (3, 4):
        checkpoints.save(state, DataPosition(step, {}))
    checkpoints.close()
    recipe_file(run_config(), path.parent / "recipe.py")
    return path


def sources(run: Path, *overrides: str) -> list[CheckpointSource]:
    return [
        CheckpointSource.from_workdir(run, overrides),
        CheckpointSource.from_recipe(str(run.parent / "recipe.py"), run, overrides),
    ]


@pytest.mark.slow
def test_the_ema_parameters_are_evaluated_unless_disabled(run: Path, state: dict[str, Any]) -> None:
    for source, last in zip(sources(run), sources(run, "--config.ema_decay=0"), strict=True):
        assert (source.use_ema, last.use_ema) == (True, False)
        ema, step = CheckpointEvaluator(source, ["captions"]).read(None)
        assert step == 4
        assert_equal(ema["vision"]["positions"], state["ema"]["vision"]["positions"])
        assert_equal(ema["decoder"], state["ema"]["decoder"])
        assert_equal(ema["text"], state["params"]["text"])  # frozen, so not in the EMA
        assert_equal(CheckpointEvaluator(last, ["captions"]).read(3)[0]["decoder"], state["params"]["decoder"])


@pytest.mark.slow
def test_only_what_evaluations_need_is_read(run: Path) -> None:
    for source in sources(run):
        words, _ = CheckpointEvaluator(source, ["words"]).read(4)
        assert set(words) == set(FREEZE)
        captions, _ = CheckpointEvaluator(source, ["captions"]).read(4)
        # The model has fusion, so captions are requested by an instruction.
        assert set(captions) == {"vision", "text", "universal", "fusion", "decoder"}
        assert not any(name.startswith("temporal") for name in captions["vision"]["blocks"])
        assert {leaf.dtype.name for leaf in jax.tree.leaves(captions)} == {"float32"}


@pytest.mark.slow
def test_a_run_without_universal_layers_is_evaluated(tmp_path: Path) -> None:
    config, workdir = run_config(use_universal_layers=False), WorkDir(tmp_path)
    tokenizer = workdir.load_tokenizer(config)
    workdir.initialize(config, tokenizer)
    spec = make_run_spec(config, special_tokens(tokenizer), make_mesh(config.mesh))
    checkpoints = Checkpoints(workdir.checkpoints, CheckpointConfig())
    checkpoints.save(spec.init(), DataPosition(1, {}))
    checkpoints.close()
    evaluator = CheckpointEvaluator(CheckpointSource.from_workdir(tmp_path, ()), ["words"])
    params, step = evaluator.read(None)
    assert set(params) == {"text", "mlm"}
    (result,) = evaluator.run(params, step, ["words"], lambda phase: None)
    assert result.num_examples == 3


@pytest.mark.slow
def test_one_program_serves_all_checkpoints(run: Path) -> None:
    evaluator = CheckpointEvaluator(CheckpointSource.from_workdir(run, ()))
    results = []
    for step in (3, 4):
        params, _ = evaluator.read(step)
        results.append(list(evaluator.run(params, step, ["words", "captions"], lambda phase: None)))
    assert [[(result.step, result.name, result.num_examples) for result in each] for each in results] == [
        [(step, name, 3) for name in ("words", "captions")] for step in (3, 4)
    ]
    first, second = ([(result.predictions, result.metrics) for result in each] for each in results)
    assert first == second
    assert {evaluation._predict._cache_size() for evaluation in evaluator.evaluations.values()} == {1}
