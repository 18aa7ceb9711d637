"""Benchmark the input pipeline: CPU and GIL time of an example, cores per host for pretraining, and throughput.

    python benchmarks/feed.py
    python benchmarks/feed.py --images 64 --videos 4      # quick

Clips are H.264 of 640 x 360 pixels, 16 of 300 frames; pictures are JPEGs of 512 x 384; the transform is "train" at 224
pixels, and libswscale resizes, as in pretraining. Printed are: CPU time of an example, and how much of
it holds the GIL, also with other settings; cores that a host of each accelerator needs for the pretraining recipes; the
pipeline relative to a minimal loop of the same decoder and resizes; two workers relative to one, where two processes of
the minimal loop show what the machine gives; other loaders, if they are installed; and the fraction of a training run
that waits for data. Ratios are measured in one run, interleaved.
"""

import argparse
import dataclasses
import io
import json
import multiprocessing
import os
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import av
import numpy as np
from PIL import Image

from data_pipelines.config import DataConfig, ExampleConfig, SourceConfig, VisualConfig
from data_pipelines.frames import uniform_indices
from data_pipelines.loader import ExampleBuilder, Stream
from data_pipelines.media import write_video
from data_pipelines.order import RecordRef
from data_pipelines.tokenizers import SPECIAL_TOKENS, WordPieceTokenizer
from data_pipelines.transforms import random_resized_crop
from mplug2_jax.cli.common import table
from mplug2_jax.parallel.accelerators import CHIPS
from mplug2_jax.planning.cost_goldens import goldens_path

SIZE, BATCH = 224, 16
TOKENIZER = WordPieceTokenizer([*SPECIAL_TOKENS, "a", "picture"])
ROWS: list[tuple[str, str]] = []


def add_row(name: str, value: str) -> None:
    """Print a line of the table as soon as it is measured."""
    ROWS.append((name, value))
    print(f"{name:<72} {value}", flush=True)


