"""Measure the memory of a training step on one chip, by ahead-of-time compilation for TPU topologies.

    python benchmarks/memory.py                       # large, caption, 8 videos of 64 frames, sequence=1, 2, 4, 8
    python benchmarks/memory.py --sequence 4 --state  # also other state layouts: 16 bits, on the host, ...
    python benchmarks/memory.py --frames 128 --sequence 8

All numbers come from the compiler. The last column shows the largest activation that an all-gather produces: a vision
tower that gathered activations over frames would show the array of the second line, or a larger one.
"""

import argparse
import dataclasses
import math
import os
import re
import time

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax

from mplug2_jax.config import build, load_recipe
from mplug2_jax.model.config import RematConfig
from mplug2_jax.parallel.accelerators import parse_topology
from mplug2_jax.parallel.config import MeshConfig
from mplug2_jax.planning.programs import trace_training
from mplug2_jax.planning.traffic import Collective, parse_collectives
from mplug2_jax.training.config import OptimizerConfig, RunConfig

GIB = 2**30
_TOPOLOGIES = {8: "v5p:2x2x2", 16: "v5p:2x2x4", 32: "v5p:2x4x4", 64: "v5p:4x4x4"}  # by number of chips


def caption_run(args: argparse.Namespace, batch: int) -> RunConfig:
    """Return the fine-tuning run on long videos with this batch size."""
    recipe = load_recipe(
        f"finetune:caption,{args.size},{args.frames}", [f"--config.streams.video.data.batch_size={batch}"]
    )
    config = build(RunConfig, recipe)
    layers = args.layers or config.model.vision_layers
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vision_layers=layers))


def largest_gather(collectives: list[Collective], parameter_sizes: set[int]) -> str:
    """Return the largest output of an all-gather, other than parameters and single layers of them."""
    gathers = (c for c in collectives if c.kind == "all-gather" and c.group_size > 1)
    sizes = [(c.bytes_sent * c.group_size / (c.group_size - 1), c.shape) for c in gathers]
    size, shape = max(
        ((s, name) for s, name in sizes if not _num_elements(name, s) & parameter_sizes), default=(0.0, "none")
    )
    return f"{size / 2**20:.1f} MiB of {shape}"


def _num_elements(shape: str, size: float) -> set[int]:
    """Return the number of elements of a gathered array, from its bytes and the dtype of its shards."""
    bits = re.match(r"[a-z]+(\d+)", shape)
    return {round(size * 8 / int(bits.group(1)))} if bits else set()


def print_row(name: str, config: RunConfig, mesh: MeshConfig) -> None:
    """Compile and print a row of the table."""
    start = time.perf_counter()
    config = dataclasses.replace(config, mesh=mesh)
    program = trace_training(config, parse_topology(_TOPOLOGIES[mesh.fsdp * mesh.sequence]))
    compiled = program.compile(effort=-1).executable
    parameters = jax.tree.leaves(program.spec.model_def.shapes)
    parameter_sizes = {math.prod(shape) for leaf in parameters for shape in (leaf.shape, leaf.shape[1:])}
    memory = compiled.memory_analysis()
    figures = (
        memory.peak_memory_in_bytes, memory.argument_size_in_bytes, memory.temp_size_in_bytes,
        memory.host_argument_size_in_bytes,
    )  # fmt: skip
    shown = "".join(f"{figure / GIB:10.2f}" for figure in figures)
    seconds = time.perf_counter() - start
    gather = largest_gather(parse_collectives(compiled.as_text(), program.spec.mesh), parameter_sizes)
    print(f"{name:34}{shown}{seconds:9.0f}  {gather}", flush=True)


def main() -> None:
    """Compile and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="large", help="row of the model table (default: %(default)s)")
    parser.add_argument("--layers", type=int, help="of the vision tower (default: from the size)")
    parser.add_argument("--frames", type=int, default=64, help="frames per video (default: %(default)s)")
    parser.add_argument("--sequence", type=int, nargs="+", choices=[1, 2, 4, 8], default=[1, 2, 4, 8])
    parser.add_argument(
        "--videos", "--clips", type=int, default=8, help="videos in the global batch (default: %(default)s)"
    )
    parser.add_argument(
        "--state", action="store_true", help="also vary the state layout, at the last value of --sequence"
    )
    args = parser.parse_args()

    config = caption_run(args, args.videos)
    model = config.model
    rows = args.frames * (model.num_patches + 1)
    print(f"{args.size}, caption, {args.videos} videos of {args.frames} frames, v5p, fsdp=8, GiB per chip")
    print(
        f"one video in the tower: {2 * rows * model.vision_width / 2**20:.1f} MiB bf16[{rows},{model.vision_width}]\n"
    )
    print(f"{'':34}" + "".join(f"{name:>10}" for name in ("peak", "state", "temp", "host")) + f"{'seconds':>9}  gather")
    for parts in args.sequence:
        print_row(f"sequence={parts}", config, MeshConfig(fsdp=8, sequence=parts))
    if args.state:
        mesh = MeshConfig(fsdp=8, sequence=args.sequence[-1])
        replace = dataclasses.replace
        for name, variant in {
            "no remat": replace(config, model=replace(model, remat=RematConfig())),
            "grad_accum_steps=2, twice the batch": replace(caption_run(args, 2 * args.videos), grad_accum_steps=2),
            "bfloat16 parameters": replace(config, param_dtype="bfloat16"),
            "bfloat16 moments": replace(
                config, optimizer=OptimizerConfig(b2=0.98, mu_dtype="bfloat16", nu_dtype="bfloat16")
            ),
            "moments on the host": replace(config, optimizer=OptimizerConfig(offload_moments=True)),
        }.items():
            print_row(name, variant, mesh)


if __name__ == "__main__":
    main()
