"""Every field of a run's config has a description, and docs/config.md is up to date."""

import dataclasses
import os
from pathlib import Path

import pytest

from mplug2_jax.config import build, load_recipe, override
from mplug2_jax.fields import config_groups, describe_type, field_descriptions, iter_fields, render_markdown
from mplug2_jax.training.config import OptimizerConfig, RunConfig
from tests.cli.conftest import mplug2

HEAD = """# Every field of a run

A recipe sets these fields and `--config.FIELD=VALUE` overrides them. `mplug2 config RECIPE` prints them with the values
of a recipe, and `--only WORD` selects fields by name or meaning. This page is generated from the dataclasses in each
package's `config.py`: `RENEW=1 pytest tests/test_fields.py` regenerates it.

The kind of a field says whether a run may [resume with another value](runs.md#resuming-with-other-settings): always
(runtime, execution), or with `--force-change` (training). All fields below `config.evaluations` are runtime.

"""


@pytest.mark.parametrize("name", ["demo", "finetune:caption,tiny", "released:videoqa,tiny", "msrvtt_qa"])
def test_every_field_of_a_recipe_is_explained(name: str) -> None:
    fields = list(iter_fields(build(RunConfig, load_recipe(name))))
    assert [field.path for field in fields if not field.description or not field.type] == []


def test_every_field_can_be_overridden() -> None:
    recipe = load_recipe("demo")
    for field in iter_fields(build(RunConfig, recipe)):
        if isinstance(field.value, int | float | str):
            override(recipe, [f"--config.{field.path}={field.value}"])


def test_types_are_described_in_words() -> None:
    hints = {field.name: field.type for field in dataclasses.fields(OptimizerConfig)}
    assert describe_type(hints["vision_learning_rate"]) == "float or none"
    assert describe_type(hints["decay_mask"]) == "kernels | released"
    assert describe_type(tuple[int, ...]) == "(int, ...)"


def test_the_comment_after_a_field_is_its_description() -> None:
    assert (
        field_descriptions(OptimizerConfig)["clip_norm"]
        == "global norm of the gradient above which it is scaled down; 0 = no clipping"
    )
    assert config_groups(RunConfig)[OptimizerConfig] == "config.optimizer"


def test_the_page_matches_the_dataclasses(repository: Path) -> None:
    """RENEW=1 regenerates it."""
    path, expected = repository / "docs" / "config.md", HEAD + render_markdown(RunConfig)
    if os.environ.get("RENEW"):
        path.write_text(expected, encoding="utf-8")
    assert path.read_text(encoding="utf-8") == expected, "RENEW=1 pytest tests/test_fields.py regenerates the page"


def test_the_command_prints_overrides_with_their_descriptions() -> None:
    shown = mplug2("config", "demo", "--only", "clip_norm", "--config.optimizer.clip_norm=2.5")
    (line,) = shown.out.splitlines()
    assert line.startswith("--config.optimizer.clip_norm=2.5  # global norm of the gradient")
    wrong = mplug2("config", "demo", "--only", "learnign_rate")
    assert wrong.status == 2
    assert "did you mean 'learning_rate'?" in wrong.err
