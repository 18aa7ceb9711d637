"""``mplug2 convert import | export | verify | inspect | diff``: convert weights, and check them."""

import argparse
import os
from typing import TYPE_CHECKING, Any

from data_pipelines.storage.file_system import write_atomically
from data_pipelines.storage.paths import to_path
from mplug2_jax.cli.common import add_command
from mplug2_jax.cli.parsing import check_output, output_path
from mplug2_jax.errors import UserError, check_range

if TYPE_CHECKING:
    from mplug2_jax.conversion.engines.export_engine import EngineReport
    from mplug2_jax.conversion.report import Report


def add_parsers(subparsers: Any) -> None:
    """Add the sub-commands of ``convert`` that move weights."""
    importer = add_command(
        subparsers, "import", run_import,
        summary="Import weights of the official release, CLIP or BERT into a checkpoint",
        details="Reports what happened to every tensor.",
        example="mplug2 convert import mplug2_msrvtt_qa.pth --to runs/official --tokenizer vocab.txt\n"
        "  mplug2 convert import ViT-L-14.pt bert-large-uncased/ --to runs/start",
    )  # fmt: skip
    importer.add_argument(
        "sources", nargs="+", type=to_path, metavar="SRC",
        help="an official checkpoint; or a CLIP, a BERT, or both: files or folders, safetensors or PyTorch",
    )  # fmt: skip
    importer.add_argument("--to", type=output_path, required=True, metavar="DIR", help="new folder for the checkpoint")
    importer.add_argument(
        "--task", choices=("caption", "videoqa"), help="which official model it is, if it cannot be detected"
    )
    importer.add_argument("--parts", metavar="A,B,...", help="parts of the model (default: all that the sources have)")
    importer.add_argument("--image-size", type=int, metavar="PX", help="resize the position table to this image size")
    importer.add_argument("--tokenizer", type=to_path, metavar="FILE", help="vocab.txt or SentencePiece model to copy")
    importer.add_argument(
        "--seed", type=int, default=0, help="seed for parameters missing from the sources (default: %(default)s)"
    )
    _add_common(importer, "compare JAX and PyTorch tap by tap (needs torch)")

    exporter = add_command(
        subparsers, "export", run_export,
        summary="Export a checkpoint as a complete official state dict, or as programs for other engines",
        details="To a file, or to a folder by Hugging Face's conventions; programs to a folder.",
        example="mplug2 convert export runs/official --to exports/msrvtt_qa\n"
        "  mplug2 convert export runs/official/checkpoints/2000 --to qa.pth --dtype float16",
    )  # fmt: skip
    exporter.add_argument("checkpoint", type=to_path, metavar="CKPT", help="work directory, its checkpoints, or a step")
    exporter.add_argument(
        "--to", type=output_path, required=True, metavar="FILE",
        help="a .safetensors or .pth file, or a new folder: weights, tokenizer, model card, a program for PyTorch",
    )  # fmt: skip
    exporter.add_argument(
        "--format", choices=("torch", "onnx", "stablehlo"), default="torch",
        help="torch: the official state dict; onnx, stablehlo: an encoder and a decode step with a cache, for ONNX "
        "Runtime or JAX without this package (default: %(default)s)",
    )  # fmt: skip
    exporter.add_argument(
        "--frames", type=int, metavar="N",
        help="frames per video, for programs; 1: images (default: as the run reads videos)",
    )  # fmt: skip
    exporter.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    exporter.add_argument(
        "--ema", action=argparse.BooleanOptionalAction,
        help="write the averaged weights as the model's own (default: if the run has config.ema_decay)",
    )  # fmt: skip
    exporter.add_argument(
        "--teacher", action=argparse.BooleanOptionalAction,
        help="also write the averaged copy, which the release's training needs (default: if there is one)",
    )  # fmt: skip
    exporter.add_argument(
        "--leftover", type=to_path, metavar="FILE",
        help="the tensors that the model ignores (default: official-rest.safetensors of the import)",
    )  # fmt: skip
    exporter.add_argument("--rest", dest="leftover", type=to_path, help=argparse.SUPPRESS)  # its old name
    exporter.add_argument("--shard-size", type=float, metavar="GB", help="split above this size (default: 5)")
    exporter.add_argument(
        "--base-model", action="append", metavar="NAME",
        help="a model on the Hugging Face hub that training started from, for the model card; may be repeated",
    )  # fmt: skip
    _add_common(exporter, "compare with JAX: PyTorch tap by tap (needs torch), a program's outputs")

    verifier = add_command(
        subparsers, "verify", run_verify,
        summary="Verify an import or export against its report",
        details="Names the first tensor that changed.",
        example="mplug2 convert verify runs/official/conversion-report.json",
    )  # fmt: skip
    verifier.add_argument("report", type=to_path, metavar="REPORT", help="conversion-report.json, or its folder")

    inspector = add_command(
        subparsers, "inspect", run_inspect,
        summary="Show what a checkpoint holds, as a tree of shapes, dtypes and counts",
        details="Reads no arrays.",
        example="mplug2 convert inspect runs/demo --depth 3",
    )  # fmt: skip
    inspector.add_argument(
        "path", type=to_path, metavar="FILE|DIR", help="official, CLIP, BERT or mplug2_jax checkpoint"
    )
    inspector.add_argument("--depth", type=int, default=3, help="levels of the tree (default: %(default)s)")

    differ = add_command(
        subparsers, "diff", run_diff,
        summary="Compare the weights of two checkpoints, tensor by tensor",
        details="Lists what only one has and, tower by tower, what differs and by how much. The status is 0 if all "
        "tensors are equal, 1 if not.\nOne of our checkpoints is compared with an official one as its export.",
        example="mplug2 convert diff runs/demo exports/demo --out diff.html",
    )  # fmt: skip
    for name in ("a", "b"):
        differ.add_argument(
            name, type=to_path, metavar=name.upper(), help="official, CLIP, BERT or mplug2_jax checkpoint"
        )
    differ.add_argument("--out", type=output_path, metavar="FILE", help="also write an HTML page")
    differ.add_argument("--json", type=output_path, metavar="FILE", help="also write everything that differs as JSON")


