"""Drill the failures of preemptible machines, with real processes on this machine.

    python benchmarks/drills.py elastic --times 20     # SIGKILL all at a random point, resume on other processes
    python benchmarks/drills.py preempt                # SIGTERM one: state saved, exit status 75, no step lost
    python benchmarks/drills.py kill-one               # SIGKILL one: the others exit, a launcher restarts all
    python benchmarks/drills.py all                    # all three

Every run is compared with an undisturbed run: the example ids of every step must be equal. Losses must be equal to the
bit on the same processes and mesh, and within 1e-5 otherwise. Prints a table and exits with status 1 if a drill fails.
"""

import argparse
import dataclasses
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipelines.config import DataConfig, ExampleConfig, SourceConfig
from mplug2_jax.cli.common import table
from mplug2_jax.config import to_dict
from mplug2_jax.launch.local import find_free_port, process_environment
from mplug2_jax.model.config import model_config
from mplug2_jax.training.config import (
    AdamWConfig,
    CheckpointConfig,
    RunConfig,
    ScheduleConfig,
    StreamConfig,
    TokenizerConfig,
)
from mplug2_jax.training.telemetry.metric_log import read_step_lines, read_train_metrics
from mplug2_jax.training.workdir import load_or_train_tokenizer

STEPS, SAVED_EVERY = 24, 3
LIMIT = 600.0
"""Seconds after which a drill fails if its run has not exited."""
COMPARED, TOLERANCE = 10, 1e-5


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


LAYOUTS = (Layout(2, 4, 2, 4, 1), Layout(1, 8, 2, 2, 2), Layout(4, 2, 2, 2, 2), Layout(2, 2, 1, 2, 2))


@dataclasses.dataclass
class Drills:
    """A folder with a recipe, and its undisturbed runs."""

    folder: Path
    references: dict[Layout, Path] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        load_or_train_tokenizer(TokenizerConfig(vocab_size=200)).save(self.folder / "tokenizer")
        values = json.dumps(to_dict(run_config(self.folder / "tokenizer")))
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

    def launch(self, layout: Layout, workdir: Path, *options: str) -> "subprocess.Popen[bytes]":
        """Start a training run under the launcher; one process runs without it, and so without gloo."""
        if layout.processes == 1:
            return self.start(
                self.train_args(layout, workdir), log_path(workdir), {"JAX_NUM_CPU_DEVICES": str(layout.devices)}
            )
        counts = ("--processes", str(layout.processes), "--devices-per-process", str(layout.devices))
        args = ["launch", "local", *counts, *options, "--", *self.train_args(layout, workdir)]
        return self.start(args, log_path(workdir))

    def start_processes(self, layout: Layout, workdir: Path) -> "list[subprocess.Popen[bytes]]":
        """Start the processes of a training run without a launcher, which could end them."""
        address = f"127.0.0.1:{find_free_port()}"
        return [
            self.start(self.train_args(layout, workdir), log_path(workdir), environment)
            for index in range(layout.processes)
            for environment in [process_environment(index, layout.processes, layout.devices, address)]
        ]

    def reference_run(self, layout: Layout) -> Path:
        """Return the work directory of an undisturbed run, which is trained once."""
        if layout not in self.references:
            workdir = self.folder / f"undisturbed-{len(self.references)}"
            expect(wait(self.launch(layout, workdir), workdir), 0, workdir)
            self.references[layout] = workdir
        return self.references[layout]


def run_config(tokenizer: Path) -> RunConfig:
    """Return a run of masked language modeling with one layer, in float32."""
    examples = ExampleConfig(text="sentence", text_length=12)
    data = DataConfig(sources={"digits": SourceConfig(kind="text", max_records=1000)}, examples=examples, batch_size=8)
    model = model_config(
        "tiny", dtype="float32", width=32, heads=2, mlp_width=64, text_layers=1, universal_layers=1, vocab_size=256
    )
    return RunConfig(
        name="drill",
        steps=STEPS,
        model=model,
        tokenizer=TokenizerConfig(path=str(tokenizer)),
        streams={"text": StreamConfig(data=data, objectives={"mlm": 1.0})},
        # With a small eps Adam turns rounding noise into full steps, and no two meshes would agree.
        optimizer=AdamWConfig(learning_rate=1e-3, eps=1e-2),
        schedule=ScheduleConfig(warmup_steps=1),
        checkpoint=CheckpointConfig(every_steps=SAVED_EVERY, keep_last=2),
        log_every=1,
        log_example_ids=True,
        watchdog_timeout=300,
    )


