"""Runs that drills start, kill and compare with reference runs; see drills.py."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipelines.config import DataConfig, ExampleConfig, SourceConfig
from mplug2_jax.config import to_dict
from mplug2_jax.launch.local import find_free_port, process_environment
from mplug2_jax.model.config import model_config
from mplug2_jax.training.config import (
    CheckpointConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    StreamConfig,
    TokenizerConfig,
)
from mplug2_jax.training.telemetry.metric_log import read_step_lines, read_train_metrics
from mplug2_jax.training.workdir import load_or_train_tokenizer

STEPS, SAVE_EVERY = 24, 3
LIMIT = 600.0
"""Seconds after which a drill fails if its run has not exited."""
NUM_COMPARED_STEPS, TOLERANCE = 10, 1e-5


class DrillError(Exception):
    """A drill whose outcome is not the expected one."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """Number of processes, devices per process, and the mesh over all devices."""

    processes: int
    devices: int
    data: int
    fsdp: int
    tensor: int

    def __str__(self) -> str:
        return f"{self.processes} x {self.devices} ({self.data}, {self.fsdp}, {self.tensor})"

    def mesh_overrides(self) -> list[str]:
        """Return the overrides that set the mesh."""
        return [f"--config.mesh.{axis}={getattr(self, axis)}" for axis in ("data", "fsdp", "tensor")]


LAYOUTS = (Layout(2, 2, 2, 2, 1), Layout(1, 4, 1, 2, 2), Layout(4, 1, 2, 1, 2), Layout(2, 1, 1, 1, 2))


@dataclasses.dataclass
class Drills:
    """A folder with a recipe, and its reference runs."""

    folder: Path
    steps: int = STEPS
    saved_every: int = SAVE_EVERY
    references: dict[Layout, Path] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        load_or_train_tokenizer(TokenizerConfig(vocab_size=200)).save(self.folder / "tokenizer")
        values = json.dumps(to_dict(run_config(self.folder / "tokenizer", self.steps, self.saved_every)))
        (self.folder / "recipe.py").write_text(
            "import json\nfrom ml_collections import ConfigDict\n\n\n"
            f"def get_config():\n    return ConfigDict(json.loads({values!r}), type_safe=False)\n"
        )
        self.environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            # Later starts read what an earlier one compiled; unoptimized, because all runs are short.
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        }

    def train_args(self, layout: Layout, workdir: Path) -> list[str]:
        """Return the arguments of ``mplug2`` that train or resume."""
        recipe = str(self.folder / "recipe.py")
        return ["train", "--config", recipe, "--workdir", str(workdir), *layout.mesh_overrides()]

    def start(
        self, args: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
    ) -> "subprocess.Popen[bytes]":
        """Start a command with its output appended to a file."""
        with log.open("ab") as out:
            return subprocess.Popen(
                [sys.executable, "-m", "mplug2_jax.cli.main", *args],
                stdout=out, stderr=out, env=self.environment | (environment or {}),
            )  # fmt: skip

    def launch(
        self, layout: Layout, workdir: Path, *options: str, environment: Mapping[str, str] | None = None,
        log: Path | None = None, overrides: Sequence[str] = (),
    ) -> "subprocess.Popen[bytes]":  # fmt: skip
        """Start a training run under the launcher; one process runs without it, and so without gloo."""
        args, log = [*self.train_args(layout, workdir), *overrides], log or log_path(workdir)
        if layout.processes == 1:
            return self.start(args, log, {"JAX_NUM_CPU_DEVICES": str(layout.devices)} | dict(environment or {}))
        counts = ("--processes", str(layout.processes), "--devices-per-process", str(layout.devices))
        return self.start(["launch", "local", *counts, *options, "--", *args], log, environment)

    def start_processes(self, layout: Layout, workdir: Path) -> "list[subprocess.Popen[bytes]]":
        """Start the processes of a training run without a launcher, which could end them."""
        address = f"127.0.0.1:{find_free_port()}"
        return [
            self.start(self.train_args(layout, workdir), log_path(workdir), environment)
            for index in range(layout.processes)
            for environment in [process_environment(index, layout.processes, layout.devices, address)]
        ]

    def reference_run(self, layout: Layout) -> Path:
        """Return the work directory of a reference run, which nothing interrupts and which is trained once."""
        if layout not in self.references:
            workdir = self.folder / f"reference-{len(self.references)}"
            expect(wait(self.launch(layout, workdir), workdir), 0, workdir)
            self.references[layout] = workdir
        return self.references[layout]


def run_config(tokenizer: Path, steps: int = STEPS, saved_every: int = SAVE_EVERY) -> RunConfig:
    """Return a run of masked language modeling with one layer, in float32."""
    examples = ExampleConfig(text="sentence", text_length=12)
    data = DataConfig(sources={"digits": SourceConfig(kind="text", max_records=1000)}, examples=examples, batch_size=8)
    model = model_config(
        "tiny", dtype="float32", width=32, heads=2, mlp_width=64, text_layers=1, universal_layers=1, vocab_size=256
    )
    return RunConfig(
        name="drill",
        steps=steps,
        model=model,
        tokenizer=TokenizerConfig(path=str(tokenizer)),
        streams={"text": StreamConfig(data=data, objectives={"mlm": 1.0})},
        # With a small eps Adam turns rounding noise into full steps, and no two meshes would agree.
        optimizer=OptimizerConfig(learning_rate=1e-3, eps=1e-2),
        schedule=ScheduleConfig(warmup_steps=1),
        checkpoint=CheckpointConfig(every_steps=saved_every, keep_last=2),
        log_every=1,
        log_example_ids=True,
        watchdog_timeout=300,
        heartbeat_timeout=30,
    )


def log_path(workdir: Path) -> Path:
    """Return the file of a run's output."""
    return workdir.with_suffix(".log")


