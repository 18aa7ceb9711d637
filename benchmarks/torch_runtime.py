"""Benchmark our JAX model against the PyTorch runtime on this machine: forward pass, training step and beam search.

    python benchmarks/torch_runtime.py             # base, 1 clip of 4 frames at 224 px, float32
    python benchmarks/torch_runtime.py --size tiny --rounds 3
    python benchmarks/torch_runtime.py --export exports/demo --files clips/*.mp4   # ways to serve an export

Each framework runs in its own process with all cores; calls alternate between them, so that both see the same machine.
Forward is the caption loss in evaluation mode; a training step adds dropout, the backward pass and AdamW. A search
starts from visual tokens and generates all of its tokens. The release's search has no cache: for each token it reads
every beam's whole prefix, and projects the visual tokens again for each beam.

With ``--export``, texts of files per second by the program of an exported folder, and how many equal those of float32.
"""

import argparse
import dataclasses
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")  # for both; speeds up XLA's scratch memory

CALLS = ("forward", "training step", "beam search", "release's search")
Calls = dict[str, Callable[[], object]]


def prepare_jax(args: argparse.Namespace) -> Calls:
    """Prepare our model: the compiled loss, and the training loop's step."""
    import jax
    import jax.numpy as jnp
    from step import random_batch, run_spec

    from mplug2_jax.generation.config import SearchConfig
    from mplug2_jax.generation.decode import generate
    from mplug2_jax.model.config import SpecialTokens
    from mplug2_jax.objectives.forward import ForwardPass
    from mplug2_jax.objectives.language import caption_loss
    from mplug2_jax.parallel.placement import put_batch
    from mplug2_jax.training.step import make_train_step

    spec = run_spec(args)
    batch = put_batch(random_batch(args, spec.config.model.vocab_size), spec.mesh)
    step, state = make_train_step(spec), spec.init()
    loss = jax.jit(lambda params, batch: caption_loss(ForwardPass(spec.model_def.bind(params), batch)).loss)

    encode = jax.jit(lambda params, frames: spec.model_def.bind(params).encode_visual(frames))
    visual = encode(state["params"], batch["frames"])
    config = SearchConfig(num_beams=args.beams, min_length=0, max_length=args.tokens)

    @jax.jit
    def search(params: Any, visual: jax.Array) -> Any:
        mask, tokens = jnp.ones(visual.shape[:2], bool), SpecialTokens(end=-1)  # no token ends a beam
        return generate(spec.model_def.bind(params).decoder, visual, mask, config, tokens)

    def advance() -> None:
        nonlocal state
        state, metrics = step(state, {"video": batch})
        jax.block_until_ready((state, metrics))

    return {
        "forward": lambda: loss(state["params"], batch).block_until_ready(),
        "training step": advance,
        "beam search": lambda: jax.block_until_ready(search(state["params"], visual)),
    }


def prepare_torch(args: argparse.Namespace) -> Calls:
    """Prepare the runtime with random weights."""
    import torch
    from step import random_batch

    from mplug2_jax.conversion.torch_runtime import Caption, Config, SearchConfig, normalize_pixels, parameter_groups
    from mplug2_jax.conversion.torch_runtime.search import beam_search, generate
    from mplug2_jax.model.config import model_config

    sizes = dataclasses.asdict(
        model_config(args.size, image_size=args.image_size, dropout=args.dropout, attention_dropout=args.dropout)
    )
    sizes["fusion_start"] = 0  # captions have no fusion
    names = {field.name for field in dataclasses.fields(Config)} & set(sizes)
    model = Caption(Config(**{name: sizes[name] for name in names}))
    batch = {name: torch.from_numpy(value) for name, value in random_batch(args, sizes["vocab_size"]).items()}
    groups = parameter_groups(model, learning_rate=1e-5, vision_learning_rate=1e-6, weight_decay=0.02)
    optimizer = torch.optim.AdamW(groups, fused=True)

    def loss() -> torch.Tensor:
        value: torch.Tensor = model(normalize_pixels(batch["frames"]), batch["target"].long(), batch["target_weights"])
        return value

    def forward() -> None:
        model.eval()
        with torch.no_grad():
            loss()

    def advance() -> None:
        model.train()
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    class PrefixDecoder:
        """The prefixes of beams as the search's state, without a cache."""

        def __init__(self) -> None:
            self.ids = torch.empty(args.batch * args.beams, 0, dtype=torch.long)
            self.memory = visual.repeat_interleave(args.beams, 0)

        def step(self, tokens: torch.Tensor) -> torch.Tensor:
            self.ids = torch.cat([self.ids, tokens[:, None]], 1)
            logits: torch.Tensor = model.text_decoder(self.ids, None, self.memory)[:, -1]
            return logits

        def reorder(self, rows: torch.Tensor) -> None:
            self.ids = self.ids[rows]

    search = SearchConfig(num_beams=args.beams, min_length=0, max_length=args.tokens, begin=1, end=-1)
    model.eval()
    with torch.no_grad():
        visual = model.encode_visual(normalize_pixels(batch["frames"]))
    mask = torch.ones(visual.shape[:2], dtype=torch.bool)

    @torch.no_grad()
    def cached_search() -> object:
        model.eval()
        return generate(model.text_decoder, model.text_decoder.project(visual, mask), search)

    @torch.no_grad()
    def uncached_search() -> object:
        model.eval()
        return beam_search(PrefixDecoder(), args.batch, search)

    return {
        "forward": forward, "training step": advance, "beam search": cached_search, "release's search": uncached_search,
    }  # fmt: skip


