"""Drills of what happens to runs on preemptible machines, with real processes on this one.

    python benchmarks/drills.py elastic --times 20     # SIGKILL to all at a random point, resumed on other processes
    python benchmarks/drills.py preempt                # SIGTERM to one: saved, status 75, nothing is lost
    python benchmarks/drills.py kill-one               # SIGKILL to one: the others leave, a launcher starts all again
    python benchmarks/drills.py all                    # these three, one after the other

Every run is compared with one that was never disturbed: the example ids of every step must be the same; losses too, to
the bit on the same processes and mesh, within 1e-5 on others. Prints a table and exits with 1 if any drill failed.
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
"""Seconds after which a run that has not ended has failed its drill."""
COMPARED, TOLERANCE = 10, 1e-5


class DrillError(Exception):
    """What went otherwise than it should."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """Processes, devices of each, and the mesh over all of them."""

    processes: int
    devices: int
    data: int
    fsdp: int
    tensor: int

    def __str__(self) -> str:
        return f"{self.processes} x {self.devices} ({self.data}, {self.fsdp}, {self.tensor})"

    def mesh(self) -> list[str]:
        """The words that choose the mesh."""
        return [f"--config.mesh.{axis}={getattr(self, axis)}" for axis in ("data", "fsdp", "tensor")]


LAYOUTS = (Layout(2, 4, 2, 4, 1), Layout(1, 8, 2, 2, 2), Layout(4, 2, 2, 2, 2), Layout(2, 2, 1, 2, 2))


@dataclasses.dataclass
class Drills:
    """A folder with a recipe, and the undisturbed runs so far."""

    folder: Path
    seen: dict[Layout, Path] = dataclasses.field(default_factory=dict)

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
            # What a start compiled, the next ones read; unoptimised, because all runs are short.
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        }

    def train(self, layout: Layout, workdir: Path) -> list[str]:
        """The words after ``mplug2`` that train or resume."""
        recipe = str(self.folder / "recipe.py")
        return ["train", "--config", recipe, "--workdir", str(workdir), *layout.mesh()]

    def start(
        self, words: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
    ) -> "subprocess.Popen[bytes]":
        """A command, whose output goes to a file."""
        with log.open("ab") as out:
            return subprocess.Popen(
                [sys.executable, "-m", "mplug2_jax.cli.main", *words],
                stdout=out, stderr=out, env=self.environment | (environment or {}),
            )  # fmt: skip

    def launch(self, layout: Layout, workdir: Path, *options: str) -> "subprocess.Popen[bytes]":
        """A training run under the launcher, or of a process on its own, whose collectives are not gloo's."""
        if layout.processes == 1:
            return self.start(
                self.train(layout, workdir), log_of(workdir), {"JAX_NUM_CPU_DEVICES": str(layout.devices)}
            )
        counts = ("--processes", str(layout.processes), "--devices-per-process", str(layout.devices))
        words = ["launch", "local", *counts, *options, "--", *self.train(layout, workdir)]
        return self.start(words, log_of(workdir))

    def together(self, layout: Layout, workdir: Path) -> "list[subprocess.Popen[bytes]]":
        """A training run without a launcher: nobody ends its processes but they themselves."""
        address = f"127.0.0.1:{find_free_port()}"
        return [
            self.start(self.train(layout, workdir), log_of(workdir), environment)
            for index in range(layout.processes)
            for environment in [process_environment(index, layout.processes, layout.devices, address)]
        ]

    def undisturbed(self, layout: Layout) -> Path:
        """The work directory of a run that was left alone."""
        if layout not in self.seen:
            workdir = self.folder / f"undisturbed-{len(self.seen)}"
            expect(ended(self.launch(layout, workdir), workdir), 0, workdir)
            self.seen[layout] = workdir
        return self.seen[layout]


def run_config(tokenizer: Path) -> RunConfig:
    """Masked words of one layer, in float32."""
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
        # With a small eps Adam turns rounding noise into whole steps, and no two meshes would agree.
        optimizer=AdamWConfig(learning_rate=1e-3, eps=1e-2),
        schedule=ScheduleConfig(warmup_steps=1),
        checkpoint=CheckpointConfig(every_steps=SAVED_EVERY, keep_last=2),
        log_every=1,
        log_example_ids=True,
        watchdog_timeout=300,
    )