def log_path(workdir: Path) -> Path:
    """Return the file of a run's output."""
    return workdir.with_suffix(".log")


def wait(process: "subprocess.Popen[bytes]", workdir: Path, limit: float = LIMIT) -> int:
    """Wait for a process and return its exit status."""
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        process.kill()
        raise DrillError(f"still running after {limit:.0f} s, see {log_path(workdir)}") from None


def expect(status: int, expected: int, workdir: Path) -> None:
    """Check an exit status."""
    if status != expected:
        raise DrillError(f"exit status {status}, expected {expected}, see {log_path(workdir)}")


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


def compare(workdir: Path, undisturbed: Path, *, exact: bool, since: int = 0) -> None:
    """Compare a finished run with an undisturbed one; ``since`` is the step that it resumed from."""
    ids, expected_ids = (read_examples(folder) for folder in (workdir, undisturbed))
    if ids != expected_ids or len(ids) != STEPS:
        wrong = sorted(step for step in {*ids, *expected_ids} if ids.get(step) != expected_ids.get(step))
        raise DrillError(f"different examples in steps {wrong}")
    rows, expected_rows = (read_step_rows(folder) for folder in (workdir, undisturbed))
    for step in range(1, STEPS + 1) if exact else range(1, min(STEPS, since + COMPARED) + 1):
        if step not in rows:
            raise DrillError(f"step {step} is missing in metrics.jsonl")
        loss, expected = rows[step]["loss"], expected_rows[step]["loss"]
        if loss != expected and (exact or step <= since or abs(loss - expected) > TOLERANCE * abs(expected)):
            raise DrillError(f"step {step} has loss {loss}, expected {expected}")


def resumed_from(workdir: Path) -> int:
    """Return the step from which the last start of a run resumed."""
    steps = re.findall(r"(?i)resum\w+ from step (\d+)", log_path(workdir).read_text(errors="replace"))
    return int(steps[-1]) if steps else 0