def smooth_noise(rng: np.random.Generator, count: int, height: int, width: int) -> np.ndarray:
    """Return frames with structure at all scales, which compress to about the size of photographs."""
    coarse = [Image.fromarray(rng.integers(0, 256, (h, h * 4 // 3, 3), np.uint8)) for h in (6, 48)]
    layers = [np.asarray(image.resize((width, height), Image.Resampling.BICUBIC), np.float32) for image in coarse]
    noise = rng.normal(0, 8, (height, width, 3))
    image = 0.6 * layers[0] + 0.3 * layers[1] + noise
    return np.stack([np.roll(image, 2 * t, axis=1) for t in range(count)]).clip(0, 255).astype(np.uint8)


def write_images(folder: Path, count: int) -> Path:
    """Write a tar of JPEGs of 512 x 384, each eight times, and the same JPEGs as files."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir()
    path = folder / "images.tar"
    with tarfile.open(path, "w") as tar:
        for i in range(count):
            file = folder / "images" / f"{i:05}.jpg"
            Image.fromarray(smooth_noise(rng, 1, 384, 512)[0]).save(file, quality=90)
            for copy in range(8):  # shuffling few records is slow per record, and no data set is that small
                tar.add(file, f"{i:05}-{copy}.jpg")
                info = tarfile.TarInfo(f"{i:05}-{copy}.txt")
                info.size = 9
                tar.addfile(info, io.BytesIO(b"a picture"))
    return path


def write_videos(folder: Path, count: int) -> Path:
    """Write a tar of H.264 videos of 300 frames of 640 x 360, and the same videos as files."""
    rng = np.random.default_rng(1)
    (folder / "videos").mkdir()
    path = folder / "videos.tar"
    with tarfile.open(path, "w") as tar:
        for i in range(count):
            file = folder / "videos" / f"{i:05}.mp4"
            write_video(file, smooth_noise(rng, 300, 360, 640), fps=30)
            for copy in range(8):
                tar.add(file, f"{i:05}-{copy}.mp4")
    return path


def stream_config(
    path: Path, kind: str, batch: int, *, augment: bool = True, visual: Mapping[str, Any] = {}, **fields: Any
) -> DataConfig:
    """Return a stream that decodes, crops, augments and batches."""
    source = SourceConfig(format="webdataset", path=str(path), kind=kind)
    settings: dict[str, Any] = {"sampling": "random", "transform": "train", "min_crop_area": 0.2}
    visual = VisualConfig(image_size=SIZE, num_frames=16, **(settings | {"scaler": "swscale"} | dict(visual)))
    if not augment:
        visual = dataclasses.replace(visual, sampling="uniform", flip=False, num_ops=0, min_crop_area=0.5)
    return DataConfig(sources={"tar": source}, visual=visual, examples=ExampleConfig(), batch_size=batch, **fields)


def open_stream(path: Path, kind: str, batch: int, **fields: Any) -> Stream:
    """Open a stream without augmentation, like the minimal loop."""
    config = stream_config(path, kind, batch, augment=False, **fields)
    return Stream(config, TOKENIZER, name="benchmark", seed=0)


class GilSampler:
    """A thread that wakes up every millisecond, and counts how often another thread holds the GIL then.

    It does if waking up takes longer than it nearly ever does while the program sleeps.
    """

    def __init__(self) -> None:
        self._stop, self._delays = threading.Event(), list[float]()
        self._delays_asleep = self._sample(lambda: time.sleep(1.0))

    def _sample(self, work: Callable[[], object]) -> list[float]:
        self._stop.clear()
        self._delays = []
        thread = threading.Thread(target=self._run)
        interval = sys.getswitchinterval()
        sys.setswitchinterval(10.0)  # threads release the GIL themselves; it is never requested from them
        thread.start()
        try:
            work()
        finally:
            self._stop.set()
            sys.setswitchinterval(interval)
            thread.join()
        return self._delays

    def _run(self) -> None:
        while not self._stop.is_set():
            start = time.perf_counter()
            time.sleep(1e-3)
            self._delays.append(time.perf_counter() - start)

    def gil_fraction(self, work: Callable[[], object]) -> float:
        """Return the fraction of time that this thread holds the GIL while it works."""
        limit = float(np.quantile(self._delays_asleep, 0.98))
        return float(np.mean(np.asarray(self._sample(work)) > limit))


SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "image": ("image", {}),
    "image resized by Pillow": ("image", {"scaler": "pillow"}),
    "video": ("video", {}),
    "video resized by Pillow": ("video", {"scaler": "pillow"}),
    "video, colors on the device": ("video", {"color_on_device": True}),
    "video without RandAugment": ("video", {"num_ops": 0}),
}


def measure_costs(tars: dict[str, Path], counts: dict[str, int]) -> dict[str, float]:
    """Print the CPU time and GIL time of an example of each kind; return the CPU time in seconds."""
    sampler, seconds = GilSampler(), dict[str, float]()
    for name, (kind, visual) in SETTINGS.items():
        builder = ExampleBuilder(stream_config(tars[kind], kind, 1, visual=visual), TOKENIZER, "benchmark", seed=0)
        builder.load_or_replace(RecordRef("tar", 0, 0))

        def build(builder: ExampleBuilder = builder, kind: str = kind) -> None:
            for index in range(2 * counts[kind]):  # each file with two draws
                builder.load_or_replace(RecordRef("tar", 4 * index, 0))

        wall, cpu = time.perf_counter(), time.thread_time()
        fraction = sampler.gil_fraction(build)
        cpu, wall = (
            (now - then) / (2 * counts[kind])
            for now, then in ((time.thread_time(), cpu), (time.perf_counter(), wall))
        )  # fmt: skip
        seconds[name] = cpu
        add_row(f"{name}: CPU time of an example; with the GIL", f"{1e3 * cpu:.1f} ms; {1e3 * fraction * wall:.1f} ms")
    add_row("colors of a clip on the device, here this CPU", f"{1e3 * measure_device_colors():.1f} ms")
    return seconds


def measure_device_colors() -> float:
    """Return the seconds that the compiled operations on colors take for a clip."""
    import jax

    from mplug2_jax.training.color_augment import apply_color_operations

    frames = jax.numpy.zeros((4, 16, SIZE, SIZE, 3), "uint8")
    operations = jax.numpy.tile(jax.numpy.array([[[0, 0.5], [5, 0.5]]]), (4, 1, 1))
    apply = jax.jit(apply_color_operations)
    apply(frames, operations).block_until_ready()
    start = time.process_time()
    apply(frames, operations).block_until_ready()
    return (time.process_time() - start) / 4


def print_cores_per_host(seconds: dict[str, float], mfu: float) -> None:
    """Print what a host of each accelerator needs for the pretraining recipes at a model FLOP/s utilization."""
    rows = []
    for program in json.loads(goldens_path().read_text())["programs"]:
        recipe = program["recipe"].partition(":")[0]
        chip, _, topology = program["topology"].partition(":")
        if recipe != "pretrain" or program["slices"] > 1:
            continue
        spec, chips = CHIPS[chip], int(np.prod([int(side) for side in topology.split("x")]))
        step = program["costs"]["flops"] / (chips * spec.peak_flops * mfu)
        batch = load_batch_sizes(program["recipe"])
        rates = {kind: count / chips * spec.chips_per_host / step for kind, count in batch.items()}
        cores = sum(rate * seconds[kind] for kind, rate in rates.items())
        rows.append((
            f"{program['recipe']} on {program['topology']}", f"{step:.2f} s", f"{rates['video']:.0f}",
            f"{rates['image']:.0f}", f"{cores:.0f}",
        ))  # fmt: skip
    print()
    print(table(rows, (f"a host at MFU {mfu:.0%}", "step", "clips/s", "pictures/s", "cores"), right=(1, 2, 3, 4)))
    print()


def load_batch_sizes(recipe: str) -> dict[str, int]:
    """Return the examples per step of each kind of media of a recipe."""
    from mplug2_jax.config import build, load_recipe
    from mplug2_jax.training.config import RunConfig

    streams = build(RunConfig, load_recipe(recipe)).streams.values()
    return {stream.data.kind: stream.data.batch_size for stream in streams if stream.data.kind != "text"}


def measure_rate(source: Stream | Iterable[Any], count: int, batch: int) -> float:
    """Return examples per second over ``count`` examples, without the startup and what was ready after it."""
    batches: Iterator[Any] = source.batches() if isinstance(source, Stream) else iter(source)
    number = max(1, count // batch)
    for _ in range(1 + number // 2):
        next(batches)
    start = time.perf_counter()
    for _ in range(number):
        next(batches)
    rate = number * batch / (time.perf_counter() - start)
    if isinstance(source, Stream):
        batches.close()
    return rate


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


def crop(frames: list[Image.Image], rng: np.random.Generator) -> list[np.ndarray]:
    """Crop and resize frames, as users of other libraries would write it."""
    width, height = frames[0].size
    window = random_resized_crop(height, width, SIZE, rng, min_area=0.5)  # of the pipeline's size
    box = (window.left, window.top, window.left + window.width, window.top + window.height)
    return [np.asarray(frame.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box)) for frame in frames]


def measure_minimal_loop(files: Iterable[Path], read: Callable[[Path], list[Image.Image]]) -> float:
    """Return examples per second of the decoder and one resize per frame, and nothing else."""
    rng, count, start = np.random.default_rng(0), 0, time.perf_counter()
    for file in files:
        crop(read(file), rng)
        count += 1
    return count / (time.perf_counter() - start)


def measure_pipeline(
    kind: str, tar: Path, files: list[Path], read: Callable[[Path], list[Image.Image]], batch: int, repeats: int
) -> None:
    """Measure the throughput relative to the minimal loop, and the scaling; medians of interleaved measurements."""
    single = open_stream(tar, kind, batch, num_threads=0).batches()  # on this thread only
    next(single)
    ratios, worker_scaling, process_scaling, per_core = [], [], [], []
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as processes:
        list(processes.map(measure_minimal_loop, [files[:1]] * 2, [read] * 2))  # start them, and import
        for _ in range(repeats):
            for part in range(0, len(files), batch):  # interleaved, so that the load affects both
                minimal = measure_minimal_loop(files[part : part + batch], read)
                start = time.perf_counter()
                next(single)
                ratios.append(batch / (time.perf_counter() - start) / minimal)
            one, two = (
                measure_rate(open_stream(tar, kind, batch, num_workers=workers, num_threads=0), 2 * len(files), batch)
                for workers in (1, 2)
            )
            both = sum(processes.map(measure_minimal_loop, [files] * 2, [read] * 2))
            worker_scaling.append(two / one)
            process_scaling.append(both / measure_minimal_loop(files, read))
            per_core.append(two / both)
    add_row(f"{kind}: relative to a minimal loop on one core", f"{np.median(ratios):.0%} (of {minimal:.1f} examples/s)")
    add_row(f"{kind}: two workers / one", f"{np.median(worker_scaling):.2f}x")
    add_row("    two processes of the minimal loop / one, at the same time", f"{np.median(process_scaling):.2f}x")
    add_row("    two workers / two processes of the minimal loop", f"{np.median(per_core):.0%}")


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

    stream = Stream(data, load_or_train_tokenizer(TokenizerConfig()), name="image_text", seed=0)
    return batch / measure_rate(stream, 8 * batch, batch)


class Files:
    """A map-style dataset for PyTorch."""

    def __init__(self, files: list[Path], repeats: int, read: Callable[[Path], list[Image.Image]]) -> None:
        self._files, self._repeats, self._read = files, repeats, read

    def __len__(self) -> int:
        return len(self._files) * self._repeats

    def __getitem__(self, index: int) -> np.ndarray:
        return np.stack(crop(self._read(self._files[index % len(self._files)]), np.random.default_rng(index)))


def read_with_torchcodec(file: Path) -> list[Image.Image]:
    """Decode the frames that the pipeline selects with torchcodec."""
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(str(file), dimension_order="NHWC", num_ffmpeg_threads=1)
    return [Image.fromarray(frame.numpy()) for frame in decoder.get_frames_at(uniform_indices(300, 16).tolist()).data]


def decode_sample(sample: dict[str, Any]) -> np.ndarray:
    """Return a sample of webdataset as pixels."""
    with Image.open(io.BytesIO(sample["jpg"])) as image:
        return np.stack(crop([image.convert("RGB")], np.random.default_rng(0)))


def read_with_dali(files: list[Path], batch: int) -> Iterator[np.ndarray]:
    """Return the batches of DALI's CPU decoder, with two threads."""
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=batch, num_threads=2, device_id=None)
    def define() -> Any:
        data, _ = fn.readers.file(files=[str(file) for file in files])
        images = fn.decoders.image(data, device="cpu", output_type=types.RGB)
        return fn.random_resized_crop(
            images, size=[SIZE, SIZE], random_area=[0.5, 1.0], interp_type=types.INTERP_CUBIC, antialias=True
        )

    pipeline = define()
    pipeline.build()
    return (pipeline.run()[0].as_array() for _ in iter(int, 1))


def compare_loaders(
    kind: str, tar: Path, files: list[Path], read: Callable[[Path], list[Image.Image]], batch: int
) -> None:
    """Compare other loaders with this pipeline, each with two worker processes, one after the other."""
    count = 2 * len(files)
    pipeline = measure_rate(open_stream(tar, kind, batch, num_workers=2, num_threads=0), count, batch)

    def add(name: str, make: Callable[[], Iterable[Any]]) -> None:
        try:
            rate = measure_rate(make(), count, batch)
        except ImportError as error:
            add_row(f"{kind}, two workers: this / {name}", f"not installed ({error.name})")
            return
        add_row(f"{kind}, two workers: this / {name}", f"{pipeline / rate:.2f}x ({pipeline:.1f}, {rate:.1f}/s)")

    def torch_loader(dataset: Any) -> Iterable[Any]:
        import torch.utils.data

        return torch.utils.data.DataLoader(dataset, batch, num_workers=2)

    def webdataset_loader() -> Iterable[Any]:
        import webdataset

        return torch_loader(webdataset.WebDataset([str(tar)] * 8, shardshuffle=False).map(decode_sample))

    def torchcodec_loader() -> Iterable[Any]:
        import torchcodec  # noqa: F401

        return torch_loader(Files(files, 4, read_with_torchcodec))

    add("PyTorch DataLoader", lambda: torch_loader(Files(files, 4, read)))
    if kind == "image":
        add("webdataset", webdataset_loader)
        add("NVIDIA DALI, which decodes no H.264 on CPUs", lambda: read_with_dali(files, batch))
    else:
        add("PyTorch DataLoader, torchcodec", torchcodec_loader)


def main() -> None:
    """Run all measurements, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=384, help="JPEGs (default: %(default)s)")
    parser.add_argument("--videos", type=int, default=12, help="videos (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=30, help="steps of the training run (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="repetitions of each measurement (default: %(default)s)")
    parser.add_argument(
        "--mfu", type=float, default=0.45, help="model FLOP/s utilization of the accelerators (default: %(default)s)"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images, videos = write_images(folder, args.images), write_videos(folder, args.videos)
        image_files, video_files = (sorted((folder / name).iterdir()) for name in ("images", "videos"))
        seconds = measure_costs({"image": images, "video": videos}, {"image": args.images, "video": args.videos})
        print_cores_per_host(seconds, args.mfu)
        measure_pipeline("image", images, image_files, read_jpeg, BATCH, args.repeats)
        measure_pipeline("video", videos, video_files, read_16_frames, 2, args.repeats)
        compare_loaders("image", images, image_files, read_jpeg, BATCH)
        compare_loaders("video", videos, video_files, read_16_frames, 2)
        measure_data_wait(folder, images, args.steps)
    print("\n" + "\n".join(f"{name:<72} {value}" for name, value in ROWS))


if __name__ == "__main__":
    main()
