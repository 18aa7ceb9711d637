"""Every shipped recipe makes a run; the released ones have the release's quirks, ours none."""

from pathlib import Path

import pytest

from mplug2_jax.config import build, load_recipe
from mplug2_jax.errors import UserError
from mplug2_jax.training.config import RunConfig

SPECS = ("demo", "released", "released:caption", "released:videoqa,base", "released:caption,tiny")


@pytest.mark.parametrize("spec", SPECS)
def test_it_is_a_whole_run(spec: str) -> None:
    config = build(RunConfig, load_recipe(spec))
    assert config.parts()
    assert config.evaluations


def test_every_recipe_file_is_tried_here(repository: Path) -> None:
    shipped = {path.stem for path in (repository / "configs").glob("*.py")}
    assert shipped == {spec.partition(":")[0] for spec in SPECS}


def test_quirks_are_on_in_the_released_recipes_and_off_in_ours() -> None:
    ours, caption, answers = (
        build(RunConfig, load_recipe(spec)) for spec in ("demo", "released:caption", "released:videoqa")
    )
    for quirky in (caption, answers):
        stream = next(iter(quirky.streams.values())).data
        assert quirky.optimizer.decay == "released"
        assert quirky.optimizer.clip_norm == 0
        assert quirky.schedule.kind.startswith("released")
        assert quirky.tasks.search.extend_finished
        assert quirky.model.positions_init == "zeros"
        assert stream.examples.form == "released"
        assert (stream.visual.transform, stream.visual.sampling) == ("released_train", "random")
        heldout = next(iter(quirky.evaluations.values())).data.visual
        assert (heldout.transform, heldout.sampling) == ("released_test", "middle")
    assert next(iter(caption.streams.values())).data.examples.prompt == "a video of"
    assert caption.tasks.distillation is None
    inert = answers.tasks.distillation
    assert inert is not None
    assert (inert.alpha, inert.over, inert.fusion) == (0.0, "time", False)

    assert ours.optimizer.decay == "matrices"
    assert ours.schedule.kind == "cosine"
    assert not ours.tasks.search.extend_finished
    assert ours.model.positions_init == "normal"
    assert ours.tasks.distillation is None
    assert all(stream.data.examples.form == "standard" for stream in ours.streams.values())


@pytest.mark.parametrize("spec", ["released:captions", "released:caption,huge"])
def test_unknown_arguments_name_the_valid_ones(spec: str) -> None:
    with pytest.raises(UserError, match=r"did you mean 'caption'|valid: base, large, tiny"):
        load_recipe(spec)
