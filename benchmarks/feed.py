"""Throughput of the data pipeline, as ratios measured in one run, so that the machine's load affects both sides.

    python benchmarks/data.py
    python benchmarks/data.py --images 64 --videos 4      # quick

Rows: the pipeline relative to a minimal loop of the same decode and resize calls on one core; two threads relative to
one; the fraction of a training run that waits for data; and the same work by a PyTorch DataLoader and by webdataset, if
they are installed. ``index.py`` measures startup with many records.
"""

import argparse
import io
import multiprocessing
import os
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
from data_pipelines.tokenizers import SPECIAL_TOKENS, WordPieceTokenizer
from data_pipelines.transforms import random_resized_crop

SIZE, BATCH = 224, 16
TOKENIZER = WordPieceTokenizer([*SPECIAL_TOKENS, "a", "picture"])
ROWS: list[tuple[str, str]] = []


def add_row(name: str, value: str) -> None:
    """Print a line of the table as soon as it is measured."""
    ROWS.append((name, value))
    print(f"{name:<66} {value}", flush=True)


def smooth_noise(rng: np.random.Generator, count: int, height: int, width: int) -> np.ndarray:
    """Return frames with structure at all scales, which compress to about the size of photographs."""
    coarse = [Image.fromarray(rng.integers(0, 256, (h, h * 4 // 3, 3), np.uint8)) for h in (6, 48)]
    layers = [np.asarray(image.resize((width, height), Image.Resampling.BICUBIC), np.float32) for image in coarse]
    grain = rng.normal(0, 8, (height, width, 3))
    image = 0.6 * layers[0] + 0.3 * layers[1] + grain
    return np.stack([np.roll(image, 2 * t, axis=1) for t in range(count)]).clip(0, 255).astype(np.uint8)


def write_images(folder: Path, count: int) -> Path:
    """Write a tar of JPEGs of 640 x 480 (COCO's size), each eight times, and the same JPEGs as files."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir()
    path = folder / "images.tar"
    with tarfile.open(path, "w") as tar:
        for i in range(count):
            file = folder / "images" / f"{i:05}.jpg"
            Image.fromarray(smooth_noise(rng, 1, 480, 640)[0]).save(file, quality=90)
            for copy in range(8):  # shuffling few records is slow per record, and no data set is that small
                tar.add(file, f"{i:05}-{copy}.jpg")
                info = tarfile.TarInfo(f"{i:05}-{copy}.txt")
                info.size = 9
                tar.addfile(info, io.BytesIO(b"a picture"))
    return path


def write_videos(folder: Path, count: int) -> Path:
    """Write a tar of H.264 videos of 300 frames of 320 x 240, and the same videos as files."""
    rng = np.random.default_rng(1)
    (folder / "videos").mkdir()
    path = folder / "videos.tar"
    with tarfile.open(path, "w") as tar:
        for i in range(count):
            file = folder / "videos" / f"{i:05}.mp4"
            write_video(file, smooth_noise(rng, 300, 240, 320), fps=30)
            for copy in range(8):
                tar.add(file, f"{i:05}-{copy}.mp4")
    return path


def open_stream(path: Path, kind: str, num_threads: int, batch: int, **visual: Any) -> Stream:
    """Open a stream that decodes, applies a random resized crop, and batches."""
    source = SourceConfig(format="webdataset", path=str(path), kind=kind)
    config = DataConfig(
        sources={"tar": source},
        visual=VisualConfig(image_size=SIZE, transform="train", flip=False, num_ops=0, **visual),
        examples=ExampleConfig(), batch_size=batch, num_threads=num_threads, prefetch=2 * batch * num_threads,
    )  # fmt: skip
    return Stream(config, TOKENIZER, name="benchmark", seed=0)


def measure_rate(batches: Iterator[Any], count: int, batch: int) -> float:
    """Return examples per second over ``count`` examples, without the startup."""
    next(batches)
    start = time.perf_counter()
    for _ in range(max(1, count // batch)):
        next(batches)
    return max(1, count // batch) * batch / (time.perf_counter() - start)


def read_jpeg(file: Path) -> list[Image.Image]:
    """Decode an image with Pillow."""
    with Image.open(io.BytesIO(file.read_bytes())) as image:
        image.load()
        return [image]


def read_16_frames(file: Path) -> list[Image.Image]:
    """Decode the frames that the pipeline selects, with PyAV: all are decoded, the selected ones converted to RGB."""
    with av.open(str(file)) as container:
        selected = set(uniform_indices(300, 16).tolist())
        frames = (frame for i, frame in enumerate(container.decode(video=0)) if i in selected)
        return [Image.fromarray(frame.to_ndarray(format="rgb24")) for frame in frames]


def measure_minimal_loop(files: Iterable[Path], read: Callable[[Path], list[Image.Image]]) -> float:
    """Return examples per second of the decoder and one resize per frame, and nothing else."""
    rng, count, start = np.random.default_rng(0), 0, time.perf_counter()
    for file in files:
        frames = read(file)
        width, height = frames[0].size
        window = random_resized_crop(height, width, SIZE, rng, min_area=0.5)  # of the pipeline's size
        box = (window.left, window.top, window.left + window.width, window.top + window.height)
        for frame in frames:
            np.asarray(frame.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box))
        count += 1
    return count / (time.perf_counter() - start)


def measure_pipeline(
    name: str,
    tar: Path,
    files: list[Path],
    read: Callable[[Path], list[Image.Image]],
    kind: str,
    batch: int,
    repeats: int,
) -> None:
    """Measure the throughput relative to the minimal loop, and the scaling; medians of interleaved measurements."""
    visual: dict[str, Any] = {"num_frames": 16} if kind == "video" else {}
    single = open_stream(tar, kind, 0, batch, **visual).batches()  # on this thread only
    next(single)
    ratios, thread_scaling, process_scaling = [], [], []
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as processes:
        list(processes.map(measure_minimal_loop, [files[:1]] * 2, [read] * 2))  # start them, and import
        for _ in range(repeats):
            for part in range(0, len(files), batch):  # interleaved, so that the load affects both
                minimal = measure_minimal_loop(files[part : part + batch], read)
                start = time.perf_counter()
                next(single)
                ratios.append(batch / (time.perf_counter() - start) / minimal)
            one, two = (
                measure_rate(open_stream(tar, kind, threads, batch, **visual).batches(), 2 * len(files), batch)
                for threads in (1, 2)
            )
            thread_scaling.append(two / one)
            both = sum(processes.map(measure_minimal_loop, [files] * 2, [read] * 2))
            process_scaling.append(both / measure_minimal_loop(files, read))
    add_row(f"{name}: relative to a minimal loop on one core", f"{np.median(ratios):.0%} (of {minimal:.1f} examples/s)")
    add_row(f"{name}: two threads / one", f"{np.median(thread_scaling):.2f}x")
    add_row("    two processes of the minimal loop / one, at the same time", f"{np.median(process_scaling):.2f}x")


def measure_data_wait(folder: Path, tar: Path, steps: int) -> None:
    """Measure the fraction of a training run's time that is spent waiting for data."""
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
    batch_seconds = measure_batch_seconds(config.streams["image_text"].data, BATCH)
    train(config, folder / "run")
    lines = [line for line in read_train_metrics(folder / "run" / "metrics.jsonl") if line["step"] > 5]
    step, wait = (float(np.median([line[key] for line in lines])) for key in ("seconds_per_step", "data_wait"))
    name = f"training, {step:.2f} s per step, {batch_seconds:.2f} s to build a batch: waiting for data"
    add_row(name, f"{wait:.2%}")


def measure_batch_seconds(data: DataConfig, batch: int) -> float:
    """Return the seconds to build a batch."""
    from mplug2_jax.training.config import TokenizerConfig
    from mplug2_jax.training.workdir import load_or_train_tokenizer

    batches = Stream(data, load_or_train_tokenizer(TokenizerConfig()), name="image_text", seed=0).batches()
    return batch / measure_rate(batches, 8 * batch, batch)


def decode(data: bytes, rng: np.random.Generator) -> np.ndarray:
    """Decode and crop an image, as users of the other libraries would write it."""
    with Image.open(io.BytesIO(data)) as image:
        window = random_resized_crop(image.height, image.width, SIZE, rng, min_area=0.5)
        box = (window.left, window.top, window.left + window.width, window.top + window.height)
        resized = image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC, box)
    return np.array(resized)


class Files:
    """A map-style dataset for PyTorch."""

    def __init__(self, files: list[Path], repeats: int) -> None:
        self._files, self._repeats = files, repeats

    def __len__(self) -> int:
        return len(self._files) * self._repeats

    def __getitem__(self, index: int) -> np.ndarray:
        return decode(self._files[index % len(self._files)].read_bytes(), np.random.default_rng(index))


def decode_sample(sample: dict[str, Any]) -> np.ndarray:
    """Return a sample of webdataset as pixels."""
    return decode(sample["jpg"], np.random.default_rng(0))


def compare_loaders(tar: Path, files: list[Path]) -> None:
    """Compare three loaders with two workers each, on JPEGs."""
    pipeline = measure_rate(open_stream(tar, "image", 2, BATCH).batches(), 2 * len(files), BATCH)
    try:
        import torch.utils.data
    except ImportError:
        add_row("PyTorch DataLoader, two workers", "torch is not installed")
        return
    loader = torch.utils.data.DataLoader(Files(files, 4), BATCH, num_workers=2, drop_last=True)
    pytorch = measure_rate(iter(loader), 2 * len(files), BATCH)
    ratio = f"{pipeline / pytorch:.2f}x ({pipeline:.0f}, {pytorch:.0f}/s)"
    add_row("JPEGs, two workers: this pipeline / PyTorch DataLoader", ratio)
    try:
        import webdataset
    except ImportError:
        add_row("webdataset, two workers", "webdataset is not installed")
        return
    samples = webdataset.WebDataset([str(tar)] * 8, shardshuffle=False).map(decode_sample)
    tars = measure_rate(iter(torch.utils.data.DataLoader(samples, BATCH, num_workers=2)), 2 * len(files), BATCH)
    add_row("JPEGs, two workers: this pipeline / webdataset", f"{pipeline / tars:.2f}x ({pipeline:.0f}, {tars:.0f}/s)")


def main() -> None:
    """Run all measurements, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=384, help="JPEGs (default: %(default)s)")
    parser.add_argument("--videos", type=int, default=12, help="videos (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=30, help="steps of the training run (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="repetitions of each measurement (default: %(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images, videos = write_images(folder, args.images), write_videos(folder, args.videos)
        image_files, video_files = (sorted((folder / name).iterdir()) for name in ("images", "videos"))
        measure_pipeline("JPEG of 640 x 480, crop, 224", images, image_files, read_jpeg, "image", BATCH, args.repeats)
        measure_pipeline("video, 16 of 300 frames, 224", videos, video_files, read_16_frames, "video", 2, args.repeats)
        compare_loaders(images, image_files)
        measure_data_wait(folder, images, args.steps)
    print("\n" + "\n".join(f"{name:<66} {value}" for name, value in ROWS))


if __name__ == "__main__":
    main()
