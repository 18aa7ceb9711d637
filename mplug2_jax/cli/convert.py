"""``mplug2 convert``: import and export weights, and compare with the release's golden numbers."""

import argparse
import dataclasses
import json
import time
from typing import Any

from data_pipelines.storage.file_system import write_atomically
from data_pipelines.storage.paths import to_path
from mplug2_jax.cli import weights
from mplug2_jax.cli.common import add_command, add_group, table
from mplug2_jax.cli.parsing import check_output, output_path


def add_parser(subparsers: Any) -> None:
    """Add the command with its sub-commands."""
    subcommands = add_group(
        subparsers, "convert",
        summary="Convert weights from and to PyTorch, and verify them",
        example="mplug2 convert import ViT-L-14.pt bert-large-uncased/ --to runs/start",
    )  # fmt: skip
    weights.add_parsers(subcommands)
    parity = add_command(
        subcommands, "parity", run_parity,
        summary="Compare our model's numbers with the release's golden ones",
        details="Computes every number in the golden folder from the release's weights.",
        example="mplug2 convert parity ../shared/reference/goldens/c1_fc --summary",
    )  # fmt: skip
    parity.add_argument(
        "folder", type=to_path, metavar="DIR", help="golden folder: config.json, weights, inputs, outputs"
    )
    parity.add_argument("--summary", action="store_true", help="one row per group of parameters, and every failure")
    parity.add_argument(
        "--framework", choices=("jax", "torch"), default="jax",
        help="compute with our model or with the PyTorch runtime (default: %(default)s)",
    )  # fmt: skip
    parity.add_argument("--json", type=output_path, metavar="FILE", help="also write all rows to a JSON file")


def run_parity(args: argparse.Namespace) -> int:
    """Print one row per array; return 1 if any differs by more than its tolerance."""
    from mplug2_jax.conversion.parity.comparison import Row
    from mplug2_jax.conversion.parity.jax_runner import run_parity

    check_output("--json", args.json)
    start = time.perf_counter()
    rows: list[Row] = []
    for row in run_parity(args.folder, args.framework):
        rows.append(row)
        if not args.summary:
            print(_line(row), flush=True)
    if args.summary:
        print(table([_cells(row) for row in _merge_groups(rows)], HEADER, right=(3, 4)))
    failed = [row for row in rows if not row.passed]
    if args.json:
        write_atomically(str(args.json), json.dumps([vars(row) for row in rows], indent=1).encode())
    seconds = time.perf_counter() - start
    print(f"\n{args.folder}: {len(rows) - len(failed)} of {len(rows)} rows pass, {len(failed)} fail ({seconds:.0f} s)")
    for row in rows:
        if row.passed and row.note:
            print(f"{row.section}: {row.note}")
    if failed and not args.summary:
        print("\n".join(_line(row) for row in failed))
    return 1 if failed else 0


HEADER = ("model", "array", "shape", "max abs", "max rel", "verdict")


def _cells(row: Any) -> tuple[str, ...]:
    shape = "x".join(map(str, row.shape)) or "-"
    verdict = ("ok" if row.passed else "FAIL") + (f": {row.note}" if row.note else "")
    return row.section, row.name, shape, f"{row.absolute:.1e}", f"{row.relative:.1e}", verdict


def _line(row: Any) -> str:
    section, name, shape, absolute, relative, verdict = _cells(row)
    return f"{section:<30} {name:<72} {shape:>14} {absolute:>9} {relative:>9}  {verdict}"


def _merge_groups(rows: list[Any]) -> list[Any]:
    """Merge the rows of each group of parameters into its worst one; keep rows of single arrays and failures."""
    groups: dict[str, list[Any]] = {}
    out: list[Any] = []
    for row in rows:
        if "." in row.section and row.passed and not row.note and row.name != "losses":
            groups.setdefault(row.section, []).append(row)
        else:
            out.append(row)
    for members in groups.values():
        worst = max(members, key=lambda row: row.relative)
        out.append(dataclasses.replace(worst, name=f"{len(members)} rows, worst: {worst.name}"))
    return out
