"""Compare loss curves and parameters of a tiny demo run on every mesh with those of one device.

    python benchmarks/meshes.py                        # all 35 meshes of 8 simulated devices over five axes
    python benchmarks/meshes.py --devices 2 4          # fewer devices
    python benchmarks/meshes.py --only 1x1x2x2x2       # one mesh: replica x data x fsdp x sequence x tensor

Dropout, attention dropout, masked words and hard negatives are on: randomness must not depend on the mesh. Adam's eps
is 1e-2: with 1e-8 a gradient of rounding noise becomes a full step. The table shows the largest relative error of the
loss over the steps, and the largest error of a parameter after them, relative to its array's largest absolute value or
to the learning rate, whichever is larger.
"""

import argparse
import dataclasses
import itertools
import math
import os
import time

os.environ["JAX_PLATFORMS"] = "cpu"
if "XLA_FLAGS" not in os.environ:  # compiling dominates the run time
    os.environ["XLA_FLAGS"] = "--xla_cpu_use_fusion_emitters=false --xla_llvm_disable_expensive_passes=true"

import jax
import numpy as np

from data_pipelines.config import VisualConfig
from data_pipelines.digitworld import vocabulary_texts
from data_pipelines.tokenizers import train_wordpiece
from mplug2_jax.config import build, load_recipe
from mplug2_jax.parallel.config import MESH_AXES, MeshConfig
from mplug2_jax.parallel.mesh import make_mesh
from mplug2_jax.parallel.placement import put_batch
from mplug2_jax.training.config import RunConfig, StreamConfig
from mplug2_jax.training.loop import open_streams
from mplug2_jax.training.state import RunSpec, make_run_spec
from mplug2_jax.training.step import make_train_step
from mplug2_jax.training.workdir import special_tokens

Curve = tuple[np.ndarray, list[np.ndarray]]  # losses, parameters after the last step


def tiny_demo(frames: int) -> RunConfig:
    """Return the demo with one layer per module, width 32, each objective once, and dropout."""
    config: RunConfig = build(RunConfig, load_recipe("demo", []))
    model = dataclasses.replace(
        config.model, vision_width=32, vision_layers=1, vision_heads=2, image_size=16, width=32, heads=2, mlp_width=64,
        fusion_layers=1, decoder_layers=1, num_latents=4, vocab_size=256, contrastive_width=16, dropout=0.1,
        attention_dropout=0.1,
    )  # fmt: skip

    def small(name: str, *objectives: str) -> StreamConfig:
        visual = VisualConfig(image_size=16, num_frames=frames)
        data = dataclasses.replace(config.streams[name].data, batch_size=8, visual=visual)
        return StreamConfig(data=data, objectives=dict.fromkeys(objectives, 1.0))

    return dataclasses.replace(
        config,
        model=model,
        streams={
            "image_text": small("image_text", "vlc"),
            "video_text": small("video_text", "vlm", "ilm"),
            "text": small("text", "mlm"),
        },
        optimizer=dataclasses.replace(config.optimizer, learning_rate=1e-2, eps=1e-2),
        schedule=dataclasses.replace(config.schedule, warmup_steps=1),
        evaluations={},
    )


def meshes(devices: int) -> list[MeshConfig]:
    """Return all meshes of this number of devices."""
    divisors = [d for d in range(1, devices + 1) if devices % d == 0]
    shapes = itertools.product(divisors, repeat=len(MESH_AXES))
    return [MeshConfig(**dict(zip(MESH_AXES, s, strict=True))) for s in shapes if math.prod(s) == devices]


def main() -> None:
    """Run each mesh and print a row for it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, nargs="+", default=[8], help="number of simulated devices (default: 8)")
    parser.add_argument("--only", nargs="+", help="axis sizes, such as 1x1x2x2x2, instead of all meshes")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--frames", type=int, default=4, help="frames per video (default: %(default)s)")
    args = parser.parse_args()
    chosen = [mesh for count in args.devices for mesh in meshes(count)]
    if args.only:
        chosen = [MeshConfig(**dict(zip(MESH_AXES, map(int, s.split("x")), strict=True))) for s in args.only]
    jax.config.update("jax_num_cpu_devices", max(math.prod(dataclasses.astuple(mesh)) for mesh in chosen))
    jax.config.update("jax_disable_most_optimizations", True)

    config = tiny_demo(args.frames)
    tokenizer = train_wordpiece(vocabulary_texts(100), 200)
    streams = open_streams(config, tokenizer)
    batches = [{name: stream.batch(step).arrays for name, stream in streams.items()} for step in range(args.steps)]

    def make_spec(mesh: MeshConfig) -> RunSpec:
        count = math.prod(dataclasses.astuple(mesh))
        return make_run_spec(config, special_tokens(tokenizer), make_mesh(mesh, jax.devices()[:count]))

    def run(mesh: MeshConfig) -> Curve:
        spec = make_spec(mesh)
        state, step, losses = jax.device_put(start, spec.shardings), make_train_step(spec), []
        for batch in batches:
            state, metrics = step(state, {name: put_batch(arrays, spec.mesh) for name, arrays in batch.items()})
            losses.append(float(metrics["loss"]))
        return np.asarray(losses), [np.asarray(leaf) for leaf in jax.tree.leaves(state["params"])]

    start = jax.tree.map(np.asarray, make_spec(MeshConfig(fsdp=1)).init())
    expected = run(MeshConfig(fsdp=1))
    print(f"one device: {args.steps} steps, loss {expected[0][0]:.4f} to {expected[0][-1]:.4f}\n")
    print("".join(f"{axis:>9}" for axis in MESH_AXES) + f"{'loss':>11}{'parameters':>12}{'seconds':>9}", flush=True)
    for mesh in chosen:
        start_time = time.perf_counter()
        losses, parameters = run(mesh)
        loss = np.max(np.abs(losses / expected[0] - 1))
        parameter = max(
            np.abs(a - b).max() / max(np.abs(b).max(), config.optimizer.learning_rate)
            for a, b in zip(parameters, expected[1], strict=True)
        )
        sizes = "".join(f"{size:9}" for size in dataclasses.astuple(mesh))
        print(f"{sizes}{loss:11.1e}{parameter:12.1e}{time.perf_counter() - start_time:9.0f}", flush=True)


if __name__ == "__main__":
    main()
