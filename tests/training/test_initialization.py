"""Runs that load parts of other checkpoints, or an error that names what is missing."""

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest

from mplug2_jax.errors import UserError
from mplug2_jax.model.config import SpecialTokens
from mplug2_jax.model.vision import resize_positions
from mplug2_jax.objectives.config import DistillationConfig
from mplug2_jax.parallel.config import MeshConfig
from mplug2_jax.parallel.mesh import make_mesh
from mplug2_jax.tasks.config import TasksConfig
from mplug2_jax.training.checkpoint.checkpoints import Checkpoints
from mplug2_jax.training.checkpoint.metadata import DataPosition, ModelMetadata
from mplug2_jax.training.config import CheckpointConfig, TokenizerConfig
from mplug2_jax.training.initialization import init_or_load_state, with_checkpoint_sizes
from mplug2_jax.training.optim.partition import partition
from mplug2_jax.training.state import RunSpec, make_run_spec
from mplug2_jax.training.workdir import WorkDir
from tests.close import assert_close, assert_equal
from tests.runs import small_model, small_run


def make_spec(**overrides: Any) -> RunSpec:
    """Return the spec of a text model; with ``clips=True`` of a model of video clips and captions."""
    streams = small_run().streams
    selected = {"video_text": dataclasses.replace(streams["video_text"], objectives={"vlc": 1.0})}
    if not overrides.pop("clips", False):
        selected = {"text": dataclasses.replace(streams["text"], objectives={"mlm": 1.0})}
    return make_run_spec(
        small_run(evaluations={}, streams=selected, **overrides), SpecialTokens(), make_mesh(MeshConfig())
    )


def save_checkpoint(folder: Path, spec: RunSpec, state: dict[str, Any]) -> Path:
    identity = ModelMetadata(spec.config.model, spec.model_def.parts)
    checkpoints = Checkpoints(folder / "checkpoints", CheckpointConfig(), model=identity)
    checkpoints.save(state, DataPosition(3, {}))
    checkpoints.close()
    return folder


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """Return a function that returns what initialization has logged."""
    caplog.set_level(logging.INFO, logger="absl")
    return lambda: [record.getMessage() for record in caplog.records if record.filename == "initialization.py"]


