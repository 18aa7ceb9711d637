"""The data room's speed, as ratios measured in one run: whatever the machine does today, it does to both sides.

    python benchmarks/data.py
    python benchmarks/data.py --pictures 64 --clips 4 --index 100000      # quick

Columns: our pipeline as a share of a bare loop of the same decoder and resize calls on one core; two threads against
one; the share of a training run's time that waits for data; start-up over a large index, and at a far step; and the
same work by a PyTorch DataLoader and by webdataset, where they are installed.
"""

import argparse
import io
import json
import multiprocessing
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import av
import numpy as np
from PIL import Image

from data_pipelines.config import DataConfig, ExampleConfig, SourceConfig, VisualConfig
from data_pipelines.frames import uniform_indices
from data_pipelines.loader import Stream
from data_pipelines.media import write_video
from data_pipelines.sources import tar_index
from data_pipelines.tokenizers import SPECIAL_TOKENS, WordPieceTokenizer
from data_pipelines.transforms import random_resized_crop

SIZE, BATCH = 224, 16
TOKENIZER = WordPieceTokenizer([*SPECIAL_TOKENS, "a", "picture"])
ROWS: list[tuple[str, str]] = []


def row(what: str, figure: str) -> None:
    """Prints a line of the table as soon as it is known."""
    ROWS.append((what, figure))
    print(f"{what:<66} {figure}", flush=True)


