"""Runs that start from other checkpoints: whole parts, or a sentence that says what is missing."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from mplug2_jax.errors import UserError
from mplug2_jax.model.config import SpecialTokens
from mplug2_jax.model.vision import resize_positions
from mplug2_jax.objectives.config import DistillationConfig
from mplug2_jax.parallel.config import MeshConfig
from mplug2_jax.parallel.mesh import make_mesh
from mplug2_jax.tasks.config import TaskSettings
from mplug2_jax.training.checkpoint.checkpoints import Checkpoints
from mplug2_jax.training.checkpoint.metadata import DataPosition, ModelMetadata
from mplug2_jax.training.config import CheckpointConfig, TokenizerConfig
from mplug2_jax.training.initialization import init_or_load_state, with_checkpoint_sizes
from mplug2_jax.training.optim.partition import partition
from mplug2_jax.training.state import RunSpec, make_run_spec
from mplug2_jax.training.workdir import WorkDir
from tests.close import assert_close
from tests.runs import small_model, small_run


def make_spec(**overrides: Any) -> RunSpec:
    """A model of text alone; ``clips=True``: of clips with their captions."""
    streams = small_run().streams
    chosen = {"video_text": dataclasses.replace(streams["video_text"], objectives={"vlc": 1.0})}
    if not overrides.pop("clips", False):
        chosen = {"text": dataclasses.replace(streams["text"], objectives={"mlm": 1.0})}
    return make_run_spec(
        small_run(evaluations={}, streams=chosen, **overrides), SpecialTokens(), make_mesh(MeshConfig())
    )


def saved(folder: Path, spec: RunSpec, state: dict[str, Any]) -> Path:
    identity = ModelMetadata(spec.config.model, spec.definition.parts)
    checkpoints = Checkpoints(folder / "checkpoints", CheckpointConfig(), model=identity)
    checkpoints.save(state, DataPosition(3, {}))
    checkpoints.wait_until_finished()
    checkpoints.close()
    return folder


@pytest.fixture(autouse=True)
def _logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="absl")


TAUGHT = TaskSettings(distillation=DistillationConfig())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A checkpoint with a teacher of its own, and its state."""
    spec = make_spec(seed=7, tasks=TAUGHT)
    state = spec.init()
    state["teacher"] = jax.tree.map(lambda x: x + 1, state["teacher"])
    return saved(tmp_path_factory.mktemp("start"), spec, state), state


