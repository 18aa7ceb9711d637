"""Measure a restart of the demo on several processes with a warm cache of compiled programs.

    python benchmarks/restart.py                        # this checkout
    python benchmarks/restart.py --baseline ../before   # alternating with another checkout, and the ratio

A restart is timed from the command to the first line of metrics after the restored step; its CPU time is that of all
processes, until they have saved that step and exited. The phases are those of the run's ``started`` event.
"""

import argparse
import json
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

RECIPE = """
import dataclasses
from configs.demo import get_config as demo


def get_config():
    config = demo()
    if dataclasses.is_dataclass(config):
        return dataclasses.replace(config, evaluations={}, log_every=1)
    config.evaluations, config.log_every = {}, 1  # of older versions
    return config
"""
REPOSITORY = Path(__file__).resolve().parents[1]


class Restart(NamedTuple):
    """Seconds to the first step, CPU seconds until the exit, and seconds by phase (empty in older versions)."""

    wall: float
    cpu: float
    phases: dict[str, float]


def start(checkout: Path, folder: Path, processes: int) -> Restart:
    """Start or resume the run of a checkout, and stop it by SIGTERM after its first step."""
    workdir = folder / "run"
    (folder / "recipe.py").write_text(RECIPE)
    command = [sys.executable, "-m", "mplug2_jax.cli.main", "launch", "local", "--processes", str(processes), "--"]
    command += ["train", "--config", str(folder / "recipe.py"), "--workdir", str(workdir)]
    command += ["--config.mesh.fsdp=1", f"--config.mesh.data={processes}"]
    paths = {"PYTHONPATH": str(checkout), "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled")}
    before, lines = resource.getrusage(resource.RUSAGE_CHILDREN), count_lines(workdir / "metrics.jsonl")
    begin = time.monotonic()
    with (folder / "log").open("w") as log:
        run = subprocess.Popen(command, cwd=checkout, env=os.environ | paths, stdout=log, stderr=log)
        while count_lines(workdir / "metrics.jsonl") <= lines:
            if run.poll() is not None:
                sys.exit(f"the run ended with status {run.returncode}:\n{(folder / 'log').read_text()[-2000:]}")
            time.sleep(0.05)
        wall = time.monotonic() - begin
        run.send_signal(signal.SIGTERM)
        run.wait()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    events = map(json.loads, (workdir / "events.jsonl").read_text().splitlines())
    started = [event["seconds"] for event in events if event["event"] == "started"]
    return Restart(wall, cpu, started[-1] if started else {})


def count_lines(path: Path) -> int:
    """Return the number of complete lines of a file; 0 if there is none."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--baseline", type=Path, help="root of another checkout")
    parser.add_argument("--processes", type=int, default=4, help="of the run (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="restarts of each checkout (default: %(default)s)")
    args = parser.parse_args()

    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    checkouts = {"this": REPOSITORY} | ({"baseline": args.baseline.resolve()} if args.baseline else {})
    restarts: dict[str, list[Restart]] = {name: [] for name in checkouts}
    with tempfile.TemporaryDirectory() as temporary:
        for name, checkout in checkouts.items():
            (folder := Path(temporary, name)).mkdir()
            cold = start(checkout, folder, args.processes)
            print(f"{name}: the first start, with an empty cache {cold.wall:12.1f} s {cold.cpu:8.1f} s of CPU")
        for _ in range(args.repeats):
            for name, checkout in checkouts.items():
                restarts[name].append(start(checkout, Path(temporary, name), args.processes))
    medians = {}
    for name, measured in restarts.items():
        medians[name] = [statistics.median(restart[i] for restart in measured) for i in (0, 1)]
        print(
            f"{name}: a restart (median of {args.repeats}) {medians[name][0]:21.1f} s {medians[name][1]:8.1f} s of CPU"
        )
    for phase, seconds in restarts["this"][-1].phases.items():
        print(f"  {phase:<45} {seconds:12.2f} s")
    if args.baseline:
        wall, cpu = (this / other for this, other in zip(*medians.values(), strict=True))
        print(f"this / baseline {wall:42.2f}x {cpu:8.2f}x")


if __name__ == "__main__":
    main()
