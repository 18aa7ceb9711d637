"""Count the FLOPs that the key-value cache saves in beam search, by XLA's cost analysis of lowered programs.

    python benchmarks/generation.py                # large, beam 5, 20 tokens, 16 frames: 4,097 visual tokens
    python benchmarks/generation.py --size base --frames 4

Without a cache every step runs the decoder over the whole prefix of every beam. The release also gives each beam its
own copy of the memory and projects keys and values again in every step. In the middle row beams share the memory.
"""

import argparse
import os
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp

from mplug2_jax.generation.config import SearchConfig
from mplug2_jax.generation.decode import generate
from mplug2_jax.model.config import SpecialTokens, model_config
from mplug2_jax.model.mplug2 import define_model


def count_flops(fn: Any, *args: Any) -> float:
    """Return XLA's FLOP count of a program; a loop of unknown length counts once."""
    cost = jax.jit(fn).lower(*args).cost_analysis()
    return float(cost["flops"])


def main() -> None:
    """Count and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="large", help="row of the model table (default: %(default)s)")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--beams", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=20, help="tokens generated (default: %(default)s)")
    args = parser.parse_args()

    config = model_config(args.size, dtype="float32", attention="xla", scan_unroll=64)
    model_def = define_model(config, ("vision", "temporal", "universal", "decoder"))
    search = SearchConfig(num_beams=args.beams, max_length=args.tokens)
    length = config.num_visual_tokens(args.frames)

    def memory(rows: int) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        return (
            jax.ShapeDtypeStruct((rows, length, config.width), jnp.float32),
            jax.ShapeDtypeStruct((rows, length), jnp.bool_),
        )

    def decoder(params: Any) -> Any:
        return model_def.bind(params).decoder

    start = count_flops(
        lambda p, m, k: decoder(p).init_cache(m, k, num_sequences=args.beams, length=args.tokens),
        model_def.shapes,
        *memory(1),
    )
    once = count_flops(
        lambda p, m, k: generate(decoder(p), m, k, search, SpecialTokens()), model_def.shapes, *memory(1)
    )
    cached = start + (once - start) * args.tokens  # the loop's body is the same program for every token

    def uncached(rows: int) -> float:
        total = 0.0
        for prefix in range(1, args.tokens + 1):
            ids = jax.ShapeDtypeStruct((args.beams, prefix), jnp.int32)
            total += count_flops(lambda p, i, m, k: decoder(p)(i, None, m, k), model_def.shapes, ids, *memory(rows))
        return total

    print(
        f"{args.size} decoder, beam {args.beams} x {args.tokens} tokens over {length:,} visual tokens, FLOPs by XLA:\n"
    )
    rows = (
        ("with cache", cached),
        ("without cache, beams share the memory", uncached(1)),
        ("without cache, a copy per beam (the release)", uncached(args.beams)),
    )
    for name, flops in rows:
        print(f"{name:<50} {flops / 1e9:12,.1f} GFLOP   1/{flops / cached:.1f}")


if __name__ == "__main__":
    main()
