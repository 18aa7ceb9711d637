"""Drills of faults of an object store: an emulator behind a proxy that injects faults; part of drills.py."""

import contextlib
import dataclasses
import itertools
import os
import random
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the emulator and its proxy belong to the tests

from drill_runs import (
    LAYOUTS,
    DrillError,
    Drills,
    await_gone,
    children,
    compare,
    expect,
    read_examples,
    resumed_from,
    wait,
)

from data_pipelines.storage.paths import to_path
from mplug2_jax.errors import UNAVAILABLE, USER_ERROR
from tests import emulator, fault_proxy

MAX_AGE = 60.0
"""Seconds after which a line of a log must be in the bucket."""


@dataclasses.dataclass
class Bucket:
    """A run in a bucket behind the proxy."""

    drills: Drills
    proxy: fault_proxy.FaultProxy
    name: str
    log: Path

    @property
    def path(self) -> Path:
        """Return the work directory."""
        return to_path(f"gs://{self.name}/runs/a run")

    def start(self, layout: Any, *overrides: str) -> Any:
        """Start the run; its processes reach the bucket through the proxy."""
        environment = emulator.environment(self.proxy.url)
        return self.drills.launch(layout, self.path, environment=environment, log=self.log, overrides=overrides)

    def await_step(self, step: int, process: Any) -> None:
        """Wait until the log has a step."""
        deadline = time.monotonic() + 600
        while max(map(int, re.findall(r" step +(\d+)/", self.log.read_text(errors="replace"))), default=0) < step:
            if process.poll() is not None or time.monotonic() > deadline:
                raise DrillError(f"the run did not reach step {step}, see {self.log}")
            time.sleep(0.1)

    def finish(self, process: Any, status: int = 0) -> None:
        """Wait for the run, and check its exit status."""
        expect(wait(process, self.path, log=self.log), status, self.path, log=self.log)


def _oldest(proxy: fault_proxy.FaultProxy, bucket: str, outage: tuple[float, float]) -> float:
    """Return the longest time between two writes of metrics, without the outage that lies in it."""
    times = sorted(time for writes in proxy.writes(rf"{bucket}/.*/metrics\.jsonl/").values() for time in writes)
    gaps = [after - before - max(0.0, min(after, outage[1]) - max(before, outage[0]))
            for before, after in itertools.pairwise(times)]  # fmt: skip
    return max(gaps, default=0.0)


@contextlib.contextmanager
def _bucket(drills: Drills, store: str, name: str) -> Iterator[Bucket]:
    emulator.make_bucket(store, name)
    with fault_proxy.serve(store) as proxy:
        yield Bucket(drills, proxy, name, drills.folder / f"{name}.log")


