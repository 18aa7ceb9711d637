"""Measure the memory of the contrastive loss on one chip while the pod grows and the batch per chip stays the same.

    python benchmarks/contrast.py                  # 32 pairs a chip, 8 to 2,048 chips of v5p
    python benchmarks/contrast.py --pairs 8

All numbers come from the compiler, for the loss and its gradient on real topologies.
"""

import argparse
import os
import time

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax
import jax.numpy as jnp

from mplug2_jax.objectives.vlc import contrastive_loss
from mplug2_jax.parallel.accelerators import parse_topology
from mplug2_jax.parallel.config import MeshConfig
from mplug2_jax.parallel.mesh import make_mesh
from mplug2_jax.parallel.placement import batch_sharding
from mplug2_jax.planning.programs import get_topology_devices

TOPOLOGIES = ("v5p:2x2x2", "v5p:2x4x4", "v5p:4x4x8", "v5p:8x8x8", "v5p:8x16x16")


def main() -> None:
    """Compile and print a row per topology."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=32, help="per chip (default: %(default)s)")
    parser.add_argument("--width", type=int, default=256, help="feature width (default: %(default)s)")
    args = parser.parse_args()

    print(f"{'topology':14}{'chips':>7}{'pairs':>9}{'temporaries MiB':>17}{'ratio':>14}{'seconds':>9}")
    first = 0.0
    for name in TOPOLOGIES:
        topology, start = parse_topology(name), time.perf_counter()
        mesh = make_mesh(MeshConfig(), get_topology_devices(topology))
        pairs = args.pairs * topology.chips
        features = jax.ShapeDtypeStruct((pairs, args.width), jnp.float32, sharding=batch_sharding(mesh))
        ids = jax.ShapeDtypeStruct((pairs,), jnp.int32, sharding=batch_sharding(mesh))

        def loss(visual: jax.Array, text: jax.Array, ids: jax.Array) -> jax.Array:
            return contrastive_loss(visual, text, ids, jnp.ones(ids.shape), jnp.asarray(0.07))

        with jax.set_mesh(mesh):
            compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(features, features, ids).compile()
        temporaries = compiled.memory_analysis().temp_size_in_bytes / 2**20
        first = first or temporaries
        figures = f"{temporaries:17.2f}{temporaries / first:14.2f}{time.perf_counter() - start:9.1f}"
        print(f"{name:14}{topology.chips:7,}{pairs:9,}{figures}", flush=True)


if __name__ == "__main__":
    main()