def log_of(workdir: Path) -> Path:
    """Where a run's output goes."""
    return workdir.with_suffix(".log")


def ended(process: "subprocess.Popen[bytes]", workdir: Path, limit: float = LIMIT) -> int:
    """Waits for a process and returns its status."""
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        process.kill()
        raise DrillError(f"still running after {limit:.0f} s, see {log_of(workdir)}") from None


def expect(found: int, wanted: int, workdir: Path) -> None:
    """Checks an exit status."""
    if found != wanted:
        raise DrillError(f"exit status {found} instead of {wanted}, see {log_of(workdir)}")


def examples_of(workdir: Path) -> dict[int, dict[str, Any]]:
    """The example ids of every step."""
    return {line["step"]: line for line in read_step_lines(workdir / "examples.jsonl")}


def metrics_of(workdir: Path) -> dict[int, dict[str, Any]]:
    """The metrics of every step."""
    return {line["step"]: line for line in read_train_metrics(workdir / "metrics.jsonl")}


def await_step(step: int, workdir: Path, process: "subprocess.Popen[bytes]") -> None:
    """Waits until a run has written a step down."""
    deadline = time.monotonic() + LIMIT
    while max(metrics_of(workdir), default=0) < step:
        if process.poll() is not None or time.monotonic() > deadline:
            raise DrillError(f"the run did not reach step {step}, see {log_of(workdir)}")
        time.sleep(0.05)


def compare(workdir: Path, undisturbed: Path, *, exact: bool, since: int = 0) -> None:
    """Checks a finished run against an undisturbed one; ``since``: the step that it was resumed from."""
    ids, right_ids = (examples_of(folder) for folder in (workdir, undisturbed))
    if ids != right_ids or len(ids) != STEPS:
        wrong = sorted(step for step in {*ids, *right_ids} if ids.get(step) != right_ids.get(step))
        raise DrillError(f"other examples in steps {wrong}")
    lines, right = (metrics_of(folder) for folder in (workdir, undisturbed))
    for step in range(1, STEPS + 1) if exact else range(1, min(STEPS, since + COMPARED) + 1):
        if step not in lines:
            raise DrillError(f"step {step} has no line in metrics.jsonl")
        loss, wanted = lines[step]["loss"], right[step]["loss"]
        if loss != wanted and (exact or step <= since or abs(loss - wanted) > TOLERANCE * abs(wanted)):
            raise DrillError(f"loss {loss} of step {step} instead of {wanted}")


def resumed_from(workdir: Path) -> int:
    """The step that the last start of a run went on from."""
    found = re.findall(r"resuming from step (\d+)", log_of(workdir).read_text(errors="replace"))
    return int(found[-1]) if found else 0