def _add_common(parser: argparse.ArgumentParser, verify: str) -> None:
    parser.add_argument("--verify", action="store_true", help=verify)
    parser.add_argument("--overwrite", action="store_true", help="replace what exists")


def _use_cpu() -> None:
    """Run JAX on the CPU: conversions need no accelerator, and should not wait for one."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")


def run_import(args: argparse.Namespace) -> int:
    """Import, and print the report's summary; return 1 if the frameworks differ."""
    _use_cpu()
    from mplug2_jax.conversion.import_plan import plan_import
    from mplug2_jax.conversion.import_weights import run_import
    from mplug2_jax.recipes.released import released_run

    parts = args.parts.split(",") if args.parts else None
    plan = plan_import(args.sources, parts=parts, task=args.task, image_size=args.image_size)
    report = run_import(
        plan, args.to, make_recipe=lambda model, task: released_run(model, task, f"released_{task}"),
        tokenizer=args.tokenizer, seed=args.seed, overwrite=args.overwrite, verify=args.verify,
    )  # fmt: skip
    print(report.summary())
    print(f"{args.to}: model with {', '.join(plan.model_def.parts)}; {plan.model_def.num_params():,} parameters")
    return report.status


def run_export(args: argparse.Namespace) -> int:
    """Export, and print the report's summary; return 1 if the frameworks differ."""
    _use_cpu()
    torch_only = {
        "--teacher": args.teacher, "--leftover": args.leftover, "--shard-size": args.shard_size,
        "--base-model": args.base_model,
    }  # fmt: skip
    unsupported = {"--frames": args.frames} if args.format == "torch" else torch_only
    if invalid_option := next((option for option, value in unsupported.items() if value is not None), None):
        raise UserError(f"{invalid_option} does not fit --format {args.format}; remove one of them")
    report = _export_state(args) if args.format == "torch" else _export_programs(args)
    print(report.summary())
    print(args.to)
    return report.status


def _export_state(args: argparse.Namespace) -> "Report":
    from mplug2_jax.conversion.export_weights import export

    shard_size = 5.0 if args.shard_size is None else args.shard_size
    check_range("--shard-size", shard_size, 1e-6)
    return export(
        args.checkpoint, args.to, dtype=args.dtype, ema=args.ema, teacher=args.teacher, leftover=args.leftover,
        shard_bytes=int(shard_size * 1e9), overwrite=args.overwrite, verify=args.verify,
        base_models=args.base_model or (),
    )  # fmt: skip


def _export_programs(args: argparse.Namespace) -> "EngineReport":
    from mplug2_jax.conversion.engines.export_engine import export_engine

    return export_engine(
        args.checkpoint, args.to, args.format, dtype=args.dtype, ema=args.ema, frames=args.frames,
        overwrite=args.overwrite, verify=args.verify,
    )  # fmt: skip


def run_verify(args: argparse.Namespace) -> int:
    """Verify every tensor; return 1 at the first that changed."""
    _use_cpu()
    from mplug2_jax.conversion.verify_weights import verify_output

    count = 0
    for name, is_equal in verify_output(args.report):
        if not is_equal:
            print(f"{args.report}: {name} has changed; the {count:,} tensors before it are unchanged")
            return 1
        count += 1
    print(f"{args.report}: all {count:,} tensors are unchanged")
    return 0


def run_inspect(args: argparse.Namespace) -> int:
    """Print the tree."""
    _use_cpu()
    from mplug2_jax.conversion.inspect_weights import read_contents, tree_lines

    check_range("--depth", args.depth, 1)
    if not args.path.exists():
        raise UserError(f"{args.path} does not exist; expected a checkpoint")
    for line in tree_lines(read_contents(args.path), args.depth):
        print(line)
    return 0


def run_diff(args: argparse.Namespace) -> int:
    """Print what differs; return 1 if anything does."""
    _use_cpu()
    from mplug2_jax.conversion.diff_weights import diff_checkpoints

    check_output("--out", args.out)
    check_output("--json", args.json)
    diff = diff_checkpoints(args.a, args.b)
    print(diff.summary())
    if args.out:
        write_atomically(str(args.out), diff.to_html().encode())
    if args.json:
        write_atomically(str(args.json), diff.to_json().encode())
    return diff.status
