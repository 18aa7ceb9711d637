"""Measure the overhead of monitoring: the training loop's step against the bare compiled step, alternating.

    python benchmarks/overhead.py                  # tiny, 40 steps each
    python benchmarks/overhead.py --size base --steps 10

The bare step returns only the loss, so the compiler removes what only metrics need. The monitored step adds norms by
tower, goodput accounting, fetching of metrics, fault detection, and a line of metrics per step, ten times as often as
runs write by default.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np

from data_pipelines.config import DataConfig, ExampleConfig, InstructionConfig, SourceConfig
from mplug2_jax.model.config import SpecialTokens, model_config
from mplug2_jax.parallel.config import MeshConfig
from mplug2_jax.parallel.mesh import make_mesh
from mplug2_jax.parallel.placement import put_batch, replicated_sharding
from mplug2_jax.training.checkpoint.checksums import checksums
from mplug2_jax.training.checkpoint.metadata import DataPosition
from mplug2_jax.training.config import FaultConfig, RunConfig, StreamConfig
from mplug2_jax.training.state import RunSpec, TrainState, make_run_spec
from mplug2_jax.training.step import StreamBatches, batch_sizes, make_train_step, train_step
from mplug2_jax.training.telemetry.events import EventLog
from mplug2_jax.training.telemetry.goodput import GoodputTracker
from mplug2_jax.training.telemetry.monitor import TrainMonitor
from mplug2_jax.training.workdir import WorkDir


def compile_bare(spec: RunSpec) -> Any:
    """Compile the step without metrics."""

    def bare(state: TrainState, batches: StreamBatches) -> tuple[TrainState, jax.Array]:
        after, metrics = train_step(spec, state, batches, spec.hyperparams)
        return after, metrics["loss"]

    return jax.jit(bare, donate_argnums=0, out_shardings=(spec.shardings, replicated_sharding(spec.mesh)))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="tiny", help="row of the model table (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=40, help="steps of each variant (default: %(default)s)")
    args = parser.parse_args()

    model = model_config(args.size, dtype="float32")
    caption = ExampleConfig(instructions={"caption": InstructionConfig(templates=("",))}, target_length=24)
    data = DataConfig(sources={"digits": SourceConfig(kind="image")}, examples=caption, batch_size=args.batch)
    stream = StreamConfig(data=data, objectives={"caption": 1.0})
    config = RunConfig(
        name="overhead",
        steps=10**6,
        model=model,
        streams={"image": stream},
        log_every=1,
        faults=FaultConfig(spike_zscore=1e9),
    )
    spec = make_run_spec(config, SpecialTokens(), make_mesh(MeshConfig()))
    rng = np.random.default_rng(0)
    side = model.image_size
    arrays = {
        "frames": rng.integers(0, 256, (args.batch, 1, side, side, 3), np.uint8),
        "target": rng.integers(1, model.vocab_size, (args.batch, 24), np.int32),
        "target_weights": np.ones((args.batch, 24), np.float32),
    }
    batches = {"image": put_batch(arrays, spec.mesh)}
    step, bare_step, state = make_train_step(spec), compile_bare(spec), spec.init()
    times: dict[str, list[float]] = {"bare": [], "monitored": []}
    with tempfile.TemporaryDirectory() as folder:
        workdir = WorkDir(Path(folder))
        monitor = TrainMonitor(spec, workdir, DataPosition(0, {}), EventLog(workdir.events), GoodputTracker())
        monitor.compile(step, 1, state, batches)
        for number in range(1, 2 * args.steps + 4):
            variant = ("bare", "monitored")[number % 2]
            start = time.perf_counter()
            if variant == "bare":
                with jax.set_mesh(spec.mesh):
                    state, metrics = bare_step(state, batches)
            else:
                with monitor.goodput.track("data_wait"):
                    pass
                monitor.goodput.start_step(number)
                monitor.profiler.before_step(number)
                state, metrics = step(state, batches)
                monitor.profiler.after_step(number, metrics)
                monitor.on_step_dispatched(number, metrics, batch_sizes(batches), (), {})
                monitor.drain(max_pending=1)
            jax.block_until_ready((state, metrics))
            if number > 3:
                times[variant].append(time.perf_counter() - start)
        monitor.close()
    checksums(state)
    start = time.perf_counter()
    checksums(state)
    checking = time.perf_counter() - start
    bytes_ = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    bare, monitored = (float(np.median(times[variant])) for variant in ("bare", "monitored"))
    print(f"{args.size}, caption, batch {args.batch}, float32, {spec.model_def.num_params():,} parameters")
    print(f"bare step (median of {len(times['bare'])})     {1e3 * bare:9.2f} ms")
    print(f"monitored step (median of {len(times['monitored'])})  {1e3 * monitored:9.2f} ms")
    print(f"overhead                      {monitored / bare - 1:9.2%}")
    print(f"checksums of {bytes_ / 2**20:,.0f} MiB of state  {1e3 * checking:9.2f} ms")


if __name__ == "__main__":
    main()
