"""Measure a training step on this machine: time, peak memory, and FLOP rate relative to one large matmul.

    python benchmarks/step.py                      # base, caption, 1 video of 4 frames at 224 px, float32
    python benchmarks/step.py --size tiny --steps 3

The relative rate is (FLOPs of the model's matmuls, forward and backward) / (step time) / (FLOP rate of a square float32
matmul measured between the steps of the same process), so it does not depend on the current speed of the machine.
"""

import argparse
import os
import resource
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines.config import DataConfig, ExampleConfig, InstructionConfig, SourceConfig, VisualConfig
from mplug2_jax.model.config import SpecialTokens, model_config
from mplug2_jax.parallel.config import MeshConfig
from mplug2_jax.parallel.mesh import make_mesh
from mplug2_jax.parallel.placement import put_batch
from mplug2_jax.training.config import RunConfig, StreamConfig
from mplug2_jax.training.state import RunSpec, make_run_spec
from mplug2_jax.training.step import StreamBatches, make_train_step, streams_loss
from mplug2_jax.training.telemetry.flops import training_flops


def run_spec(args: argparse.Namespace) -> RunSpec:
    """Return the measured run: the caption objective only, layers unrolled."""
    model = model_config(
        args.size, dtype="float32", image_size=args.image_size, scan_unroll=64, dropout=args.dropout,
        attention_dropout=args.dropout,
    )  # fmt: skip
    caption = ExampleConfig(instructions={"caption": InstructionConfig(templates=("",))}, target_length=args.tokens)
    data = DataConfig(
        sources={"digits": SourceConfig(kind="video")},
        visual=VisualConfig(image_size=args.image_size, num_frames=args.frames),
        examples=caption,
        batch_size=args.batch,
    )
    stream = StreamConfig(data=data, objectives={"caption": 1.0})
    config = RunConfig(name="benchmark", steps=1000, model=model, streams={"video": stream})
    return make_run_spec(config, SpecialTokens(), make_mesh(MeshConfig()))


def random_batch(args: argparse.Namespace, vocabulary: int) -> dict[str, np.ndarray]:
    """Return random pixels and captions."""
    rng = np.random.default_rng(0)
    shape = (args.batch, args.frames, args.image_size, args.image_size, 3)
    return {
        "frames": rng.integers(0, 256, shape, np.uint8),
        "target": rng.integers(1, vocabulary, (args.batch, args.tokens), np.int32),
        "target_weights": np.ones((args.batch, args.tokens), np.float32),
    }


def count_flops(spec: RunSpec, batches: StreamBatches) -> int:
    """Return the FLOPs of one step by this project's count."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    return training_flops(
        lambda p, b, k: streams_loss(spec, p, None, {}, b, k, jnp.zeros(())), spec.shapes["params"], batches, key
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="base", help="row of the model table (default: %(default)s)")
    parser.add_argument("--image-size", type=int, help="pixels (default: from the size)")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--frames", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=20, help="caption length (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=5, help="steps measured (default: %(default)s)")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--matmul", type=int, default=4096, help="side of the matmul (default: %(default)s)")
    args = parser.parse_args()
    args.image_size = args.image_size or model_config(args.size).image_size

    spec = run_spec(args)
    batches = {"video": put_batch(random_batch(args, spec.config.model.vocab_size), spec.mesh)}
    flops = count_flops(spec, batches)
    step, state = make_train_step(spec), spec.init()
    square = jax.random.normal(jax.random.key(0), (args.matmul, args.matmul))
    multiply = jax.jit(jnp.matmul)
    jax.block_until_ready(multiply(square, square))

    start = time.perf_counter()
    state, metrics = step(state, batches)
    jax.block_until_ready((state, metrics))
    compiled = time.perf_counter() - start

    times, rates = [], []
    for _ in range(args.steps):
        start = time.perf_counter()
        jax.block_until_ready(multiply(square, square))
        rates.append(2 * args.matmul**3 / (time.perf_counter() - start))
        start = time.perf_counter()
        state, metrics = step(state, batches)
        jax.block_until_ready((state, metrics))
        times.append(time.perf_counter() - start)
        print(
            f"step {times[-1]:.3f} s  matmul {rates[-1] / 1e9:,.0f} GFLOP/s  loss {float(metrics['loss']):.3f}",
            flush=True,
        )

    seconds, rate = float(np.median(times)), float(np.median(rates))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"\n{args.size}, caption, batch {args.batch} x {args.frames} frames x {args.image_size} px, float32, "
        f"dropout {args.dropout}, {spec.model_def.num_params():,} parameters"
    )
    print(f"compile and first step   {compiled:8.1f} s")
    print(f"step (median of {args.steps:2})     {seconds:8.3f} s")
    print(f"FLOPs per step           {flops / 1e9:8.1f} GFLOP (matmuls, forward and backward)")
    print(f"peak memory of process   {peak:8.2f} GiB")
    print(f"matmul {args.matmul} x {args.matmul}      {rate / 1e9:8.1f} GFLOP/s (median of {args.steps})")
    print(f"share of matmul rate     {flops / seconds / rate:8.1%}")


if __name__ == "__main__":
    main()
