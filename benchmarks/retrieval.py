"""Measure exact ranks and nearest neighbors among many images and texts: time, and memory beyond the features.

    python benchmarks/retrieval.py                 # 50,000 texts x 50,000 images x 256, both directions
    python benchmarks/retrieval.py --examples 5000

The similarity matrix is never materialized; its size is printed for comparison.
"""

import argparse
import resource
import time

import numpy as np

from mplug2_jax.metrics.exact_topk import exact_top_k
from mplug2_jax.metrics.metric import bootstrap_ci
from mplug2_jax.metrics.retrieval import chance_median_rank, chance_recall, median_rank, recall_at


def main() -> None:
    """Search and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--examples", type=int, default=50_000, help="number of images and of texts (default: %(default)s)"
    )
    parser.add_argument("--width", type=int, default=256, help="feature width (default: %(default)s)")
    parser.add_argument("--nearest", type=int, default=16, help="neighbors per query (default: %(default)s)")
    args = parser.parse_args()

    rng = np.random.default_rng(0)
    visual = l2_normalize(rng.normal(size=(args.examples, args.width)).astype(np.float32))
    text = l2_normalize(visual + 6 * l2_normalize(rng.normal(size=visual.shape).astype(np.float32)))
    ids = np.arange(args.examples)
    exact_top_k(text[:2], visual[:2], ids[:2], ids[:2])  # the memory of the libraries does not count
    baseline = peak_memory()
    full = args.examples**2 * 4 / 2**30
    print(f"{args.examples:,} x {args.examples:,} x {args.width}: a full matrix takes {full:.1f} GiB")
    for name, queries, candidates in (("text to visual", text, visual), ("visual to text", visual, text)):
        start = time.perf_counter()
        found = exact_top_k(queries, candidates, ids, ids, args.nearest)
        figures = {"R@1": recall_at(found.ranks, 1), "R@10": recall_at(found.ranks, 10)}
        middle = median_rank(found.ranks)
        shown = "  ".join(f"{figure} {ratio.value:.4f}" for figure, ratio in figures.items())
        print(f"{name}: {time.perf_counter() - start:7.1f} s  {shown}  median rank {middle.value:.0f}", flush=True)
        start = time.perf_counter()
        chance = f"R@10 {chance_recall(ids, ids, 10):.4f}, median rank {chance_median_rank(ids, ids):.0f}"
        print(f"  chance: {chance}, {time.perf_counter() - start:.2f} s")
        start = time.perf_counter()
        low, high = bootstrap_ci(figures | {"median": middle})["median"]
        print(f"  95% CI of the median rank: {low:.0f} to {high:.0f}, {time.perf_counter() - start:.1f} s")
    print(f"peak memory beyond features and libraries: {peak_memory() - baseline:.2f} GiB")


def l2_normalize(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def peak_memory() -> float:
    """Return the peak memory of this process in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    main()
