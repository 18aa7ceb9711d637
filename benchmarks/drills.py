"""Drill the failures of preemptible machines, with real processes on this machine.

    python benchmarks/drills.py elastic --times 20     # SIGKILL all at a random point, resume on other processes
    python benchmarks/drills.py preempt                # SIGTERM one: state saved, exit status 75, no step lost
    python benchmarks/drills.py kill-one               # SIGKILL one: the others exit, a launcher restarts all
    python benchmarks/drills.py all                    # all three
    python benchmarks/drills.py storage                # runs in a bucket: faults, outage, kill, cut uploads, refusals

Every run is compared with a reference run, which nothing interrupts: the example ids of every step must be equal.
Losses must be bit-identical on the same processes and mesh, and within 1e-5 otherwise. Prints a table and exits with
status 1 if a drill fails.
"""

import argparse
import itertools
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from drill_runs import (
    LAYOUTS,
    STEPS,
    DrillError,
    Drills,
    Layout,
    await_gone,
    await_step,
    children,
    compare,
    expect,
    read_examples,
    resumed_from,
    wait,
)
from storage_drills import storage_drills

from mplug2_jax.cli.common import table


def elastic(drills: Drills, times: int, seed: int) -> Iterator[tuple[str, Any]]:
    """Yield drills that kill all processes at a random point and resume on the same or another layout."""
    rng = random.Random(seed)
    for i in range(times):
        before = LAYOUTS[i // len(LAYOUTS) % len(LAYOUTS)]
        after = LAYOUTS[(i + 1) % len(LAYOUTS)]
        step, delay = rng.randint(1, STEPS - 4), rng.uniform(0, 0.5)

        def drill(i: int = i, before: Layout = before, after: Layout = after, at: int = step, d: float = delay) -> str:
            reference, workdir = drills.reference_run(before), drills.folder / f"elastic-{i}"
            launcher = drills.launch(before, workdir)
            await_step(at, workdir, launcher)
            time.sleep(d)
            pids = children(launcher.pid)
            launcher.kill()  # Linux then kills its children
            launcher.wait()
            await_gone(pids)
            reached = read_examples(workdir)
            expected = read_examples(reference)
            if any(expected[step] != row for step, row in reached.items()):
                raise DrillError("different examples before the kill")
            expect(wait(drills.launch(after, workdir), workdir), 0, workdir)
            since = resumed_from(workdir)
            compare(workdir, reference, exact=before == after, since=since)
            return f"killed in step {max(reached)}, resumed from {since}: {max(reached) - since} steps lost"

        yield f"elastic {before} -> {after}", drill


def preempt(drills: Drills, grace: float) -> Iterator[tuple[str, Any]]:
    """Yield drills that send SIGTERM to one process of several, and to a single process."""
    for layout in LAYOUTS[:2]:

        def drill(layout: Layout = layout) -> str:
            reference, workdir = drills.reference_run(layout), drills.folder / f"preempt-{layout.processes}"
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
            compare(workdir, reference, exact=True)
            return f"exited {seconds:.1f} s after SIGTERM, in step {reached}: 0 steps lost"

        yield f"preempt {layout}", drill


def kill_one(drills: Drills, bound: float, *, quick: bool) -> Iterator[tuple[str, Any]]:
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
            reference, workdir = drills.reference_run(layout), drills.folder / f"kill-one-restart{victim}"
            launcher = drills.launch(layout, workdir, "--max-restarts", "1")
            await_step(4, workdir, launcher)
            os.kill(children(launcher.pid)[victim], signal.SIGKILL)
            expect(wait(launcher, workdir), 0, workdir)
            compare(workdir, reference, exact=True)
            return f"restarted from step {resumed_from(workdir)}"

        which = "the first" if victim == 0 else "the last"
        yield f"kill {which} of {layout}", alone
        if victim == 0 or not quick:
            yield f"kill {which} of {layout}, launcher", restarted


def main() -> int:
    """Run the drills of one kind and print their outcomes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("elastic", "preempt", "kill-one", "all", "storage"))
    parser.add_argument("--times", type=int, default=4, help="number of elastic drills (default: 4)")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="storage: two processes, 40 steps, a short outage, no refusals; kill-one: the launcher restarts once",
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
    folder = args.work or Path(tempfile.mkdtemp(prefix="drills-"))
    if args.kind == "storage":
        steps, saved_every = (40, 10) if args.quick else (300, 20)
        drills = Drills(folder, steps, saved_every)
        return run_drills(storage_drills(drills, quick=args.quick, seed=args.seed))
    drills = Drills(folder)
    kinds = {
        "elastic": elastic(drills, args.times, args.seed),
        "preempt": preempt(drills, args.bound),
        "kill-one": kill_one(drills, args.bound, quick=args.quick),
    }
    return run_drills(itertools.chain(*kinds.values()) if args.kind == "all" else kinds[args.kind])


def run_drills(drills: Iterable[tuple[str, Any]]) -> int:
    """Run drills one after the other, print a table of their outcomes, and return the exit status."""
    rows = []
    for name, drill in drills:
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
