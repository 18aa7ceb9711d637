"""Save and restore a state on local disk and in a bucket of an emulator on this machine, alternating in one run.

    python benchmarks/checkpoints.py                   # 256 MiB, three times each
    python benchmarks/checkpoints.py --mib 1024

Blocking is the time that the training loop waits at a save; the rest happens while it trains. The emulator and the
client share this machine's processors, so the bucket's rates are a lower bound.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the emulator belongs to the tests

import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines.storage.paths import to_path
from mplug2_jax.cli.common import table
from mplug2_jax.training.checkpoint.checkpoints import Checkpoints
from mplug2_jax.training.checkpoint.metadata import DataPosition
from mplug2_jax.training.config import CheckpointConfig
from tests import emulator

ARRAYS = 16


def measure(folder: Path, mib: int) -> tuple[float, float, float]:
    """Return the seconds that a save blocks, that it takes in all, and that a restore takes."""
    rng = np.random.default_rng(0)
    size = mib * 2**20 // (4 * ARRAYS)
    state = {"params": {f"w{i}": jnp.asarray(rng.standard_normal(size, np.float32)) for i in range(ARRAYS)}}
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    checkpoints = Checkpoints(folder, CheckpointConfig())
    start = time.perf_counter()
    blocking = checkpoints.save(state, DataPosition(1, {}))
    checkpoints.wait_until_finished()
    saved = time.perf_counter() - start
    start = time.perf_counter()
    jax.block_until_ready(checkpoints.restore(shapes)[0])
    restored = time.perf_counter() - start
    checkpoints.close()
    return blocking, saved, restored


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=256, help="size of the state (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="saves and restores of each (default: %(default)s)")
    args = parser.parse_args()
    times: dict[str, list[tuple[float, float, float]]] = {"local disk": [], "bucket": []}
    with emulator.serve() as url, tempfile.TemporaryDirectory() as folder:
        emulator.use(url)
        bucket = emulator.make_bucket(url, "checkpoints")
        for i in range(args.repeats):
            for place, where in (("local disk", f"{folder}/{i}"), ("bucket", f"{bucket}/{i}")):
                times[place].append(measure(to_path(where), args.mib))
    medians = {place: [statistics.median(each) for each in zip(*rows, strict=True)] for place, rows in times.items()}
    medians["bucket / local disk"] = [a / b for a, b in zip(medians["bucket"], medians["local disk"], strict=True)]
    rows = [
        (place, f"{1000 * blocking:.0f} ms", f"{args.mib / saved:.0f} MiB/s", f"{args.mib / restored:.0f} MiB/s")
        for place, (blocking, saved, restored) in list(medians.items())[:2]
    ]
    blocking, saved, restored = medians["bucket / local disk"]
    rows.append(("bucket / local disk", f"{blocking:.2f}x", f"{1 / saved:.2f}x", f"{1 / restored:.2f}x"))
    print(table(rows, ("place", "blocking", "save", "restore"), right=(1, 2, 3)))


if __name__ == "__main__":
    main()
