"""Commands of ``mplug2`` in a process of their own, with the devices that a user's has."""

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

_PROGRAM = """
import json, shlex, sys
from mplug2_jax.cli.main import main

for words in json.loads(sys.argv[1]):
    print("$ mplug2", shlex.join(words), flush=True)
    if status := main(words):
        sys.exit(status)
"""


def run_commands(commands: Sequence[Sequence[str]], folder: Path, **environment: str) -> str:
    """Run commands one after the other in one process, which imports once, and return what they print.

    Plans have another process: they choose their number of simulated devices.

    Args:
        commands: arguments of ``mplug2``, which all must exit with status 0.
        folder: to run in.
        environment: further variables.
    """
    return "".join(
        _run_process(list(group), folder, environment)
        for _, group in itertools.groupby(commands, lambda words: words[0] == "plan")
    )


def _run_process(commands: Sequence[Sequence[str]], folder: Path, environment: Mapping[str, str]) -> str:
    repository = Path(__file__).resolve().parents[1]
    process = subprocess.run(
        [sys.executable, "-c", _PROGRAM, json.dumps(commands)], cwd=folder, capture_output=True, text=True,
        env=os.environ | {
            "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "PYTHONPATH": str(repository)
        } | environment,
    )  # fmt: skip
    assert process.returncode == 0, f"{process.stdout}\n{process.stderr}"
    return process.stdout
