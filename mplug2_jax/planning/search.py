"""Search for the best layout of a run: rank candidates by a cost model, compile the most promising."""

import dataclasses
import itertools
import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import logging

from data_pipelines.storage.file_system import write_atomically
from mplug2_jax.console import format_duration
from mplug2_jax.errors import UserError
from mplug2_jax.model.config import AttentionKernel, RematConfig
from mplug2_jax.parallel.accelerators import Topology
from mplug2_jax.parallel.config import MeshConfig
from mplug2_jax.planning.programs import CompiledProgram, abstract_batch, make_run_spec_for_topology, trace_training
from mplug2_jax.planning.remedies import diff_overrides, try_compile
from mplug2_jax.planning.report import fingerprint, make_report
from mplug2_jax.planning.timing import MFU_CEILING
from mplug2_jax.training.config import FsdpGather, RunConfig
from mplug2_jax.training.state import RunSpec
from mplug2_jax.training.telemetry.step_flops import count_gradient_flops

REMAT_PRESETS = (
    RematConfig(),
    RematConfig(vision="dots", text="dots", fusion="dots", decoder="dots"),
    RematConfig(vision="full", text="dots", fusion="dots", decoder="dots"),
    RematConfig(vision="full", text="full", fusion="full", decoder="full"),
)
MIN_FRAMES_TO_SHARD = 32  # of a video clip, to try sequence parallelism


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A layout of the run, and its estimates by the cost model."""

    config: RunConfig
    overrides: tuple[str, ...]
    step_seconds: float  # optimistic
    memory_bytes: float  # per device: state, gradients, batch and saved activations; a lower bound

    def __str__(self) -> str:
        mesh = self.config.mesh
        axes = [f"{f.name}={getattr(mesh, f.name)}" for f in dataclasses.fields(mesh) if getattr(mesh, f.name) != 1]
        remat = self.config.model.remat
        policy = remat.vision if remat.vision == remat.text else f"{remat.vision}/{remat.text}"
        return (
            f"{' '.join(axes) or 'one device'}, fsdp_gather {self.config.fsdp_gather}, remat {policy}, "
            f"grad_accum_steps {self.config.grad_accum_steps}, attention {self.config.model.attention}"
        )


@dataclasses.dataclass(frozen=True)
class Trial:
    """A candidate that was compiled, or read from the cache."""

    candidate: Candidate
    error: str = ""  # why it cannot run: it does not fit, or does not compile; empty if it can
    memory_bytes: float = 0.0
    step_seconds: tuple[float, float] = (0.0, 0.0)  # optimistic and pessimistic
    recompute_overhead: float = 0.0
    exposed_fraction: float = 0.0
    compile_seconds: float = 0.0
    cached: bool = False

    @property
    def fits(self) -> bool:
        """Return whether it can run."""
        return not self.error

    @property
    def outcome(self) -> str:
        """Return the step time, or the error."""
        return self.error or f"{self.step_seconds[0] * 1e3:,.0f} to {self.step_seconds[1] * 1e3:,.0f} ms"

    @property
    def mean_seconds(self) -> float:
        """Return the middle of the predicted range, infinite if it cannot run: the objective of the search."""
        return sum(self.step_seconds) / 2 if self.fits else math.inf


def rank_candidates(config: RunConfig, topology: Topology) -> list[Candidate]:
    """Return the recipe's own layout, then all feasible ones, fastest by the cost model first.

    Infeasible layouts do not divide the batches, or need more memory than a device has even without temporaries.
    """
    spec = make_run_spec_for_topology(config, topology)
    cost_model = _CostModel(config, topology, spec)
    resolved = dataclasses.replace(config, mesh=MeshConfig(**config.mesh.axis_sizes(topology.devices)))  # no axis -1
    layouts = [cost_model.estimate(layout) for layout in _enumerate_layouts(config, topology) if layout != resolved]
    layouts = [c for c in layouts if c.memory_bytes <= topology.chip.memory_bytes]
    return [cost_model.estimate(config), *sorted(layouts, key=lambda c: (c.step_seconds, c.memory_bytes))]


def _enumerate_layouts(config: RunConfig, topology: Topology) -> Iterator[RunConfig]:
    devices, replicas = topology.devices, topology.slices
    frames = max((s.data.visual.num_frames for s in config.streams.values() if s.data.kind == "video"), default=1)
    kernels: tuple[AttentionKernel, ...] = ("auto", "xla") if topology.chip.platform == "tpu" else ("auto",)
    gathers: tuple[FsdpGather, ...] = ("step", "layer")
    powers = [2**i for i in range(devices.bit_length())]
    sequences = (1, 2, 4, 8) if frames >= MIN_FRAMES_TO_SHARD else (1,)
    for fsdp, tensor, sequence in itertools.product(powers, (1, 2, 4), sequences):
        data, remainder = divmod(devices, fsdp * tensor * sequence * replicas)
        if remainder or not data or any(heads % tensor for heads in (config.model.heads, config.model.vision_heads)):
            continue
        mesh = MeshConfig(replica=replicas, data=data, fsdp=fsdp, sequence=sequence, tensor=tensor)
        for remat, gather, grad_accum_steps, kernel in itertools.product(REMAT_PRESETS, gathers, (1, 2, 4, 8), kernels):
            if fsdp == 1 and gather == "step":
                continue  # nothing to gather
            sizes = [size for stream in config.streams.values() for size in stream.data.batch_sizes.values()]
            if any(size % (grad_accum_steps * replicas * data * fsdp) for size in sizes):
                continue
            model = dataclasses.replace(config.model, remat=remat, attention=kernel)
            try:
                yield dataclasses.replace(
                    config, mesh=mesh, model=model, grad_accum_steps=grad_accum_steps, fsdp_gather=gather
                )
            except UserError:  # batches that do not divide
                continue


class _CostModel:
    """Estimates of a layout without compiling it: good enough to order the trials, and no more."""

    def __init__(self, config: RunConfig, topology: Topology, spec: RunSpec) -> None:
        self._base, self._topology, self._spec = config, topology, spec
        self._batches = {name: abstract_batch(stream.data, spec) for name, stream in config.streams.items()}
        self._flops: dict[RematConfig, float] = {}
        self._param_bytes = spec.model_def.num_params() * 4.0
        on_host = {"opt"} if config.optimizer.offload_moments else set()
        on_devices = [tree for name, tree in spec.shapes.items() if name not in on_host]
        self._state_bytes = sum(shape.size * shape.dtype.itemsize for shape in jax.tree.leaves(on_devices))
        self._tokens = sum(_tokens(config, name) for name in config.streams)

    def estimate(self, config: RunConfig) -> Candidate:
        """Estimate the step time with matmuls near their peak and no overlap, and a lower bound of memory."""
        topology, mesh = self._topology, config.mesh.axis_sizes(self._topology.devices)
        chip = topology.chip
        compute = self._hardware_flops(config) / topology.chips / chip.peak_flops / MFU_CEILING

        # Weights and gradients cross the network at every use, or once per step; activations where heads are sharded.
        param_bytes, per_step = self._param_bytes / mesh["tensor"], config.fsdp_gather == "step"
        gathers = 1 if per_step else 2 * len(config.streams) * config.grad_accum_steps
        reductions = config.grad_accum_steps if per_step else gathers / 2
        replicas = mesh["data"] * mesh["replica"]
        bytes_sent = (
            param_bytes * (1 - 1 / mesh["fsdp"]) * (gathers + reductions)
            + 2 * param_bytes / mesh["fsdp"] * (1 - 1 / replicas) * reductions
        )
        tokens = self._tokens / (topology.devices / mesh["tensor"])
        depth = config.model.vision_layers + config.model.universal_layers
        bytes_sent += 8 * depth * tokens * config.model.width * 2.0 * (1 - 1 / mesh["tensor"])
        network = bytes_sent / (chip.link_bandwidth * max(1, chip.links // 2) / chip.devices_per_chip)

        state_bytes = self._state_bytes / (mesh["fsdp"] * mesh["tensor"])
        gathered_bytes = (
            2 * param_bytes if per_step and mesh["fsdp"] > 1 else param_bytes / mesh["fsdp"]
        )  # with gradients
        # Activations saved per input activation of a layer, measured on compiled programs: mostly attention weights.
        saved_per_input = {"none": 90.0, "dots": 15.0, "full": 1.0}[config.model.remat.vision]
        microbatch = self._tokens / topology.devices / config.grad_accum_steps
        activations = microbatch * config.model.vision_width * 2.0 * saved_per_input * config.model.vision_layers
        memory = state_bytes + gathered_bytes + activations / 2  # half: a layout is ruled out only if certain
        return Candidate(config, diff_overrides(self._base, config), compute + network, memory)

    def _hardware_flops(self, config: RunConfig) -> float:
        remat = config.model.remat
        if remat not in self._flops:
            spec = dataclasses.replace(self._spec, config=config)
            flops = count_gradient_flops(spec, self._base.streams, self._batches, remat=True)
            self._flops[remat] = float(flops.total())
        return self._flops[remat]


def _tokens(config: RunConfig, name: str) -> float:
    """Return the tokens of a stream's batch in the tower that has most of them."""
    data = config.streams[name].data
    if data.kind == "text":
        return float(data.batch_size * data.examples.text_length)
    frames = data.visual.num_frames if data.kind == "video" else 1
    return float(data.batch_size * config.model.num_visual_tokens(frames, data.visual.image_size))


