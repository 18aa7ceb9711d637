"""Benchmark import and export of a whole official checkpoint: memory, speed relative to a file copy, and round trip.

    python benchmarks/conversion.py                          # videoqa large with its teacher: 3.05 G elements, 12.2 GB
    python benchmarks/conversion.py --size base --no-teacher

The weights are random. Every stage runs in its own process, to measure its peak resident memory; the limit is 1.5 GB
above the largest group of arrays that share tensors. Needs three times the file's size on the disk of ``--folder``.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np

from mplug2_jax.conversion.export_weights import group_arrays
from mplug2_jax.conversion.files.open import open_source
from mplug2_jax.conversion.files.safetensors_writer import SafetensorsWriter
from mplug2_jax.conversion.layouts.official import QUESTION_PARTS, default_fusion_start, map_official_names
from mplug2_jax.conversion.layouts.official_config import to_config_json
from mplug2_jax.conversion.layouts.official_state import init_tensor, official_state, tied_to
from mplug2_jax.conversion.layouts.tensor_mapping import get_leaf
from mplug2_jax.model.config import model_config
from mplug2_jax.model.mplug2 import define_model

GB = 1e9


def write_checkpoint(folder: Path, size: str, teacher: bool) -> None:
    """Write a checkpoint of random weights in the official layout, with its settings."""
    config = model_config(size)
    start = default_fusion_start(config)
    state = official_state(config, start, teacher=teacher)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(to_config_json(config, start, task="videoqa", teacher=teacher)))
    writer = SafetensorsWriter(folder / "model.safetensors", state)
    ties = {tied_to(name): name for name in state}
    for seed, (name, info) in enumerate(state.items()):
        if name.endswith(".position_ids"):
            writer.write(name, init_tensor(name, info))
        elif tied_to(name) is None:
            value = np.random.default_rng(seed).standard_normal(info.shape, np.float32)
            writer.write(name, value)
            if name in ties:
                writer.write(ties[name], value)
    writer.close()


def largest_group(size: str, teacher: bool) -> int:
    """Return the bytes of the largest group of arrays that must be in memory together."""
    config = model_config(size)
    model_def = define_model(config, QUESTION_PARTS)
    name_mapping = map_official_names(config, QUESTION_PARTS, default_fusion_start(config), teacher=teacher)
    trees = {"params": model_def.shapes, "teacher": model_def.shapes}
    return max(
        sum(4 * get_leaf(trees, path).size for path in paths) for paths, _ in group_arrays(name_mapping.mappings)
    )


def measure(*command: str) -> tuple[float, float]:
    """Run a command; return its seconds, and its peak resident memory in bytes."""
    start = time.perf_counter()
    code = "import resource, runpy, sys\nsys.argv = sys.argv[1:]\n"
    code += "try: runpy.run_module(sys.argv[0], run_name='__main__')\n"
    code += "finally: print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code, *command], stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    peak = next(int(line.split()[1]) for line in done.stderr.splitlines() if line.startswith("peak "))
    return time.perf_counter() - start, peak * 1024.0


def check_equal(one: Path, other: Path) -> int:
    """Check that all tensors of two checkpoints are byte-identical, and return their number."""
    a, b = open_source(one), open_source(other)
    assert set(a.names()) == set(b.names())
    differing = [n for n in a.names() if a.info(n) != b.info(n) or a.read(n).tobytes() != b.read(n).tobytes()]
    assert not differing, differing[:4]
    return len(a.names())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="large", help="row of the model table (default: %(default)s)")
    parser.add_argument("--teacher", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/benchmark-conversion"), help="new; removed at the end"
    )
    args = parser.parse_args()
    if args.folder.exists():
        sys.exit(f"{args.folder} exists; choose a new folder")
    source, imported, exported = (args.folder / name for name in ("source", "imported", "exported"))
    try:
        write_checkpoint(source, args.size, args.teacher)
        file = source / "model.safetensors"
        size = file.stat().st_size
        start = time.perf_counter()
        shutil.copyfile(file, args.folder / "copy")
        copy_seconds = time.perf_counter() - start
        (args.folder / "copy").unlink()
        cli = "mplug2_jax.cli.main"
        stages = {"import": measure(cli, "convert", "import", str(source), "--to", str(imported))}
        stages["export"] = measure(
            cli, "convert", "export", str(imported), "--to", str(exported), "--shard-size", "1000"
        )
        tensors = check_equal(source, exported)
    finally:
        shutil.rmtree(args.folder, ignore_errors=True)

    group = largest_group(args.size, args.teacher)
    print(
        f"\nvideoqa {args.size}{', with its teacher' if args.teacher else ''}: {size / GB:.2f} GB, {tensors:,} tensors,"
    )
    print("official -> ours -> official: all tensors are byte-identical")
    print(f"\n{'':<8} {'seconds':>8} {'MB/s':>7} {'of a copy':>10} {'peak GB':>8} {'above largest group':>24}")
    print(f"{'copy':<8} {copy_seconds:>8.1f} {size / copy_seconds / 1e6:>7,.0f} {1:>10.0%}")
    for name, (seconds, peak) in stages.items():
        above = (peak - group) / GB
        print(
            f"{name:<8} {seconds:>8.1f} {size / seconds / 1e6:>7,.0f} {copy_seconds / seconds:>10.0%} "
            f"{peak / GB:>8.2f} {above:>21.2f} GB"
        )
    own_peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GB
    print(f"\nlargest group {group / GB:.2f} GB (limit: 1.5 GB above it); seconds include the start of the processes;")
    print(f"peak of this process, which wrote and compared the files: {own_peak:.2f} GB")


if __name__ == "__main__":
    main()