PREPARE = {"jax": prepare_jax, "torch": prepare_torch}


def serve(calls: Calls) -> None:
    """Print the names of the calls, then make those named on standard input, and print the seconds of each."""
    print(*calls, sep=",", flush=True)
    for line in sys.stdin:
        call = calls[line.strip()]
        start = time.perf_counter()
        call()
        print(time.perf_counter() - start, flush=True)


class Framework:
    """A framework in its own process."""

    def __init__(self, name: str) -> None:
        command = [sys.executable, __file__, *sys.argv[1:], "--serve", name]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.calls = self._read_line().split(",")

    def seconds(self, call: str) -> float:
        """Return the seconds of one call."""
        assert self._process.stdin is not None
        print(call, file=self._process.stdin, flush=True)
        return float(self._read_line())

    def _read_line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def compare(call: str, frameworks: dict[str, Framework], rounds: int) -> dict[str, float]:
    """Return the median seconds of a call in each framework that has it; the first, which compiles, does not count."""
    times: dict[str, list[float]] = {name: [] for name, framework in frameworks.items() if call in framework.calls}
    for i in range(rounds + 1):
        for name in times:
            seconds = frameworks[name].seconds(call)
            if i:
                times[name].append(seconds)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


VARIANTS: dict[str, dict[str, Any]] = {
    "float32": {}, "float32, compiled": {"compiled": True}, "bfloat16": {"dtype": "bfloat16"},
    "bfloat16, compiled": {"dtype": "bfloat16", "compiled": True}, "int8 weights": {"int8": True},
    "int8 weights, compiled": {"int8": True, "compiled": True},
}  # fmt: skip


def serve_export(folder: Path, files: list[Path], rounds: int) -> None:
    """Print the throughput of an exported folder by every way to compute, and its differences from float32."""
    import numpy as np
    import torch

    from mplug2_jax.conversion.exported.model import ExportedModel

    print(f"{folder}, {len(files)} files at once, {os.cpu_count()} cores, median of {rounds}\n")
    print(
        f"{'':<24} {'weights':>9} {'first':>8} {'files/s':>8} {'speed':>6} {'same texts':>11} {'features differ':>16}"
    )
    expected: tuple[list[str], Any, float] | None = None
    for name, options in VARIANTS.items():
        dtype = getattr(torch, options.get("dtype", "float32"))
        model = ExportedModel(folder, **options | {"dtype": dtype})
        seconds = []
        for _ in range(rounds + 1):
            start = time.perf_counter()
            texts = [prediction.text for prediction in model.generate_batch(files)]
            seconds.append(time.perf_counter() - start)
        features = np.array([model.embed(path) for path in files])
        median = statistics.median(seconds[1:])
        expected = expected or (texts, features, median)
        same = sum(ours == theirs for ours, theirs in zip(texts, expected[0], strict=True))
        difference = np.abs(features - expected[1]).max() / np.abs(expected[1]).max()
        size = sum(map(count_bytes, model.model.parameters())) / 2**20
        print(
            f"{name:<24} {size:>5.1f} MiB {seconds[0]:>6.1f} s {len(files) / median:>8.2f} "
            f"{expected[2] / median:>5.2f}x {same:>7} / {len(files)} {difference:>15.1e}",
            flush=True,
        )


def count_bytes(tensor: Any) -> int:
    """Return the bytes of a tensor, or of the parts of a quantized one."""
    names = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else ()
    return sum(count_bytes(getattr(tensor, name)) for name in names) or tensor.numel() * tensor.element_size()


def main() -> None:
    """Measure and print."""
    from mplug2_jax.model.config import model_config

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="base", help="row of the model table (default: %(default)s)")
    parser.add_argument("--image-size", type=int, help="pixels (default: the size's own)")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--frames", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=20, help="caption length (default: %(default)s)")
    parser.add_argument("--beams", type=int, default=5, help="of the search (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="calls measured of each (default: %(default)s)")
    parser.add_argument("--dropout", type=float, default=0.1, help="in the training step (default: %(default)s)")
    parser.add_argument("--export", type=Path, metavar="DIR", help="measure this exported folder instead")
    parser.add_argument("--files", nargs="+", type=Path, metavar="FILE", help="images or clips for --export")
    parser.add_argument("--serve", choices=PREPARE, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.export:
        if not args.files:
            parser.error("--export needs --files")
        serve_export(args.export, args.files, args.rounds)
        return
    args.image_size = args.image_size or model_config(args.size).image_size
    if args.serve:
        serve(PREPARE[args.serve](args))
        return

    frameworks = {name: Framework(name) for name in PREPARE}
    print(
        f"{args.size}, caption, batch {args.batch} x {args.frames} frames x {args.image_size} px, float32, "
        f"{os.cpu_count()} cores, median of {args.rounds}\n"
    )
    print(f"{'':<16} {'jax':>9} {'torch':>9}   jax's speed / torch's")
    seconds: dict[str, dict[str, float]] = {}
    for call in CALLS:
        seconds[call] = compare(call, frameworks, args.rounds)
        times = "".join(f"{seconds[call][name]:>8.3f} s" if name in seconds[call] else f"{'-':>10}" for name in PREPARE)
        ours = seconds["beam search" if call == "release's search" else call]["jax"]
        print(f"{call:<16}{times}   {seconds[call]['torch'] / ours:.2f}", flush=True)
    for framework in frameworks.values():
        framework.close()


if __name__ == "__main__":
    main()