def search(
    config: RunConfig, topology: Topology, *, seconds: float, effort: float, cache_dir: Path | None = None
) -> list[Trial]:
    """Compile candidates until the time is up, the recipe's own layout first; return the trials, best first.

    Args:
        config: the run.
        topology: to search for.
        seconds: after which no further compilation starts.
        effort: of the compiler.
        cache_dir: folder of results, by the fingerprints of the programs.
    """
    start = time.monotonic()
    candidates = rank_candidates(config, topology)
    logging.info("%d candidates; compiling the most promising for %.0f minutes", len(candidates), seconds / 60)
    trials: list[Trial] = []
    for number, candidate in enumerate(_round_robin(candidates), 1):
        elapsed = time.monotonic() - start
        if trials and elapsed + max(t.compile_seconds for t in trials) / 2 > seconds:
            break
        trial = _try(candidate, topology, effort, cache_dir)
        trials.append(trial)
        logging.info(
            "%3d  %s: %s, %.1f GiB (%s); best %.0f ms; eta %s", number, candidate, trial.outcome,
            trial.memory_bytes / 2**30, "cached" if trial.cached else f"compiled in {trial.compile_seconds:.0f} s",
            min(t.mean_seconds for t in trials) * 1e3,
            format_duration(max(0.0, seconds - (time.monotonic() - start))),
        )  # fmt: skip
    return sorted(trials, key=lambda t: (t.mean_seconds, t.memory_bytes))