def wait(process: "subprocess.Popen[bytes]", workdir: Path, limit: float = LIMIT, log: Path | None = None) -> int:
    """Wait for a process and return its exit status."""
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        process.kill()
        raise DrillError(f"still running after {limit:.0f} s, see {log or log_path(workdir)}") from None


def expect(status: int, expected: int, workdir: Path, log: Path | None = None) -> None:
    """Check an exit status."""
    if status != expected:
        raise DrillError(f"exit status {status}, expected {expected}, see {log or log_path(workdir)}")


def read_examples(workdir: Path) -> dict[int, dict[str, Any]]:
    """Return the example ids of every step."""
    return {line["step"]: line for line in read_step_lines(workdir / "examples.jsonl")}


def read_step_rows(workdir: Path) -> dict[int, dict[str, Any]]:
    """Return the metrics of every step."""
    return {line["step"]: line for line in read_train_metrics(workdir / "metrics.jsonl")}


def await_step(step: int, workdir: Path, process: "subprocess.Popen[bytes]") -> None:
    """Wait until a run has logged a step."""
    deadline = time.monotonic() + LIMIT
    while max(read_step_rows(workdir), default=0) < step:
        if process.poll() is not None or time.monotonic() > deadline:
            raise DrillError(f"the run did not reach step {step}, see {log_path(workdir)}")
        time.sleep(0.05)


def compare(workdir: Path, reference: Path, *, exact: bool, since: int = 0, steps: int = STEPS) -> None:
    """Compare a finished run with a reference run; ``since`` is the step that it resumed from."""
    ids, expected_ids = (read_examples(folder) for folder in (workdir, reference))
    if ids != expected_ids or len(ids) != steps:
        wrong = sorted(step for step in {*ids, *expected_ids} if ids.get(step) != expected_ids.get(step))
        raise DrillError(f"different examples in steps {wrong}")
    rows, expected_rows = (read_step_rows(folder) for folder in (workdir, reference))
    for step in range(1, steps + 1) if exact else range(1, min(steps, since + NUM_COMPARED_STEPS) + 1):
        if step not in rows:
            raise DrillError(f"step {step} is missing in metrics.jsonl")
        loss, expected = rows[step]["loss"], expected_rows[step]["loss"]
        if loss != expected and (exact or step <= since or abs(loss - expected) > TOLERANCE * abs(expected)):
            raise DrillError(f"step {step} has loss {loss}, expected {expected}")


def resumed_from(workdir: Path, log: Path | None = None) -> int:
    """Return the step from which the last start of a run resumed."""
    steps = re.findall(r"(?i)resum\w+ from step (\d+)", (log or log_path(workdir)).read_text(errors="replace"))
    return int(steps[-1]) if steps else 0


def children(pid: int) -> list[int]:
    """Return the child processes of a process (Linux)."""
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def await_gone(pids: Sequence[int]) -> None:
    """Wait until processes, which need not be children, are gone."""
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        if time.monotonic() > deadline:
            raise DrillError(f"some of the processes {pids} survived their launcher")
        time.sleep(0.05)
