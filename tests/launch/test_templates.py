"""Every rendered value is one word or one value of its file."""

import os
import subprocess
from pathlib import Path

import jinja2
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mplug2_jax.launch.templates import launch_folder, quote_command, quote_word, quote_yaml, render
from tests.launch.jobs import HOSTILE


def parse_words(script: str) -> list[bytes]:
    """Return the words that bash parses."""
    done = subprocess.run(
        ["bash", "-c", os.fsencode(f"printf '%s\\0' {script}")], capture_output=True, timeout=20, check=True
    )
    assert done.stderr == b""
    return done.stdout.split(b"\0")[:-1]


@given(st.lists(HOSTILE, min_size=1, max_size=4))
def test_bash_parses_every_quoted_word(words: list[str]) -> None:
    assert parse_words(quote_command(["x" * 200, *words]))[1:] == [os.fsencode(word) for word in words]
    assert parse_words(quote_command(words)) == [os.fsencode(word) for word in words]


@given(HOSTILE)
def test_a_word_is_one_line_of_printable_characters(word: str) -> None:
    assert quote_word(word).isprintable()


@given(HOSTILE.filter(lambda text: "\udcff" not in text))
def test_yaml_parses_every_quoted_value(value: str) -> None:
    assert yaml.safe_load(f"key: {quote_yaml(value)}\nother: 1") == {"key": value, "other": 1}
    assert quote_yaml(value).isprintable()


def test_numbers_are_yaml_numbers() -> None:
    assert yaml.safe_load(f"[{quote_yaml(3)}, {quote_yaml('3')}]") == [3, "3"]


def test_long_commands_have_a_line_per_option() -> None:
    assert quote_command(["a", "--b", "c", "--d=e"]) == "a --b c --d=e"
    long = quote_command(["a", "b", "--c", "d" * 99, "--e=f g", "-h"])
    assert long.split(" \\\n    ") == ["a b", f"--c {'d' * 99}", "'--e=f g'", "-h"]


def test_undefined_variables_raise() -> None:
    with pytest.raises(jinja2.UndefinedError):
        render("jobset.yaml.j2", name="demo")


def test_the_templates_are_found(repository: Path) -> None:
    assert launch_folder() == repository / "launch"
    assert {path.name for path in launch_folder().iterdir()} == {
        "Dockerfile.gpu", "Dockerfile.tpu", "data.sbatch.j2", "data_job.yaml.j2", "jobset.yaml.j2", "slurm.sbatch.j2",
        "tpu_vm.sh.j2",
    }  # fmt: skip
