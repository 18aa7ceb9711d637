"""``mplug2 embed``: features of images, videos or texts into files."""

import argparse
from typing import TYPE_CHECKING, Any

from absl import logging

from mplug2_jax.cli.common import add_checkpoint_options, add_command, restore_run
from mplug2_jax.cli.parsing import output_path
from mplug2_jax.console import Progress
from mplug2_jax.errors import check_range

if TYPE_CHECKING:
    from mplug2_jax.inference.feature_files import FeatureWriter
    from mplug2_jax.inference.features import FeatureExtractor
    from mplug2_jax.model.mplug2 import Params

MAX_LISTED = 20  # skipped records that are logged


def add_parser(subparsers: Any) -> None:
    """Add the command."""
    parser = add_command(
        subparsers, "embed", run, accepts_overrides=True,
        summary="Write features of images, videos or texts to files",
        details="Run it again to resume where it stopped.",
        example="mplug2 embed --workdir runs/demo images --out features --feature contrastive",
    )  # fmt: skip
    add_checkpoint_options(parser)
    parser.add_argument(
        "inputs", nargs="+", metavar="INPUT",
        help="image, video, GIF or .txt, a folder of them, an annotation file (.json, .jsonl, .csv, .tsv), or any "
        "FORMAT:PATH of mplug2 data",
    )  # fmt: skip
    parser.add_argument("--out", type=output_path, required=True, metavar="DIR", help="folder for the features")
    parser.add_argument(
        "--feature", default="contrastive", metavar="NAME",
        help="contrastive: unit vectors; pooled: the mean of all last tokens without padding; or the name of a tap, as "
        "visual/out (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--pool", choices=("none", "mean", "cls"), default="none",
        help="pooling of a tap's tokens: keep all, their mean, or the first (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--format", choices=("safetensors", "npz", "parquet"), default="safetensors", help="(default: %(default)s)"
    )
    parser.add_argument("--batch-size", type=int, help="over all devices (default: 32, rounded up to split over them)")
    parser.add_argument(
        "--kind", choices=("image", "video", "text"), help="kind of the inputs (default: that of the files, or image)"
    )
    parser.add_argument("--text-length", type=int, help="maximum tokens of a text (default: the run's)")
    parser.add_argument(
        "--media", default="", metavar="DIR",
        help="folder of the media that annotations name (default: the annotation file's folder)",
    )  # fmt: skip
    parser.add_argument("--split", default="", help="split of the data, if the files name splits")
    parser.add_argument("--max-records", type=int, help="only the first records of each input")
    parser.add_argument("--size", dest="max_records", type=int, help=argparse.SUPPRESS)  # its old name


def run(args: argparse.Namespace) -> int:
    """Write the shards, and print the path of their index; return 1 if records were skipped."""
    from mplug2_jax.inference.feature_files import INDEX, FeatureWriter
    from mplug2_jax.inference.feature_inputs import find_sources, make_data_config, make_request
    from mplug2_jax.inference.features import FeatureConfig, FeatureExtractor
    from mplug2_jax.parallel.processes import check_same_across_processes, initialize_distributed, is_primary_process

    check_range("--batch-size", args.batch_size, 1)
    initialize_distributed()
    feature = FeatureConfig(name=args.feature, pool=args.pool)
    sources, listing = find_sources(
        args.inputs, args.kind, media=args.media, split=args.split, max_records=args.max_records
    )
    spec, params, step, tokenizer = restore_run(args)
    data = make_data_config(sources, spec, batch_size=args.batch_size, text_length=args.text_length)
    extractor = FeatureExtractor(feature, data, spec.model_def, tokenizer, spec.mesh, seed=spec.config.seed)
    request = make_request(feature, data, extractor, spec, params, step=step, listing=listing)
    writer = FeatureWriter(args.out, request, args.format, len(extractor))
    # All processes read the folder before the primary process writes to it.
    check_same_across_processes({"records with features": writer.done})
    if is_primary_process():
        writer.begin()
    shapes = ", ".join(f"{name} {list(shape)} {dtype}" for name, (shape, dtype) in extractor.shapes.items())
    logging.info("step %d: %s of %s %ss, %s", step, args.feature, f"{len(extractor):,}", data.kind, shapes)
    _write_shards(extractor, writer, params)
    if not is_primary_process():
        return 0
    print(f"{args.out / INDEX}: {sum(shard['ids'] for shard in writer.shards):,} ids in {len(writer.shards):,} shards")
    return _report_skipped(writer)


def _write_shards(extractor: "FeatureExtractor", writer: "FeatureWriter", params: "Params") -> None:
    from mplug2_jax.parallel.processes import is_primary_process
    from mplug2_jax.training.reliability.preemption import PreemptionNotice

    if writer.done:
        logging.info("resuming after %s records", f"{writer.done:,}")
    if writer.done == len(extractor):
        return
    with PreemptionNotice() as notice, Progress(len(extractor), "record", initial=writer.done) as progress:

        def on_batch(index: int) -> None:
            notice.check()
            progress.update(index)

        for shard in extractor.shards(params, writer.done, on_batch):
            if is_primary_process():
                path = writer.write(shard)
                logging.info("%s: %s ids", path, f"{len(shard.ids):,}")


def _report_skipped(writer: "FeatureWriter") -> int:
    """Log the skipped records; return 1 if there are any."""
    skipped = [record for shard in writer.shards for record in shard["skipped"]]
    for record in skipped[:MAX_LISTED]:
        logging.warning("skipped %s: %s", record["key"], record["reason"])
    if len(skipped) > MAX_LISTED:
        logging.warning("skipped %d more: see %s", len(skipped) - MAX_LISTED, writer.path / "index.json")
    return 1 if skipped else 0