def smooth_noise(rng: np.random.Generator, count: int, height: int, width: int) -> np.ndarray:
    """Frames with structure at all scales, which code about as large as photographs do."""
    coarse = [Image.fromarray(rng.integers(0, 256, (h, h * 4 // 3, 3), np.uint8)) for h in (6, 48)]
    layers = [np.asarray(image.resize((width, height), Image.Resampling.BICUBIC), np.float32) for image in coarse]
    grain = rng.normal(0, 8, (height, width, 3))
    still = 0.6 * layers[0] + 0.3 * layers[1] + grain
    return np.stack([np.roll(still, 2 * t, axis=1) for t in range(count)]).clip(0, 255).astype(np.uint8)


def write_pictures(folder: Path, count: int) -> Path:
    """A tar of JPEGs of 640 x 480 (COCO's size), each eight times, and the same JPEGs as files."""
    rng = np.random.default_rng(0)
    (folder / "pictures").mkdir()
    path = folder / "pictures.tar"
    with tarfile.open(path, "w") as tar:
        for i in range(count):
            file = folder / "pictures" / f"{i:05}.jpg"
            Image.fromarray(smooth_noise(rng, 1, 480, 640)[0]).save(file, quality=90)
            for copy in range(8):  # an order of few records is slow to work out, and no data set is that small
                tar.add(file, f"{i:05}-{copy}.jpg")
                info = tarfile.TarInfo(f"{i:05}-{copy}.txt")
                info.size = 9
                tar.addfile(info, io.BytesIO(b"a picture"))
    return path


def write_clips(folder: Path, count: int) -> Path:
    """A tar of H.264 clips of 300 frames of 320 x 240, and the same clips as files."""
    rng = np.random.default_rng(1)
    (folder / "clips").mkdir()
    path = folder / "clips.tar"
    with tarfile.open(path, "w") as tar:
        for i in range(count):
            file = folder / "clips" / f"{i:05}.mp4"
            write_video(file, smooth_noise(rng, 300, 240, 320), fps=30)
            for copy in range(8):
                tar.add(file, f"{i:05}-{copy}.mp4")
    return path


def stream(path: Path, kind: str, threads: int, batch: int, **visual: Any) -> Stream:
    """Decode, random resized crop, batch."""
    source = SourceConfig(format="webdataset", path=str(path), kind=kind)
    config = DataConfig(
        sources={"tar": source},
        visual=VisualConfig(image_size=SIZE, transform="train", flip=False, num_ops=0, **visual),
        examples=ExampleConfig(), batch_size=batch, num_threads=threads, prefetch=2 * batch * threads,
    )  # fmt: skip
    return Stream(config, TOKENIZER, name="benchmark", seed=0)


def rate(batches: Iterator[Any], count: int, batch: int) -> float:
    """Examples per second over ``count`` examples, the start left out."""
    next(batches)
    start = time.perf_counter()
    for _ in range(max(1, count // batch)):
        next(batches)
    return max(1, count // batch) * batch / (time.perf_counter() - start)


def read_jpeg(file: Path) -> list[Image.Image]:
    """A picture by Pillow."""
    with Image.open(io.BytesIO(file.read_bytes())) as image:
        image.load()
        return [image]


def read_16_frames(file: Path) -> list[Image.Image]:
    """The frames that the pipeline takes, by PyAV: all are decoded, and those taken become RGB."""
    with av.open(str(file)) as container:
        wanted = set(uniform_indices(300, 16).tolist())
        frames = (frame for i, frame in enumerate(container.decode(video=0)) if i in wanted)
        return [Image.fromarray(frame.to_ndarray(format="rgb24")) for frame in frames]


def bare(files: Iterable[Path], read: Callable[[Path], list[Image.Image]]) -> float:
    """Examples per second of the decoder and of one resize per frame, and nothing else."""
    rng, count, start = np.random.default_rng(0), 0, time.perf_counter()
    for file in files:
        frames = read(file)
        width, height = frames[0].size
        window = random_resized_crop(height, width, SIZE, rng, min_area=0.5)  # as large as the pipeline's
        box = (window.left, window.top, window.left + window.width, window.top + window.height)
        for frame in frames:
            np.asarray(frame.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box))
        count += 1
    return count / (time.perf_counter() - start)


def pipeline(
    name: str,
    tar: Path,
    files: list[Path],
    read: Callable[[Path], list[Image.Image]],
    kind: str,
    batch: int,
    repeats: int,
) -> None:
    """Share of the bare loop, and scaling; medians of turns, so that both sides see the same machine."""
    visual: dict[str, Any] = {"num_frames": 16} if kind == "video" else {}
    alone = stream(tar, kind, 0, batch, **visual).batches()  # no thread but this one
    next(alone)
    shares, scales, machine = [], [], []
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as processes:
        list(processes.map(bare, [files[:1]] * 2, [read] * 2))  # started and imported
        for _ in range(repeats):
            for part in range(0, len(files), batch):  # short turns, so that both see the same machine
                loop = bare(files[part : part + batch], read)
                start = time.perf_counter()
                next(alone)
                shares.append(batch / (time.perf_counter() - start) / loop)
            one, two = (
                rate(stream(tar, kind, threads, batch, **visual).batches(), 2 * len(files), batch) for threads in (1, 2)
            )
            scales.append(two / one)
            machine.append(sum(processes.map(bare, [files] * 2, [read] * 2)) / bare(files, read))
    row(f"{name}: share of the bare loop on one core", f"{np.median(shares):.0%} ({loop:.1f} examples/s bare)")
    row(f"{name}: two threads against one", f"{np.median(scales):.2f}x")
    row("    two processes with the bare loop against one, at the same time", f"{np.median(machine):.2f}x")


def waiting(folder: Path, tar: Path, steps: int) -> None:
    """The share of a real run's time that is spent waiting for data."""
    from mplug2_jax.config import as_recipe, build, load_recipe
    from mplug2_jax.training.config import RunConfig
    from mplug2_jax.training.loop import train
    from mplug2_jax.training.telemetry.metric_log import read_train_metrics

    words = (f"steps={steps}", "log_every=5", "model.vision_layers=12")
    recipe = load_recipe("demo", [f"--config.{word}" for word in words])
    data = DataConfig(
        sources={"tar": SourceConfig(format="webdataset", path=str(tar))}, visual=VisualConfig(image_size=32),
        examples=ExampleConfig(text_length=8), batch_size=BATCH,
    )  # fmt: skip
    for name in set(recipe.streams) - {"image_text"}:
        del recipe.streams[name]
    recipe.streams.image_text.data = as_recipe(data)
    recipe.streams.image_text.objectives = {"vlc": 1.0, "vlm": 1.0}
    recipe.evaluations = {}
    config = build(RunConfig, recipe)
    made = stream_seconds(config.streams["image_text"].data, BATCH)
    train(config, folder / "run")
    lines = [line for line in read_train_metrics(folder / "run" / "metrics.jsonl") if line["step"] > 5]
    step, wait = (float(np.median([line[key] for line in lines])) for key in ("seconds_per_step", "data_wait"))
    row(f"training, {step:.2f} s a step, {made:.2f} s to make a batch: waiting for data", f"{wait:.2%}")


def stream_seconds(data: DataConfig, batch: int) -> float:
    """Seconds to make a batch."""
    from mplug2_jax.training.config import TokenizerConfig
    from mplug2_jax.training.workdir import load_or_train_tokenizer

    batches = Stream(data, load_or_train_tokenizer(TokenizerConfig()), name="image_text", seed=0).batches()
    return batch / rate(batches, 8 * batch, batch)


def write_index(folder: Path, samples: int, per_tar: int = 10_000) -> Path:
    """Tars that are holes but for one text, with an index that says it is in every sample: nothing else is on disk."""
    (folder / "index").mkdir()
    text = b"a picture"
    for shard in range(-(-samples // per_tar)):
        tar = folder / "index" / f"{shard:05}.tar"
        with tar.open("wb") as file:
            file.seek(512)
            file.write(text)
            file.truncate(per_tar * 20_000)
        count = min(per_tar, samples - shard * per_tar)
        keys = "".join(f"{i:09}" for i in range(shard * per_tar, shard * per_tar + count)).encode()
        spans = np.broadcast_to(np.array([[[512, len(text)]]], np.int64), (count, 1, 2))
        packed = tar_index.pack_index(
            np.frombuffer(keys, np.uint8), np.arange(1, count + 1, dtype=np.int64) * 9, spans, [".txt"],
            tar_index.file_signature(str(tar)),
        )  # fmt: skip
        Path(f"{tar}{tar_index.SUFFIX}").write_bytes(packed)
    return folder / "index"


def open_index(folder: Path) -> None:
    """Opens a large index in a process of its own, and reads a batch at the beginning and one far away."""
    before = memory("VmRSS")
    start = time.perf_counter()
    source = SourceConfig(format="webdataset", path=str(folder), kind="text")
    config = DataConfig(sources={"tar": source}, examples=ExampleConfig(text="sentence", text_length=8), batch_size=256)
    opened = Stream(config, TOKENIZER, name="benchmark", seed=0)
    seconds = {"open": time.perf_counter() - start}
    for name, step in (("first", 0), ("far", 1_000_000)):
        start = time.perf_counter()
        next(opened.batches(step))
        seconds[name] = time.perf_counter() - start
    records, peak = sum(opened.records.values()), memory("VmHWM")
    print(json.dumps({**seconds, "records": records, "peak": peak, "grown": peak - before}))


def memory(field: str) -> float:
    """This process's memory in GiB, as Linux counts it."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
    return int(line.split()[1]) / 2**20


def index(folder: Path, samples: int) -> None:
    """Start-up over many samples, and at a far step."""
    path = write_index(folder, samples)
    words = [sys.executable, __file__, "--open-index", str(path)]
    done = subprocess.run(
        words, capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    )
    found = json.loads(done.stdout.splitlines()[-1])
    row(f"index of {found['records']:,} records: opened in", f"{found['open']:.2f} s")
    row("    memory: peak of the process, and grown by", f"{found['peak']:.2f} GiB, {found['grown']:.2f} GiB")
    row("    first batch of 256 at step 0, and at step 1,000,000", f"{found['first']:.2f} s, {found['far']:.2f} s")


def decode(data: bytes, rng: np.random.Generator) -> np.ndarray:
    """The same work, as a user of the other two would write it."""
    with Image.open(io.BytesIO(data)) as image:
        window = random_resized_crop(image.height, image.width, SIZE, rng, min_area=0.5)
        box = (window.left, window.top, window.left + window.width, window.top + window.height)
        picture = image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC, box)
    return np.array(picture)


class Files:
    """A map-style data set of PyTorch."""

    def __init__(self, files: list[Path], repeats: int) -> None:
        self._files, self._repeats = files, repeats

    def __len__(self) -> int:
        return len(self._files) * self._repeats

    def __getitem__(self, index: int) -> np.ndarray:
        return decode(self._files[index % len(self._files)].read_bytes(), np.random.default_rng(index))


def decode_sample(sample: dict[str, Any]) -> np.ndarray:
    """A sample of webdataset as pixels."""
    return decode(sample["jpg"], np.random.default_rng(0))


def others(tar: Path, files: list[Path]) -> None:
    """JPEGs by three loaders with two workers each."""
    ours = rate(stream(tar, "image", 2, BATCH).batches(), 2 * len(files), BATCH)
    try:
        import torch.utils.data
    except ImportError:
        row("PyTorch DataLoader, two workers", "torch is not installed")
        return
    loader = torch.utils.data.DataLoader(Files(files, 4), BATCH, num_workers=2, drop_last=True)
    theirs = rate(iter(loader), 2 * len(files), BATCH)
    row("JPEGs, two workers: ours against a PyTorch DataLoader", f"{ours / theirs:.2f}x ({ours:.0f}, {theirs:.0f}/s)")
    try:
        import webdataset
    except ImportError:
        row("webdataset, two workers", "webdataset is not installed")
        return
    samples = webdataset.WebDataset([str(tar)] * 8, shardshuffle=False).map(decode_sample)
    theirs = rate(iter(torch.utils.data.DataLoader(samples, BATCH, num_workers=2)), 2 * len(files), BATCH)
    row("JPEGs, two workers: ours against webdataset", f"{ours / theirs:.2f}x ({ours:.0f}, {theirs:.0f}/s)")


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=384, help="JPEGs (default: %(default)s)")
    parser.add_argument("--clips", type=int, default=12, help="videos (default: %(default)s)")
    parser.add_argument("--index", type=int, default=10_000_000, help="records of the index (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=30, help="of the training run (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each measurement (default: %(default)s)")
    parser.add_argument("--open-index", type=Path, help=argparse.SUPPRESS)  # the process that opens the large index
    args = parser.parse_args()
    if args.open_index:
        open_index(args.open_index)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pictures, clips = write_pictures(folder, args.pictures), write_clips(folder, args.clips)
        files = [sorted((folder / each).iterdir()) for each in ("pictures", "clips")]
        pipeline("JPEG of 640 x 480, crop, 224", pictures, files[0], read_jpeg, "image", BATCH, args.repeats)
        pipeline("video, 16 of 300 frames, 224", clips, files[1], read_16_frames, "video", 2, args.repeats)
        others(pictures, files[0])
        index(folder, args.index)
        waiting(folder, pictures, args.steps)
    print("\n" + "\n".join(f"{what:<66} {figure}" for what, figure in ROWS))


if __name__ == "__main__":
    main()