def _round_robin(candidates: Sequence[Candidate]) -> Iterator[Candidate]:
    """Yield the recipe's own layout, then the fastest per remat preset and gather in turn: estimates may be bad."""
    yield candidates[0]
    queues: dict[Any, list[Candidate]] = {}
    for candidate in candidates[1:]:
        queues.setdefault((candidate.config.model.remat, candidate.config.fsdp_gather), []).append(candidate)
    while queues:
        for key in list(queues):
            yield queues[key].pop(0)
            if not queues[key]:
                del queues[key]


def _try(candidate: Candidate, topology: Topology, effort: float, cache_dir: Path | None) -> Trial:
    program = trace_training(candidate.config, topology)
    path = cache_dir / f"{fingerprint(program)}{effort:+g}.json" if cache_dir else None
    cached = _read_cached(candidate, path) if path else None
    if cached is not None:
        return cached
    try:
        compiled = try_compile(program, effort)
    except jax.errors.JaxRuntimeError as error:  # the search continues with other layouts
        return Trial(candidate, f"does not compile: {str(error).splitlines()[0][:80]}")
    if isinstance(compiled, CompiledProgram):
        report = make_report(compiled, candidate.config)
        trial = Trial(
            candidate, memory_bytes=report.memory.peak, step_seconds=report.step_seconds,
            recompute_overhead=report.costs.recompute_overhead, exposed_fraction=report.timing.exposed_fraction,
            compile_seconds=compiled.compile_seconds,
        )  # fmt: skip
    else:
        trial = Trial(candidate, "does not fit", compiled.required)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        names = [f.name for f in dataclasses.fields(trial) if f.name not in ("candidate", "cached")]
        results = {name: getattr(trial, name) for name in names}
        write_atomically(str(path), json.dumps(results).encode())
    return trial


def _read_cached(candidate: Candidate, path: Path) -> Trial | None:
    """Return a cached trial; None if there is none, or its file is invalid or of another version."""
    try:
        values = json.loads(path.read_text())
        return Trial(candidate, cached=True, **{**values, "step_seconds": tuple(values["step_seconds"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None
