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
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from data_pipelines.examples import ExampleConfig
from data_pipelines.loader import DataConfig
from data_pipelines.sources.config import SourceConfig
from mplug2_jax.model.config import RematConfig, SpecialTokens, model_config
from mplug2_jax.model.mplug2 import Params, define
from mplug2_jax.parallel.mesh import MeshConfig, make_mesh
from mplug2_jax.parallel.placement import batch_sharding, check_batch
from mplug2_jax.training.config import RunConfig, StreamConfig
from mplug2_jax.training.optimizer import AdamWConfig
from mplug2_jax.training.state import plan_run
from mplug2_jax.training.step import jitted_step

GIB = 2**30
_TOPOLOGIES = {8: "v5p:2x2x2", 16: "v5p:2x2x4", 32: "v5p:2x4x4", 64: "v5p:4x4x4"}  # by the number of chips
_BYTES = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "pred": 1, "u8": 1, "s8": 1}


def caption_run(args: argparse.Namespace, batch: int) -> RunConfig:
    """Captions of clips, and everything else as long clips need it."""
    model = model_config(
        args.size, dropout=0.0, attention_dropout=0.0, remat=RematConfig(vision="full", text="full", decoder="full")
    )
    data = DataConfig(sources={"clips": SourceConfig(kind="video")}, examples=ExampleConfig(), batch_size=batch)
    return RunConfig(
        name="memory",
        steps=1000,
        model=dataclasses.replace(model, vision_layers=args.layers or model.vision_layers),
        streams={"clips": StreamConfig(data=data, objectives={"caption": 1.0})},
    )


def compiled(config: RunConfig, mesh: MeshConfig, args: argparse.Namespace) -> jax.stages.Compiled:
    """The step of a run on a topology."""
    devices = topologies.get_topology_desc(_TOPOLOGIES[mesh.fsdp * mesh.sequence], "tpu").devices
    plan = plan_run(config, SpecialTokens(), make_mesh(mesh, devices))
    rows, side = config.streams["clips"].data.batch_size, config.model.image_size
    check_batch("a micro-batch", rows // config.accumulate, plan.mesh)

    def array(shape: tuple[int, ...], dtype: object) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(plan.mesh))

    batch = {
        "frames": array((rows, args.frames, side, side, 3), jnp.uint8),
        "target": array((rows, 32), jnp.int32),
        "target_weights": array((rows, 32), jnp.float32),
    }
    with jax.set_mesh(plan.mesh):
        return jitted_step(plan).lower(plan.shapes, {"clips": batch}).compile()


def largest_gather(program: str, parameters: Params) -> str:
    """The largest array that an all-gather of the program makes, parameters and layers of them left out."""
    known = {math.prod(shape) for leaf in jax.tree.leaves(parameters) for shape in (leaf.shape, leaf.shape[1:])}
    made = re.findall(r"= \(?(?:[^=]*, )?(\w+)\[([\d,]+)\]\S* all-gather(?:-start)?\(", program)
    numbers = [(math.prod(map(int, shape.split(","))), t, shape) for t, shape in made]
    sized = [(_BYTES.get(t, 4) * count, f"{t}[{shape}]") for count, t, shape in numbers if count not in known]
    size, shape = max(sized, default=(0, "none"))
    return f"{size / 2**20:.1f} MiB {shape}"


def line(name: str, config: RunConfig, mesh: MeshConfig, args: argparse.Namespace) -> None:
    """Compiles, and prints a line of the table."""
    start = time.perf_counter()
    program = compiled(config, mesh, args)
    parameters = define(config.model, config.parts()).shapes
    memory = program.memory_analysis()
    figures = (
        memory.peak_memory_in_bytes, memory.argument_size_in_bytes, memory.temp_size_in_bytes,
        memory.host_argument_size_in_bytes,
    )  # fmt: skip
    shown = "".join(f"{figure / GIB:10.2f}" for figure in figures)
    seconds = time.perf_counter() - start
    print(f"{name:34}{shown}{seconds:9.0f}  {largest_gather(program.as_text(), parameters)}", flush=True)


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
    rows = args.frames * (model.patches + 1)
    print(f"{args.size}, caption, {args.clips} clips of {args.frames} frames, v5p, fsdp=8, GiB per chip")
    print(f"one clip in the tower: {2 * rows * model.vision_width / 2**20:.1f} MiB bf16[{rows},{model.vision_width}]\n")
    print(f"{'':34}" + "".join(f"{name:>10}" for name in ("peak", "state", "temp", "host")) + f"{'seconds':>9}  gather")
    for parts in args.sequence:
        line(f"sequence={parts}", config, MeshConfig(fsdp=8, sequence=parts), args)
    if args.state:
        mesh = MeshConfig(fsdp=8, sequence=args.sequence[-1])
        keep = dataclasses.replace
        for name, varied in {
            "no remat": keep(config, model=keep(model, remat=RematConfig())),
            "accumulate=2, twice the clips": keep(caption_run(args, 2 * args.clips), accumulate=2),
            "bfloat16 parameters": keep(config, parameter_dtype="bfloat16"),
            "bfloat16 moments": keep(config, optimizer=AdamWConfig(b2=0.98, mu_dtype="bfloat16", nu_dtype="bfloat16")),
            "moments on the host": keep(config, optimizer=AdamWConfig(offload=True)),
        }.items():
            line(name, varied, mesh, args)


if __name__ == "__main__":
    main()