TAUGHT = TasksConfig(distillation=DistillationConfig())


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Return a checkpoint with a teacher that differs from the parameters, and its state."""
    spec = make_spec(seed=7, tasks=TAUGHT)
    state = spec.init()
    state["teacher"] = jax.tree.map(lambda x: x + 1, state["teacher"])
    return save_checkpoint(tmp_path_factory.mktemp("start"), spec, state), state


def test_all_parts_of_a_checkpoint_are_loaded_with_its_teacher(
    source: tuple[Path, dict[str, Any]], log: Callable[[], list[str]]
) -> None:
    folder, expected = source
    spec = make_spec(init_from=str(folder), tasks=TAUGHT)
    state = init_or_load_state(spec)
    assert_equal(state["params"], expected["params"])
    assert_equal(state["teacher"], expected["teacher"])
    assert int(state["step"]) == 0
    assert log()[-1] == f"initializing from {folder} (step 3): mlm, text, universal"
    assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding == s.sharding, state["params"], spec.shapes["params"]))


def test_a_run_takes_the_sizes_of_the_checkpoint(
    source: tuple[Path, dict[str, Any]], log: Callable[[], list[str]]
) -> None:
    folder, _ = source
    source_config = make_spec().config
    wide = small_model(width=64, heads=4, vocab_size=999, decoder_layers=3, vision_width=64, contrastive_width=8)
    config = dataclasses.replace(source_config, model=wide, init_from=str(folder))
    sized = with_checkpoint_sizes(config, (), None)
    # Loaded parts are resized; other parts and overridden fields stay as in the recipe.
    assert sized.model == dataclasses.replace(wide, width=32, heads=2, vocab_size=256)
    assert log()[-1].endswith(f"{folder}: heads 2 (not 4), vocab_size 256 (not 999), width 32 (not 64)")
    overridden = with_checkpoint_sizes(config, ("--config.model.vocab_size=999",), None)
    assert overridden.model == dataclasses.replace(wide, width=32, heads=2)
    before = log()
    assert with_checkpoint_sizes(sized, (), None) == sized
    assert log() == before
    assert with_checkpoint_sizes(dataclasses.replace(config, init_from=""), (), None).model == wide
    # A resumed run has the sizes in its own config: the source checkpoint may be gone.
    gone = dataclasses.replace(config, init_from=str(folder / "gone"))
    previous = dataclasses.replace(sized, init_from=gone.init_from)
    assert with_checkpoint_sizes(gone, (), previous).model == sized.model
    with pytest.raises(UserError, match="gone holds no checkpoint"):
        with_checkpoint_sizes(gone, (), None)


def test_a_step_can_be_named_and_a_new_teacher_is_a_copy(source: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    _, expected = source
    folder = save_checkpoint(tmp_path, make_spec(), {"params": expected["params"]})
    state = init_or_load_state(make_spec(init_from=str(folder / "checkpoints" / "3"), tasks=TAUGHT))
    assert_equal(state["teacher"], expected["params"])


def test_parts_can_be_selected_and_others_are_fresh(
    source: tuple[Path, dict[str, Any]], log: Callable[[], list[str]]
) -> None:
    folder, expected = source
    spec = make_spec(init_from=str(folder), init_parts=("text",))
    state = init_or_load_state(spec)
    assert_equal(state["params"]["text"], expected["params"]["text"])
    assert_equal(state["params"]["mlm"], spec.init()["params"]["mlm"])
    assert log()[-1].endswith(": text; fresh: mlm, universal")


@pytest.mark.slow
def test_a_checkpoint_of_an_image_model_gets_fresh_temporal_units(tmp_path: Path, log: Callable[[], list[str]]) -> None:
    streams = small_run().streams
    images = {"image_text": dataclasses.replace(streams["image_text"], objectives={"vlc": 1.0})}
    image_spec = make_run_spec(
        small_run(evaluations={}, streams=images, seed=7), SpecialTokens(), make_mesh(MeshConfig())
    )  # fmt: skip
    expected = image_spec.init()
    folder = save_checkpoint(tmp_path, image_spec, expected)
    spec = make_spec(clips=True, init_from=str(folder), init_parts=("vision", "temporal"))
    state = init_or_load_state(spec)
    temporal, others = partition(state["params"], set(spec.model_def.parts) - {"temporal"})
    assert_equal(others["vision"], expected["params"]["vision"] | {"blocks": others["vision"]["blocks"]})
    assert_equal(others["vision"]["blocks"], expected["params"]["vision"]["blocks"])
    assert_equal(temporal["vision"], partition(spec.init()["params"], {"vision"})[0]["vision"])
    assert log()[-1].endswith(": vision; fresh: contrastive, text, universal, temporal")


def test_missing_parts_are_named_with_the_remedy(source: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = source
    with pytest.raises(UserError) as error:
        init_or_load_state(make_spec(clips=True, init_from=str(folder)))
    assert f"config.init_from={folder} lacks contrastive, vision (it has mlm, text, universal)" in str(error.value)
    assert "set config.init_parts to text, universal" in str(error.value)
    with pytest.raises(UserError, match=r"config\.init_parts names 'txt': did you mean 'text'\?"):
        init_or_load_state(make_spec(init_from=str(folder), init_parts=("txt",)))


def test_parts_of_another_size_are_named(source: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = source
    with pytest.raises(UserError, match="is of another size: params/"):
        init_or_load_state(make_spec(init_from=str(folder), model=small_model(mlp_width=96)))


def test_a_missing_checkpoint_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no checkpoint; expected a work directory"):
        init_or_load_state(make_spec(init_from=str(tmp_path)))


@pytest.mark.slow
def test_another_image_size_resizes_the_position_table_alone(tmp_path: Path, log: Callable[[], list[str]]) -> None:
    before = make_spec(clips=True, seed=7)
    expected = before.init()["params"]
    folder = save_checkpoint(tmp_path, before, {"params": expected})
    state = init_or_load_state(make_spec(clips=True, init_from=str(folder), model=small_model(image_size=32)))
    table = expected["vision"].pop("positions")
    assert_close(state["params"]["vision"].pop("positions"), resize_positions(table, 4))
    assert log()[-1] == "resized the position table from 5 to 17 rows"
    assert_equal(state["params"], expected)


def test_word_tables_are_loaded_with_their_tokenizer(tmp_path: Path) -> None:
    first = small_run(tokenizer=TokenizerConfig(vocab_size=90))
    old = WorkDir(tmp_path / "first")
    old.initialize(first, old.load_tokenizer(first))
    new = WorkDir(tmp_path / "second")
    for start, parts, size in (
        (old.path, (), 90), (old.checkpoints, ("text",), 90),
        (old.checkpoints / "3", ("decoder", "vision"), 90),
        (old.path, ("vision",), 120), (tmp_path / "elsewhere", (), 120), ("", (), 120),
    ):  # fmt: skip
        config = small_run(init_from=str(start), init_parts=parts, tokenizer=TokenizerConfig(vocab_size=120))
        assert new.load_tokenizer(config).vocab_size == size
    path = str(new.load_tokenizer(small_run(tokenizer=TokenizerConfig(vocab_size=100))).save(tmp_path / "third"))
    named = small_run(init_from=str(old.path), tokenizer=TokenizerConfig(path=path))
    assert new.load_tokenizer(named).vocab_size == 100
