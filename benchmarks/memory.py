"""Memory of one chip for a training step, by ahead-of-time compilation for TPUs that need not be here.

    python benchmarks/memory.py                       # large, caption, 8 clips of 64 frames, sequence=1, 2, 4, 8
    python benchmarks/memory.py --sequence 4 --state  # and other ways to keep state: 16 bits, on the host, ...
    python benchmarks/memory.py --frames 128 --sequence 8

Everything is the compiler's own account. Beside it stands the largest activation that an all-gather makes: a tower that
gathered activations over the frames of a clip would show the array of the second line, or more.
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
from mplug2_jax.planning.programs import training_program
from mplug2_jax.planning.traffic import Collective, parse_collectives
from mplug2_jax.training.config import AdamWConfig, RunConfig

GIB = 2**30
_TOPOLOGIES = {8: "v5p:2x2x2", 16: "v5p:2x2x4", 32: "v5p:2x4x4", 64: "v5p:4x4x4"}  # by the number of chips


def caption_run(args: argparse.Namespace, batch: int) -> RunConfig:
    """The recipe of long clips, with so many in its batch."""
    recipe = load_recipe(
        f"finetune:caption,{args.size},{args.frames}", [f"--config.streams.video.data.batch_size={batch}"]
    )
    config = build(RunConfig, recipe)
    layers = args.layers or config.model.vision_layers
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vision_layers=layers))


def largest_gather(found: list[Collective], known: set[int]) -> str:
    """The largest array that an all-gather makes, parameters and layers of them left out."""
    sizes = [(c.bytes * c.size / (c.size - 1), c.shape) for c in found if c.kind == "all-gather" and c.size > 1]
    size, shape = max(((s, name) for s, name in sizes if not _made(name, s) & known), default=(0.0, "none"))
    return f"{size / 2**20:.1f} MiB of {shape}"


def _made(shape: str, size: float) -> set[int]:
    """How many numbers a gathered array has, by its bytes and the type of its shards."""
    bits = re.match(r"[a-z]+(\d+)", shape)
    return {round(size * 8 / int(bits.group(1)))} if bits else set()


def line(name: str, config: RunConfig, mesh: MeshConfig) -> None:
    """Compiles, and prints a line of the table."""
    start = time.perf_counter()
    config = dataclasses.replace(config, mesh=mesh)
    program = training_program(config, parse_topology(_TOPOLOGIES[mesh.fsdp * mesh.sequence]))
    compiled = program.compile(effort=-1).executable
    parameters = jax.tree.leaves(program.spec.definition.shapes)
    known = {math.prod(shape) for leaf in parameters for shape in (leaf.shape, leaf.shape[1:])}
    memory = compiled.memory_analysis()
    figures = (
        memory.peak_memory_in_bytes, memory.argument_size_in_bytes, memory.temp_size_in_bytes,
        memory.host_argument_size_in_bytes,
    )  # fmt: skip
    shown = "".join(f"{figure / GIB:10.2f}" for figure in figures)
    seconds = time.perf_counter() - start
    gather = largest_gather(parse_collectives(compiled.as_text(), program.spec.mesh), known)
    print(f"{name:34}{shown}{seconds:9.0f}  {gather}", flush=True)


def main() -> None:
    """Compiles and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="large", help="row of the model table (default: %(default)s)")
    parser.add_argument("--layers", type=int, help="of the vision tower (default: the size's own)")
    parser.add_argument("--frames", type=int, default=64, help="of a clip (default: %(default)s)")
    parser.add_argument("--sequence", type=int, nargs="+", choices=[1, 2, 4, 8], default=[1, 2, 4, 8])
    parser.add_argument("--clips", type=int, default=8, help="in the global batch (default: %(default)s)")
    parser.add_argument("--state", action="store_true", help="vary how state is kept, on the last sequence axis")
    args = parser.parse_args()

    config = caption_run(args, args.clips)
    model = config.model
    rows = args.frames * (model.num_patches + 1)
    print(f"{args.size}, caption, {args.clips} clips of {args.frames} frames, v5p, fsdp=8, GiB per chip")
    print(f"one clip in the tower: {2 * rows * model.vision_width / 2**20:.1f} MiB bf16[{rows},{model.vision_width}]\n")
    print(f"{'':34}" + "".join(f"{name:>10}" for name in ("peak", "state", "temp", "host")) + f"{'seconds':>9}  gather")
    for parts in args.sequence:
        line(f"sequence={parts}", config, MeshConfig(fsdp=8, sequence=parts))
    if args.state:
        mesh = MeshConfig(fsdp=8, sequence=args.sequence[-1])
        keep = dataclasses.replace
        for name, varied in {
            "no remat": keep(config, model=keep(model, remat=RematConfig())),
            "grad_accum_steps=2, twice the clips": keep(caption_run(args, 2 * args.clips), grad_accum_steps=2),
            "bfloat16 parameters": keep(config, param_dtype="bfloat16"),
            "bfloat16 moments": keep(config, optimizer=AdamWConfig(b2=0.98, mu_dtype="bfloat16", nu_dtype="bfloat16")),
            "moments on the host": keep(config, optimizer=AdamWConfig(offload_moments=True)),
        }.items():
            line(name, varied, mesh)


if __name__ == "__main__":
    main()