def storage(drills: Drills, *, quick: bool, seed: int) -> Iterator[tuple[str, Any]]:
    """Yield drills of runs in a bucket; ``quick`` are two processes, and an outage of some seconds."""
    layout, smaller_layout = (LAYOUTS[0], LAYOUTS[3]) if quick else (LAYOUTS[2], LAYOUTS[3])
    outage_seconds = 5.0 if quick else 60.0
    rng = random.Random(seed)
    last = drills.steps

    def faults(store: str) -> str:
        reference = drills.reference_run(layout)
        with _bucket(drills, store, "faults") as bucket, contextlib.ExitStack() as stack:
            for kind, rate, options in (
                ("unavailable", 0.02, {}), ("lost_request", 0.01, {}), ("lost_reply", 0.01, {}),
                ("truncated", 0.01, {}), ("slow", 0.05, {"seconds": 0.3}),
            ):  # fmt: skip
                stack.enter_context(bucket.proxy.fault(kind, rate=rate, **options))
            run = bucket.start(layout)
            bucket.await_step(last // 3, run)
            start = time.time()
            with bucket.proxy.fault("unavailable"):
                time.sleep(outage_seconds)
            outage = start, time.time()
            bucket.finish(run)
            compare(bucket.path, reference, exact=True, steps=last)
            age = _oldest(bucket.proxy, bucket.name, outage)
            if age > MAX_AGE:
                raise DrillError(f"metrics were {age:.0f} s old, expected at most {MAX_AGE:.0f} s")
            suffered = sum(bool(request.fault) for request in bucket.proxy.requests)
            total = len(bucket.proxy.requests)
            return f"{suffered:,} of {total:,} requests failed; metrics at most {age:.0f} s old; bit-identical"

    def kill(store: str) -> str:
        reference = drills.reference_run(layout)
        with _bucket(drills, store, "kill") as bucket:
            run = bucket.start(layout)
            bucket.await_step(rng.randint(last // 4, last // 2), run)
            time.sleep(rng.uniform(0, 1))
            pids = children(run.pid)
            run.kill()  # Linux then kills its children
            run.wait()
            await_gone(pids)
            reached = max(read_examples(bucket.path), default=0)
            bucket.finish(bucket.start(smaller_layout))
            since = resumed_from(bucket.path, log=bucket.log)
            compare(bucket.path, reference, exact=False, since=since, steps=last)
            return (
                f"killed with logs up to step {reached}, resumed from {since} on {smaller_layout.processes} processes"
            )

    def cut(store: str) -> str:
        reference = drills.reference_run(layout)
        step = drills.saved_every * (last // drills.saved_every // 2)
        with _bucket(drills, store, "cut") as bucket:
            with bucket.proxy.fault("cut", only=rf"write .*/checkpoints/{step}/state/"):
                run = bucket.start(layout)
                while not any(request.fault == "cut" for request in list(bucket.proxy.requests)):
                    if run.poll() is not None:
                        raise DrillError(f"the run ended before step {step} was saved, see {bucket.log}")
                    time.sleep(0.1)
                pids = children(run.pid)
                run.kill()
                run.wait()
                await_gone(pids)
            bucket.finish(bucket.start(layout))
            since = resumed_from(bucket.path, log=bucket.log)
            if since >= step:
                raise DrillError(f"resumed from step {since}, whose upload was cut")
            compare(bucket.path, reference, exact=True, steps=last)
            return f"the upload of step {step} was cut; resumed from {since}; bit-identical"

    def refused(kind: str) -> Any:
        only = "write|start|delete|copy|update" if kind == "denied" else ""

        def drill(store: str) -> str:
            reference = drills.reference_run(layout)
            with _bucket(drills, store, kind) as bucket:
                run = bucket.start(layout, "--config.storage_timeout=5", "--config.checkpoint.max_failed_saves=2")
                bucket.await_step(last // 3, run)
                start = time.monotonic()
                with bucket.proxy.fault(kind, only=only):
                    bucket.finish(run, UNAVAILABLE)
                    seconds = time.monotonic() - start
                    bucket.finish(bucket.start(layout), USER_ERROR)
                errors = re.findall(r"mplug2: error: (.*)", bucket.log.read_text(errors="replace"))
                bucket.finish(bucket.start(layout))
                since = resumed_from(bucket.path, log=bucket.log)
                compare(bucket.path, reference, exact=True, steps=last)
                return (
                    f"status {UNAVAILABLE} after {seconds:.0f} s, then {USER_ERROR} ({errors[-1]}); "
                    f"resumed from {since}; bit-identical"
                )

        return drill

    yield f"faults on {layout}", faults
    yield f"kill all of {layout}", kill
    yield f"upload cut on {layout}", cut
    if not quick:
        yield "bucket refuses writes", refused("denied")
        yield "bucket is deleted", refused("missing")


def storage_drills(drills: Drills, *, quick: bool, seed: int) -> Iterator[tuple[str, Any]]:
    """Yield the drills, with an object store that serves them all."""
    with emulator.serve() as store:
        os.environ.update(emulator.environment(store))
        for name, drill in storage(drills, quick=quick, seed=seed):
            yield name, lambda drill=drill: drill(store)