def children(pid: int) -> list[int]:
    """Return the child processes of a process (Linux)."""
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def elastic(drills: Drills, times: int, seed: int) -> Iterator[tuple[str, Any]]:
    """Yield drills that kill all processes at a random point and resume on the same or another layout."""
    rng = random.Random(seed)
    for i in range(times):
        before = LAYOUTS[i // len(LAYOUTS) % len(LAYOUTS)]
        after = LAYOUTS[i % len(LAYOUTS)]
        step, delay = rng.randint(1, STEPS - 4), rng.uniform(0, 0.5)

        def drill(i: int = i, before: Layout = before, after: Layout = after, at: int = step, d: float = delay) -> str:
            undisturbed, workdir = drills.reference_run(before), drills.folder / f"elastic-{i}"
            launcher = drills.launch(before, workdir)
            await_step(at, workdir, launcher)
            time.sleep(d)
            pids = children(launcher.pid)
            launcher.kill()  # Linux then kills its children
            launcher.wait()
            await_gone(pids)
            reached = read_examples(workdir)
            expected = read_examples(undisturbed)
            if any(expected[step] != row for step, row in reached.items()):
                raise DrillError("different examples before the kill")
            expect(wait(drills.launch(after, workdir), workdir), 0, workdir)
            since = resumed_from(workdir)
            compare(workdir, undisturbed, exact=before == after, since=since)
            return f"killed in step {max(reached)}, resumed from {since}: {max(reached) - since} steps lost"

        yield f"elastic {before} -> {after}", drill


def await_gone(pids: Sequence[int]) -> None:
    """Wait until processes, which need not be children, are gone."""
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        if time.monotonic() > deadline:
            raise DrillError(f"some of the processes {pids} survived their launcher")
        time.sleep(0.05)


def preempt(drills: Drills, grace: float, layouts: Sequence[Layout] = LAYOUTS[:2]) -> Iterator[tuple[str, Any]]:
    """Yield drills that send SIGTERM to one process of several, and to a single process."""
    for layout in layouts:

        def drill(layout: Layout = layout) -> str:
            undisturbed, workdir = drills.reference_run(layout), drills.folder / f"preempt-{layout.processes}"
            run = drills.launch(layout, workdir)
            await_step(4, workdir, run)
            target = run.pid if layout.processes == 1 else children(run.pid)[-1]
            since = time.monotonic()
            os.kill(target, signal.SIGTERM)
            expect(wait(run, workdir, grace), 75, workdir)
            seconds, reached = time.monotonic() - since, max(read_examples(workdir))
            expect(wait(drills.launch(layout, workdir), workdir), 0, workdir)
            if resumed_from(workdir) != reached:
                raise DrillError(f"resumed from step {resumed_from(workdir)}, expected {reached}")
            compare(workdir, undisturbed, exact=True)
            return f"exited {seconds:.1f} s after SIGTERM, in step {reached}: 0 steps lost"

        yield f"preempt {layout}", drill


def kill_one(drills: Drills, bound: float, restarted_victims: Sequence[int] = (0, -1)) -> Iterator[tuple[str, Any]]:
    """Yield drills that kill the first or the last process: the others exit, and a launcher restarts all."""
    layout = LAYOUTS[0]
    for victim in (0, -1):

        def alone(victim: int = victim) -> str:
            workdir = drills.folder / f"kill-one{victim}"
            processes = drills.start_processes(layout, workdir)
            await_step(4, workdir, processes[0])
            since = time.monotonic()
            processes[victim].kill()
            statuses = [wait(process, workdir, bound) for process in processes if process is not processes[victim]]
            return f"others exited after {time.monotonic() - since:.1f} s with status {', '.join(map(str, statuses))}"

        def restarted(victim: int = victim) -> str:
            undisturbed, workdir = drills.reference_run(layout), drills.folder / f"kill-one-restart{victim}"
            launcher = drills.launch(layout, workdir, "--max-restarts", "1")
            await_step(4, workdir, launcher)
            os.kill(children(launcher.pid)[victim], signal.SIGKILL)
            expect(wait(launcher, workdir), 0, workdir)
            compare(workdir, undisturbed, exact=True)
            return f"restarted from step {resumed_from(workdir)}"

        which = "the first" if victim == 0 else "the last"
        yield f"kill {which} of {layout}", alone
        if victim in restarted_victims:
            yield f"kill {which} of {layout}, launcher", restarted


def main() -> int:
    """Run the drills of one kind and print their outcomes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("elastic", "preempt", "kill-one", "all"))
    parser.add_argument("--times", type=int, default=4, help="number of elastic drills (default: 4)")
    parser.add_argument(
        "--quick", action="store_true", help="a drill of each kind: two elastic ones, no single process, one restart"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the elastic drills' kill points (default: 0)")
    parser.add_argument(
        "--bound",
        type=float,
        default=120,
        help="preempt, kill-one: seconds in which processes must exit (default: 120)",
    )
    parser.add_argument("--work", type=Path, help="folder for the runs (default: a temporary folder)")
    args = parser.parse_args()
    drills = Drills(args.work or Path(tempfile.mkdtemp(prefix="drills-")))
    kinds = {
        "elastic": elastic(drills, 2 if args.quick else args.times, args.seed),
        "preempt": preempt(drills, args.bound, LAYOUTS[: 1 if args.quick else 2]),
        "kill-one": kill_one(drills, args.bound, (0,) if args.quick else (0, -1)),
    }
    rows = []
    for name, drill in itertools.chain(*kinds.values()) if args.kind == "all" else kinds[args.kind]:
        since = time.monotonic()
        try:
            outcome, details = "ok", drill()
        except DrillError as error:
            outcome, details = "FAILED", str(error)
        rows.append((name, outcome, f"{time.monotonic() - since:.0f}", details))
        print("  ".join(rows[-1]), flush=True)
    print("\n" + table(rows, ("drill", "outcome", "seconds", "details"), right=(2,)))
    return int(any(outcome != "ok" for _, outcome, _, _ in rows))


if __name__ == "__main__":
    sys.exit(main())
