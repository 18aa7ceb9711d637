"""Measure captioning throughput of beam search with and without the key-value cache, in one process.

    JAX_PLATFORMS=cuda python benchmarks/throughput.py                  # large, 16 frames, 8 videos, beam 5, 20 tokens
    python benchmarks/throughput.py --size tiny --frames 4 --repeat 3   # on a CPU
    python benchmarks/throughput.py --size tiny --frames 4 --devices 2  # two cores as devices

The time starts from visual tokens (the vision tower has a row of its own). Weights are random and no beam ends early.
Without a cache the decoder reads the whole prefix, padded to its full length, for every token. The release also gives
each beam a copy of the memory and projects keys and values again in every step. With several devices, videos and
parameters are sharded over ``fsdp``, as in evaluation on a mesh.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from mplug2_jax.generation.beam import DecodeOutput, beam_search
from mplug2_jax.generation.config import SearchConfig
from mplug2_jax.generation.decode import generate
from mplug2_jax.model.config import SpecialTokens, model_config
from mplug2_jax.model.decoder import Decoder, gather_beams
from mplug2_jax.model.mplug2 import define_model
from mplug2_jax.parallel.config import MeshConfig
from mplug2_jax.parallel.mesh import make_mesh
from mplug2_jax.parallel.placement import batch_sharding, make_param_shardings

TOKENS = SpecialTokens(end=-1)  # no token ends a beam


class Prefixes(NamedTuple):
    """Search state without a cache: the token prefixes."""

    ids: Int[Array, "br m"]

    def reorder(self, kept: Int[Array, "b r"]) -> "Prefixes":
        """Return the prefixes of the selected sequences."""
        return Prefixes(gather_beams(self.ids, kept))


def uncached(decoder: Decoder, memory: Array, mask: Array, config: SearchConfig, *, copies: bool) -> DecodeOutput:
    """Search by reading every prefix again; with ``copies`` each beam has its own copy of the memory."""
    b = memory.shape[0]
    if copies:
        memory, mask = (jnp.repeat(x, config.num_beams, axis=0) for x in (memory, mask))

    def step(tokens: Array, position: Array, state: Prefixes) -> tuple[Array, Prefixes]:
        ids = jax.lax.dynamic_update_index_in_dim(state.ids, tokens, position, axis=1)
        return decoder(ids, None, memory, mask)[:, position], Prefixes(ids)

    start = Prefixes(jnp.zeros((b * config.num_beams, config.max_length), jnp.int32))
    return beam_search(step, start, b, config, TOKENS)


def median_seconds(run: Callable[[], Any], repeat: int) -> float:
    """Return the median time of a call, after a first call that compiles."""
    jax.block_until_ready(run())
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="large", help="row of the model table (default: %(default)s)")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--videos", "--clips", type=int, default=8, help="videos per batch (default: %(default)s)")
    parser.add_argument("--beams", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=20)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--attention", default="auto", help="kernel (default: %(default)s)")
    parser.add_argument(
        "--devices", type=int, default=1, help="also measure on this many devices (default: %(default)s)"
    )
    args = parser.parse_args()
    if os.environ["JAX_PLATFORMS"] == "cpu":
        jax.config.update("jax_num_cpu_devices", args.devices)
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    config = model_config(args.size, dtype=dtype, attention=args.attention)
    model_def = define_model(config, ("vision", "temporal", "universal", "decoder"))
    search = SearchConfig(num_beams=args.beams, min_length=0, max_length=args.tokens)
    params = jax.jit(model_def.init)(jax.random.key(0))
    frames = jax.random.randint(
        jax.random.key(1), (args.videos, args.frames, config.image_size, config.image_size, 3), 0, 256, jnp.uint8
    )
    encode = jax.jit(lambda p, f: model_def.bind(p).encode_visual(f))
    memory = encode(params, frames)
    mask = jnp.ones(memory.shape[:2], bool)

    def decoding(search_of: Callable[[Decoder, Array, Array], DecodeOutput], devices: int = 1) -> Callable[[], Any]:
        mesh = make_mesh(MeshConfig(), jax.devices()[:devices])
        placed = jax.device_put(params, make_param_shardings(model_def.shapes, model_def.logical_axes, mesh).shardings)
        clips = jax.device_put((memory, mask), batch_sharding(mesh))
        jitted = jax.jit(lambda p, m, k: search_of(model_def.bind(p).decoder, m, k))

        def run() -> Any:
            with jax.set_mesh(mesh):
                return jitted(placed, *clips)

        return run

    variants = {
        "with the cache": lambda d, m, k: generate(d, m, k, search, TOKENS),
        "without, beams share the memory": lambda d, m, k: uncached(d, m, k, search, copies=False),
        "without, a copy per beam (the release)": lambda d, m, k: uncached(d, m, k, search, copies=True),
    }
    device = jax.devices()[0].device_kind
    print(
        f"{args.size}, {dtype}, {args.videos} videos of {args.frames} frames ({memory.shape[1]:,} visual tokens), beam "
        f"{args.beams} x {args.tokens} tokens, on {device}; median of {args.repeat}\n"
    )
    print(f"{'':46}{'seconds':>10}{'videos/s':>10}{'ratio':>8}")
    seconds = median_seconds(lambda: encode(params, frames), args.repeat)
    print(f"{'frames to visual tokens':46}{seconds:10.4f}{args.videos / seconds:10.1f}")
    slowest = 0.0
    rows = {}
    for name, search_of in variants.items():
        rows[name] = median_seconds(decoding(search_of), args.repeat)
        slowest = max(slowest, rows[name])
    if args.devices > 1:
        split = decoding(variants["with the cache"], args.devices)
        rows[f"with the cache, on {args.devices} devices"] = median_seconds(split, args.repeat)
    for name, seconds in rows.items():
        print(f"{name:46}{seconds:10.4f}{args.videos / seconds:10.1f}{slowest / seconds:8.1f}")


if __name__ == "__main__":
    main()
