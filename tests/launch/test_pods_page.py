"""docs/pods.md shows the output of its first command, and the container files match the page."""

import os
import re
import shlex
from pathlib import Path

import pytest

from tests.cli.conftest import mplug2

_COMMAND = re.compile(r"^(```bash\nmplug2 (launch .*)\n```\n\n<details>.*\n\n```\w+\n)(?:.*\n)*?```$", re.MULTILINE)


def test_commands_work_and_the_file_is_their_output(repository: Path) -> None:
    """Compare; RENEW=1 updates the page."""
    path = repository / "docs" / "pods.md"
    page = path.read_text(encoding="utf-8")

    def with_output(match: re.Match[str]) -> str:
        done = mplug2(*shlex.split(match[2]))
        assert done.status == 0, done.err
        return f"{match[1]}{done.out}```"

    renewed, count = _COMMAND.subn(with_output, page)
    assert count == page.count("<details>") == 1
    for words in re.findall(r"^mplug2 (launch .*)$", page, re.MULTILINE):
        assert mplug2(*shlex.split(words)).status == 0
    if os.environ.get("RENEW"):
        path.write_text(renewed, encoding="utf-8")
    assert renewed == path.read_text(encoding="utf-8"), "update with RENEW=1 pytest tests/launch/test_pods_page.py"


@pytest.mark.parametrize(("which", "extra"), [("tpu", "tpu,gcs"), ("gpu", "cuda,gcs")])
def test_images_are_pinned_small_and_not_root(repository: Path, which: str, extra: str) -> None:
    text = (repository / "launch" / f"Dockerfile.{which}").read_text(encoding="utf-8")
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    bases = [line.split()[1] for line in lines if line.startswith("FROM ")]
    assert len(bases) == 2  # the build stage is dropped
    assert all(re.fullmatch(r"python:3\.11\.\d+-slim-\w+", base) for base in bases)
    (install,) = (line for line in lines if "pip " in line)
    assert f'install --no-cache-dir --constraint constraints.txt ".[{extra}]"' in install
    assert "venv --without-pip" in install
    last = lines[max(i for i, line in enumerate(lines) if line.startswith("FROM ")) :]
    assert [line for line in last if line.startswith("USER ")] == ["USER mplug2"]
    assert not any("pip" in line or "apt" in line for line in last)
    copied = {
        word for line in lines if line.startswith("COPY ") and "--from" not in line for word in line.split()[1:-1]
    }
    assert all((repository / name).exists() for name in copied)
    packed = (repository / "pyproject.toml").read_text(encoding="utf-8")
    assert set(re.findall(r'^"(\w+)" = "mplug2_jax/', packed, re.MULTILINE)) <= copied
