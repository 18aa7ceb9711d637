"""``mplug2 convert import | export | verify | inspect``: weights in, weights out, and the proof of both."""

import argparse
import os
from pathlib import Path
from typing import Any

from mplug2_jax.cli.common import add_command
from mplug2_jax.errors import UserError, check_range


def add_parsers(kinds: Any) -> None:
    """Adds the sub-commands of ``convert`` that move weights."""
    incoming = add_command(
        kinds, "import", run_import,
        summary="Import weights of the official release, CLIP or BERT into a checkpoint",
        details="Every tensor is accounted for.",
        example="mplug2 convert import mplug2_msrvtt_qa.pth --to runs/official --tokenizer vocab.txt\n"
        "  mplug2 convert import ViT-L-14.pt bert-large-uncased/ --to runs/start",
    )  # fmt: skip
    incoming.add_argument(
        "sources", nargs="+", type=Path, metavar="SRC",
        help="an official checkpoint; or a CLIP, a BERT, or both: files or folders, safetensors or PyTorch",
    )  # fmt: skip
    incoming.add_argument("--to", type=Path, required=True, metavar="DIR", help="new folder for the checkpoint")
    incoming.add_argument("--task", choices=("caption", "videoqa"), help="which of the release's models, if not told")
    incoming.add_argument("--parts", metavar="A,B,...", help="parts of the model (default: what the sources start)")
    incoming.add_argument("--image-size", type=int, metavar="PX", help="resize the position table to this image size")
    incoming.add_argument("--tokenizer", type=Path, metavar="FILE", help="vocab.txt or SentencePiece model to keep")
    incoming.add_argument("--seed", type=int, default=0, help="of what no source fills (default: %(default)s)")
    _add_common(incoming)

    outgoing = add_command(
        kinds, "export", run_export,
        summary="Export a checkpoint as a complete official state dict",
        details="To a file, or to a folder by Hugging Face's conventions.",
        example="mplug2 convert export runs/official --to exports/msrvtt_qa\n"
        "  mplug2 convert export runs/official/checkpoints/2000 --to qa.pth --dtype float16",
    )  # fmt: skip
    outgoing.add_argument("checkpoint", type=Path, metavar="CKPT", help="work directory, its checkpoints, or a step")
    outgoing.add_argument(
        "--to", type=Path, required=True, metavar="FILE",
        help="a .safetensors or .pth file, or a new folder: weights, config.json, tokeniser and a model card",
    )  # fmt: skip
    outgoing.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    outgoing.add_argument(
        "--ema", action=argparse.BooleanOptionalAction,
        help="write the averaged weights as the model's own (default: where the run has config.ema_decay)",
    )  # fmt: skip
    outgoing.add_argument(
        "--teacher", action=argparse.BooleanOptionalAction,
        help="write the averaged copy too, which the release's training wants (default: where there is one)",
    )  # fmt: skip
    outgoing.add_argument("--rest", type=Path, metavar="FILE", help="tensors that an import kept (default: found)")
    outgoing.add_argument(
        "--shard-size", type=float, default=5.0, metavar="GB", help="split above this size (default: 5)"
    )
    _add_common(outgoing)

    check = add_command(
        kinds, "verify", run_verify,
        summary="Check an import or export against its report",
        details="Names the first tensor that changed.",
        example="mplug2 convert verify runs/official/conversion-report.json",
    )  # fmt: skip
    check.add_argument("report", type=Path, metavar="REPORT", help="conversion-report.json, or the folder it is in")

    look = add_command(
        kinds, "inspect", run_inspect,
        summary="Show what a checkpoint holds, as a tree of shapes, types and counts",
        details="No array is read.",
        example="mplug2 convert inspect runs/demo --depth 3",
    )  # fmt: skip
    look.add_argument("path", type=Path, metavar="FILE|DIR", help="official, CLIP, BERT or our own")
    look.add_argument("--depth", type=int, default=3, help="levels of the tree (default: %(default)s)")


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--verify", action="store_true", help="compare both frameworks tap by tap (needs torch)")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")


def _on_host() -> None:
    """Conversions need no accelerator, and should not wait for one."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")


def run_import(args: argparse.Namespace) -> int:
    """Imports, and prints what became of the tensors; 1 if the frameworks differ."""
    _on_host()
    from mplug2_jax.conversion.import_plan import plan_import
    from mplug2_jax.conversion.import_weights import run_import

    parts = args.parts.split(",") if args.parts else None
    plan = plan_import(args.sources, parts=parts, task=args.task, image_size=args.image_size)
    report = run_import(
        plan, args.to, tokenizer=args.tokenizer, seed=args.seed, overwrite=args.overwrite, verify=args.verify
    )
    print(report.summary())
    print(f"{args.to}: a model of {', '.join(plan.definition.parts)}, {plan.definition.num_params():,} parameters")
    return report.status


def run_export(args: argparse.Namespace) -> int:
    """Exports, and prints what became of the tensors; 1 if the frameworks differ."""
    _on_host()
    from mplug2_jax.conversion.export_weights import export

    check_range("--shard-size", args.shard_size, 1e-6)
    report = export(
        args.checkpoint, args.to, dtype=args.dtype, ema=args.ema, teacher=args.teacher, rest=args.rest,
        shard_bytes=int(args.shard_size * 1e9), overwrite=args.overwrite, verify=args.verify,
    )  # fmt: skip
    print(report.summary())
    print(args.to)
    return report.status


def run_verify(args: argparse.Namespace) -> int:
    """Checks every tensor; 1 at the first that changed."""
    _on_host()
    from mplug2_jax.conversion.verify_weights import check_report

    count = 0
    for name, same in check_report(args.report):
        count += 1
        if not same:
            print(f"{args.report}: {name} has changed since; {count - 1:,} tensors before it are as they were")
            return 1
    print(f"{args.report}: all {count:,} tensors are as they were")
    return 0


def run_inspect(args: argparse.Namespace) -> int:
    """Prints the tree."""
    _on_host()
    from mplug2_jax.conversion.inspect_weights import contents_of, tree_lines

    check_range("--depth", args.depth, 1)
    if not args.path.exists():
        raise UserError(f"{args.path} does not exist; expected a checkpoint")
    for line in tree_lines(contents_of(args.path), args.depth):
        print(line)
    return 0
