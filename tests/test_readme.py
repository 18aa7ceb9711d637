"""The commands of the README work, in order, and documentation names files that exist."""

import ast
import re
import shlex
from pathlib import Path

import pytest

from mplug2_jax.training.telemetry.metric_log import read_train_metrics
from tests.processes import run_commands

ROOTS = "benchmarks|configs|data_pipelines|docs|launch|mplug2_jax|tests"
# A path from the root of the repository.
PATH = re.compile(rf"(?<![\w/.-])(?:{ROOTS})/[\w./-]*\w")
# The name of a Python file, perhaps with folders, but without a path from the root.
PYTHON_FILE = re.compile(r"(?<![\w/.*-])[\w/]+\.py\b")
LINK = re.compile(r"\]\((?!https?:)([^)#]+)")


def commands(repository: Path) -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", (repository / "README.md").read_text(), flags=re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line and not line.startswith("#")]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_command_of_the_readme_works(repository: Path, reference: Path, tmp_path: Path) -> None:
    lines = [shlex.split(line) for line in commands(repository)]
    assert len(lines) >= 7
    assert {program for program, *_ in lines} == {"mplug2"}
    # The golden folder is next to the checkout, and the tests may run anywhere.
    words = [[arg.replace("../shared/reference", str(reference)) for arg in args] for _, *args in lines]
    run_commands(words, tmp_path)
    losses = [row["loss"] for row in read_train_metrics(tmp_path / "runs" / "short" / "metrics.jsonl")]
    assert losses[-1] < losses[0]
    assert (tmp_path / "runs" / "short" / "report.html").stat().st_size > 10_000


def missing_paths(text: str, repository: Path) -> list[str]:
    return [path for path in PATH.findall(text) if not (repository / path).exists()]


@pytest.mark.parametrize("name", ["README.md", "docs"])
def test_pages_name_files_and_link_pages_that_exist(name: str, repository: Path) -> None:
    top = repository / name
    for page in sorted(top.glob("*.md")) if top.is_dir() else [top]:
        text = page.read_text()
        links = [link for link in LINK.findall(text) if not (page.parent / link).exists()]
        assert missing_paths(text, repository) + links == [], page.name


def test_the_reading_order_names_files(repository: Path) -> None:
    order = (repository / "README.md").read_text().partition("## Read the code")[2].partition("\n## ")[0]
    assert len(PATH.findall(order)) >= 8
    assert missing_paths(order, repository) == []


@pytest.mark.parametrize("package", ["mplug2_jax", "data_pipelines", "configs", "benchmarks"])
def test_docstrings_of_modules_and_folders_name_files_that_exist(package: str, repository: Path) -> None:
    names = {path.name for root in ROOTS.split("|") for path in (repository / root).rglob("*.py")}
    for module in sorted((repository / package).rglob("*.py")):
        docstring = ast.get_docstring(ast.parse(module.read_text())) or ""
        missing = missing_paths(docstring, repository)
        missing += [file for file in PYTHON_FILE.findall(docstring) if Path(file).name not in names]
        assert missing == [], module.relative_to(repository)