def children(pid: int) -> list[int]:
    """The processes that a process started (Linux)."""
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def elastic(drills: Drills, times: int, seed: int) -> Iterator[tuple[str, Any]]:
    """Everything is killed at a random point and resumed on the same, or on other processes and another mesh."""
    rng = random.Random(seed)
    for i in range(times):
        before = LAYOUTS[i // len(LAYOUTS) % len(LAYOUTS)]
        after = LAYOUTS[i % len(LAYOUTS)]
        step, delay = rng.randint(1, STEPS - 4), rng.uniform(0, 0.5)

        def drill(i: int = i, before: Layout = before, after: Layout = after, at: int = step, d: float = delay) -> str:
            undisturbed, workdir = drills.undisturbed(before), drills.folder / f"elastic-{i}"
            launcher = drills.launch(before, workdir)
            await_step(at, workdir, launcher)
            time.sleep(d)
            pids = children(launcher.pid)
            launcher.kill()  # and Linux kills the rest
            launcher.wait()
            await_gone(pids)
            reached = examples_of(workdir)
            right = examples_of(undisturbed)
            if any(right[step] != line for step, line in reached.items()):
                raise DrillError("other examples before the kill")
            expect(ended(drills.launch(after, workdir), workdir), 0, workdir)
            since = resumed_from(workdir)
            compare(workdir, undisturbed, exact=before == after, since=since)
            return f"killed in step {max(reached)}, resumed from {since}: {max(reached) - since} steps"

        yield f"elastic {before} -> {after}", drill


def await_gone(pids: Sequence[int]) -> None:
    """Waits for processes that are not our own."""
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        if time.monotonic() > deadline:
            raise DrillError(f"of processes {pids} some survived their launcher")
        time.sleep(0.05)


def preempt(drills: Drills, grace: float) -> Iterator[tuple[str, Any]]:
    """SIGTERM to one process of several, and to one on its own."""
    for layout in (LAYOUTS[0], LAYOUTS[1]):

        def drill(layout: Layout = layout) -> str:
            undisturbed, workdir = drills.undisturbed(layout), drills.folder / f"preempt-{layout.processes}"
            run = drills.launch(layout, workdir)
            await_step(4, workdir, run)
            told = run.pid if layout.processes == 1 else children(run.pid)[-1]
            since = time.monotonic()
            os.kill(told, signal.SIGTERM)
            expect(ended(run, workdir, grace), 75, workdir)
            seconds, reached = time.monotonic() - since, max(examples_of(workdir))
            expect(ended(drills.launch(layout, workdir), workdir), 0, workdir)
            if resumed_from(workdir) != reached:
                raise DrillError(f"resumed from step {resumed_from(workdir)} instead of {reached}")
            compare(workdir, undisturbed, exact=True)
            return f"ended {seconds:.1f} s after the notice, in step {reached}: nothing"

        yield f"preempt {layout}", drill


def kill_one(drills: Drills, bound: float) -> Iterator[tuple[str, Any]]:
    """SIGKILL to the first or the last process: the others leave by themselves, and a launcher starts all again."""
    layout = LAYOUTS[0]
    for victim in (0, -1):

        def alone(victim: int = victim) -> str:
            workdir = drills.folder / f"kill-one{victim}"
            processes = drills.together(layout, workdir)
            await_step(4, workdir, processes[0])
            since = time.monotonic()
            processes[victim].kill()
            statuses = [ended(process, workdir, bound) for process in processes if process is not processes[victim]]
            return f"others left after {time.monotonic() - since:.1f} s with status {', '.join(map(str, statuses))}"

        def restarted(victim: int = victim) -> str:
            undisturbed, workdir = drills.undisturbed(layout), drills.folder / f"kill-one-restart{victim}"
            launcher = drills.launch(layout, workdir, "--max-restarts", "1")
            await_step(4, workdir, launcher)
            os.kill(children(launcher.pid)[victim], signal.SIGKILL)
            expect(ended(launcher, workdir), 0, workdir)
            compare(workdir, undisturbed, exact=True)
            return f"started again from step {resumed_from(workdir)}"

        which = "the first" if victim == 0 else "the last"
        yield f"kill {which} of {layout}", alone
        yield f"kill {which} of {layout}, launcher", restarted


def main() -> int:
    """Runs the drills of one kind and prints what came of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("elastic", "preempt", "kill-one", "all"))
    parser.add_argument("--times", type=int, default=4, help="elastic: how often (default: 4)")
    parser.add_argument("--seed", type=int, default=0, help="elastic: of the points of the kills (default: 0)")
    parser.add_argument(
        "--bound", type=float, default=120, help="seconds to leave in: preempt, kill-one (default: 120)"
    )
    parser.add_argument("--work", type=Path, help="folder that is kept (default: a temporary one, kept on failure)")
    args = parser.parse_args()
    drills = Drills(args.work or Path(tempfile.mkdtemp(prefix="drills-")))
    kinds = {
        "elastic": elastic(drills, args.times, args.seed),
        "preempt": preempt(drills, args.bound),
        "kill-one": kill_one(drills, args.bound),
    }
    rows = []
    for name, drill in itertools.chain(*kinds.values()) if args.kind == "all" else kinds[args.kind]:
        since = time.monotonic()
        try:
            outcome, lost = "ok", drill()
        except DrillError as error:
            outcome, lost = "FAILED", str(error)
        rows.append((name, outcome, f"{time.monotonic() - since:.0f}", lost))
        print("  ".join(rows[-1]), flush=True)
    print("\n" + table(rows, ("drill", "outcome", "seconds", "what was lost"), right=(2,)))
    return int(any(outcome != "ok" for _, outcome, _, _ in rows))


if __name__ == "__main__":
    sys.exit(main())