def assert_equal(one: Any, other: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_a_run_starts_from_all_of_a_checkpoint_its_teacher_too(
    whole: tuple[Path, dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    folder, theirs = whole
    spec = make_spec(init_from=str(folder), tasks=TAUGHT)
    state = init_or_load_state(spec)
    assert_equal(state["params"], theirs["params"])
    assert_equal(state["teacher"], theirs["teacher"])
    assert int(state["step"]) == 0
    assert caplog.messages[-1] == f"initializing from {folder} (step 3): mlm, text, universal"
    assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding == s.sharding, state["params"], spec.shapes["params"]))


def test_a_run_has_the_sizes_of_what_it_starts_from(
    whole: tuple[Path, dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    folder, _ = whole
    theirs = make_spec().config
    wide = small_model(width=64, heads=4, vocab_size=999, decoder_layers=3, vision_width=64, contrastive_width=8)
    own = dataclasses.replace(theirs, model=wide, init_from=str(folder))
    sized = with_checkpoint_sizes(own, (), None)
    # What it takes is sized; other parts, and what is set by hand, stay as the recipe has them.
    assert sized.model == dataclasses.replace(wide, width=32, heads=2, vocab_size=256)
    assert caplog.messages[-1].endswith(f"{folder}: heads 2 (not 4), vocab_size 256 (not 999), width 32 (not 64)")
    by_hand = with_checkpoint_sizes(own, ("--config.model.vocab_size=999",), None)
    assert by_hand.model == dataclasses.replace(wide, width=32, heads=2)
    caplog.clear()
    assert with_checkpoint_sizes(sized, (), None) == sized
    assert caplog.messages == []
    assert with_checkpoint_sizes(dataclasses.replace(own, init_from=""), (), None).model == wide
    # A run that goes on asks its own config: what it started from may be gone.
    gone = dataclasses.replace(own, init_from=str(folder / "gone"))
    previous = dataclasses.replace(sized, init_from=gone.init_from)
    assert with_checkpoint_sizes(gone, (), previous).model == sized.model
    with pytest.raises(UserError, match="gone holds no checkpoint"):
        with_checkpoint_sizes(gone, (), None)


def test_a_step_can_be_named_and_a_teacher_starts_as_a_copy(whole: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    _, theirs = whole
    folder = saved(tmp_path, make_spec(), {"params": theirs["params"]})
    state = init_or_load_state(make_spec(init_from=str(folder / "checkpoints" / "3"), tasks=TAUGHT))
    assert_equal(state["teacher"], theirs["params"])


def test_parts_can_be_chosen_and_the_rest_is_fresh(
    whole: tuple[Path, dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    folder, theirs = whole
    spec = make_spec(init_from=str(folder), init_parts=("text",))
    state = init_or_load_state(spec)
    assert_equal(state["params"]["text"], theirs["params"]["text"])
    assert_equal(state["params"]["mlm"], spec.init()["params"]["mlm"])
    assert caplog.messages[-1].endswith(": text; fresh: mlm, universal")


@pytest.mark.slow
def test_clips_start_from_what_saw_pictures_alone_with_fresh_temporal_units(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    streams = small_run().streams
    pictures = {"image_text": dataclasses.replace(streams["image_text"], objectives={"vlc": 1.0})}
    still = make_run_spec(
        small_run(evaluations={}, streams=pictures, seed=7), SpecialTokens(), make_mesh(MeshConfig())
    )  # fmt: skip
    theirs = still.init()
    folder = saved(tmp_path, still, theirs)
    spec = make_spec(clips=True, init_from=str(folder), init_parts=("vision", "temporal"))
    state = init_or_load_state(spec)
    units, others = partition(state["params"], set(spec.definition.parts) - {"temporal"})
    assert_equal(others["vision"], theirs["params"]["vision"] | {"blocks": others["vision"]["blocks"]})
    assert_equal(others["vision"]["blocks"], theirs["params"]["vision"]["blocks"])
    assert_equal(units["vision"], partition(spec.init()["params"], {"vision"})[0]["vision"])
    assert caplog.messages[-1].endswith(": vision; fresh: contrastive, text, universal, temporal")


def test_parts_that_are_missing_are_named_with_the_remedy(whole: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = whole
    with pytest.raises(UserError) as error:
        init_or_load_state(make_spec(clips=True, init_from=str(folder)))
    assert f"config.init_from={folder} lacks contrastive, vision (it has mlm, text, universal)" in str(error.value)
    assert "set config.init_parts to text, universal" in str(error.value)
    with pytest.raises(UserError, match=r"config\.init_parts names 'txt': did you mean 'text'\?"):
        init_or_load_state(make_spec(init_from=str(folder), init_parts=("txt",)))


def test_parts_of_another_size_are_named(whole: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = whole
    with pytest.raises(UserError, match="is of another size: params/"):
        init_or_load_state(make_spec(init_from=str(folder), model=small_model(mlp_width=96)))


def test_nothing_there_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no checkpoint; expected a work directory"):
        init_or_load_state(make_spec(init_from=str(tmp_path)))


@pytest.mark.slow
def test_another_image_size_resizes_the_position_table_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = make_spec(clips=True, seed=7)
    theirs = before.init()["params"]
    folder = saved(tmp_path, before, {"params": theirs})
    state = init_or_load_state(make_spec(clips=True, init_from=str(folder), model=small_model(image_size=32)))
    table = theirs["vision"].pop("positions")
    assert_close(state["params"]["vision"].pop("positions"), resize_positions(table, 4))
    assert caplog.messages[-1] == "resized the position table from 5 to 17 rows"
    assert_equal(state["params"], theirs)


def test_words_bring_their_tokeniser(tmp_path: Path) -> None:
    first = small_run(tokenizer=TokenizerConfig(vocab_size=90))
    theirs = WorkDir(tmp_path / "first")
    theirs.initialize(first, theirs.load_tokenizer(first))
    own = WorkDir(tmp_path / "second")
    for start, parts, size in (
        (theirs.path, (), 90), (theirs.checkpoints, ("text",), 90),
        (theirs.checkpoints / "3", ("decoder", "vision"), 90),
        (theirs.path, ("vision",), 120), (tmp_path / "elsewhere", (), 120), ("", (), 120),
    ):  # fmt: skip
        config = small_run(init_from=str(start), init_parts=parts, tokenizer=TokenizerConfig(vocab_size=120))
        assert own.load_tokenizer(config).vocab_size == size
    path = str(own.load_tokenizer(small_run(tokenizer=TokenizerConfig(vocab_size=100))).save(tmp_path / "third"))
    named = small_run(init_from=str(theirs.path), tokenizer=TokenizerConfig(path=path))
    assert own.load_tokenizer(named).vocab_size == 100
