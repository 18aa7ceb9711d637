"""Every field of a run's config has a meaning, and docs/config.md says the same as ``mplug2 config``."""

import dataclasses
import os
from pathlib import Path

import pytest

from mplug2_jax.config import build, load_recipe, override
from mplug2_jax.fields import config_groups, describe_type, field_descriptions, iter_fields, markdown
from mplug2_jax.training.config import AdamWConfig, RunConfig
from tests.cli.conftest import command

HEAD = """# Every field of a run

What a recipe may set, and `--config.FIELD=VALUE` overrides. `mplug2 config RECIPE` prints the same of one recipe, with
its values, and with `--only WORD` what has to do with a word. The page is made of the dataclasses of each room's
`config.py`: `RENEW=1 pytest tests/test_fields.py` renews it.

"""


@pytest.mark.parametrize("name", ["demo", "finetune:caption,tiny", "released:videoqa,tiny", "msrvtt_qa"])
def test_every_field_of_a_recipe_is_explained(name: str) -> None:
    fields = list(iter_fields(build(RunConfig, load_recipe(name))))
    assert [field.path for field in fields if not field.meaning or not field.valid] == []


def test_fields_are_those_that_overrides_know() -> None:
    recipe = load_recipe("demo")
    for field in iter_fields(build(RunConfig, recipe)):
        if isinstance(field.value, int | float | str):
            override(recipe, [f"--config.{field.path}={field.value}"])


def test_values_that_a_type_takes_in_words() -> None:
    hints = {field.name: field.type for field in dataclasses.fields(AdamWConfig)}
    assert describe_type(hints["vision_learning_rate"]) == "float or none"
    assert describe_type(hints["decay_mask"]) == "kernels | released"
    assert describe_type(tuple[int, ...]) == "(int, ...)"


def test_a_comment_behind_a_field_is_its_meaning() -> None:
    assert field_descriptions(AdamWConfig)["clip_norm"] == "of the gradient over all parameters; 0 = no clipping"
    assert config_groups(RunConfig)[AdamWConfig] == "config.optimizer"


def test_the_page_says_what_the_dataclasses_do(repository: Path) -> None:
    """RENEW=1 writes it anew."""
    path, made = repository / "docs" / "config.md", HEAD + markdown(RunConfig)
    if os.environ.get("RENEW"):
        path.write_text(made, encoding="utf-8")
    assert made == path.read_text(encoding="utf-8"), "RENEW=1 pytest tests/test_fields.py renews the page"


def test_the_command_prints_overrides_with_their_meanings() -> None:
    shown = command("config", "demo", "--only", "clip_norm", "--config.optimizer.clip_norm=2.5")
    (line,) = shown.out.splitlines()
    assert line.startswith("--config.optimizer.clip_norm=2.5  # of the gradient over all parameters")
    wrong = command("config", "demo", "--only", "learnign_rate")
    assert wrong.status == 2
    assert "did you mean 'learning_rate'?" in wrong.err
