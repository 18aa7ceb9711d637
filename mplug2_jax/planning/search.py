"""The best way to lay out a run: candidates by the analytic model, the promising ones compiled, the best kept."""

import dataclasses
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from data_pipelines.sources.files import write_atomically
from mplug2_jax.errors import UserError
from mplug2_jax.model.config import AttentionKernel, RematConfig
from mplug2_jax.parallel.accelerators import Topology
from mplug2_jax.parallel.config import MeshConfig
from mplug2_jax.planning.programs import Compiled, abstract_batch, blueprint, training_program
from mplug2_jax.planning.remedies import overrides_between, try_compile
from mplug2_jax.planning.report import fingerprint, make_report
from mplug2_jax.planning.timing import BEST
from mplug2_jax.training.config import FsdpGather, RunConfig
from mplug2_jax.training.optim.partition import partition
from mplug2_jax.training.state import RunSpec
from mplug2_jax.training.telemetry.step_flops import count_gradient_flops

REMATS = (
    RematConfig(),
    RematConfig(vision="dots", text="dots", fusion="dots", decoder="dots"),
    RematConfig(vision="full", text="dots", fusion="dots", decoder="dots"),
    RematConfig(vision="full", text="full", fusion="full", decoder="full"),
)
LONG_CLIP = 32  # frames from which on clips may be split between chips


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A way to lay out the run, and what the analytic model thinks of it."""

    config: RunConfig
    overrides: tuple[str, ...]
    seconds: float  # a step's, at best
    memory: float  # bytes of a device: state, gradients, batch and what the backward pass keeps; a floor

    def __str__(self) -> str:
        mesh = self.config.mesh
        axes = [f"{f.name}={getattr(mesh, f.name)}" for f in dataclasses.fields(mesh) if getattr(mesh, f.name) != 1]
        remat = self.config.model.remat
        kept = remat.vision if remat.vision == remat.text else f"{remat.vision}/{remat.text}"
        return (
            f"{' '.join(axes) or 'one device'}, gather {self.config.fsdp_gather}, remat {kept}, "
            f"accumulate {self.config.grad_accum_steps}, attention {self.config.model.attention}"
        )


@dataclasses.dataclass(frozen=True)
class Tried:
    """A candidate that was compiled, or taken from the cache."""

    candidate: Candidate
    trouble: str  # empty, or why it cannot be: it does not fit, or the compiler refuses it
    memory: float
    seconds: tuple[float, float]
    overhead: float
    exposed: float  # of compute
    compile_seconds: float
    cached: bool

    @property
    def fits(self) -> bool:
        """Whether it can be run."""
        return not self.trouble

    @property
    def time(self) -> str:
        """Of a step, in words."""
        return self.trouble or f"{self.seconds[0] * 1e3:,.0f} to {self.seconds[1] * 1e3:,.0f} ms"

    @property
    def score(self) -> float:
        """Smaller is better: the middle of the predicted range."""
        return sum(self.seconds) / 2 if self.fits else math.inf


def candidates(config: RunConfig, topology: Topology) -> list[Candidate]:
    """The recipe as it is, then every variation that is not ruled out, the fastest by the analytic model first.

    Ruled out is what the batches do not divide into, and what needs more memory than a device has before there is a
    single temporary.
    """
    spec = blueprint(config, topology)
    model = _Model(config, topology, spec)
    own = model.judge(config)
    same = dataclasses.replace(config, mesh=MeshConfig(**config.mesh.axis_sizes(topology.devices)))  # no axis left open
    varied = [model.judge(variation) for variation in _variations(config, topology) if variation != same]
    varied = [c for c in varied if c.memory <= topology.chip.memory_bytes]
    return [own, *sorted(varied, key=lambda c: (c.seconds, c.memory))]


def _variations(config: RunConfig, topology: Topology) -> Iterator[RunConfig]:
    devices, replicas = topology.devices, topology.slices
    frames = max((s.data.visual.num_frames for s in config.streams.values() if s.data.kind == "video"), default=1)
    kernels: tuple[AttentionKernel, ...] = ("auto", "xla") if topology.chip.platform == "tpu" else ("auto",)
    gathers: tuple[FsdpGather, ...] = ("step", "layer")
    powers = [2**i for i in range(devices.bit_length())]
    for fsdp, tensor, sequence in itertools.product(powers, (1, 2, 4), (1, 2, 4, 8) if frames >= LONG_CLIP else (1,)):
        data, rest = divmod(devices, fsdp * tensor * sequence * replicas)
        if rest or not data or any(heads % tensor for heads in (config.model.heads, config.model.vision_heads)):
            continue
        mesh = MeshConfig(replica=replicas, data=data, fsdp=fsdp, sequence=sequence, tensor=tensor)
        for remat, gather, times, kernel in itertools.product(REMATS, gathers, (1, 2, 4, 8), kernels):
            if fsdp == 1 and gather == "step":
                continue  # there is nothing to gather
            if any(s.data.batch_size % (times * replicas * data * fsdp) for s in config.streams.values()):
                continue
            model = dataclasses.replace(config.model, remat=remat, attention=kernel)
            try:
                yield dataclasses.replace(config, mesh=mesh, model=model, grad_accum_steps=times, fsdp_gather=gather)
            except UserError:  # batches that do not divide
                continue


class _Model:
    """What can be said of a variation without compiling it: the order in which to try, and no more than that."""

    def __init__(self, config: RunConfig, topology: Topology, spec: RunSpec) -> None:
        self._base, self._topology, self._spec = config, topology, spec
        self._batches = {name: abstract_batch(stream.data, spec) for name, stream in config.streams.items()}
        self._operations: dict[RematConfig, float] = {}
        self._weights = spec.definition.num_params() * 4.0
        moments = {"float32": 4, "bfloat16": 2}
        optimizer = config.optimizer
        kept = 0 if optimizer.offload_moments else moments[optimizer.mu_dtype] + moments[optimizer.nu_dtype]
        trained, _ = partition(spec.shapes["params"], config.frozen)
        self._state = spec.definition.num_params() * (moments[config.param_dtype] + 4.0 * config.has_teacher)
        self._state += (kept + 4.0 * bool(config.ema_decay)) * sum(shape.size for shape in jax.tree.leaves(trained))
        self._tokens = sum(_tokens(config, name) for name in config.streams)

    def judge(self, config: RunConfig) -> Candidate:
        """Its time, were all matmuls near the peak and nothing hidden behind them, and the least memory it needs."""
        topology, mesh = self._topology, config.mesh.axis_sizes(self._topology.devices)
        chip = topology.chip
        compute = self._executed(config) / topology.chips / chip.peak_flops / BEST

        # Weights and gradients cross the network at every use, or once a step; activations where heads are split.
        weights, once = self._weights / mesh["tensor"], config.fsdp_gather == "step"
        gathers = 1 if once else 2 * len(config.streams) * config.grad_accum_steps
        sums = config.grad_accum_steps if once else gathers / 2
        copies = mesh["data"] * mesh["replica"]
        sent = (
            weights * (1 - 1 / mesh["fsdp"]) * (gathers + sums) + 2 * weights / mesh["fsdp"] * (1 - 1 / copies) * sums
        )
        tokens = self._tokens / (topology.devices / mesh["tensor"])
        depth = config.model.vision_layers + config.model.universal_layers
        sent += 8 * depth * tokens * config.model.width * 2.0 * (1 - 1 / mesh["tensor"])
        network = sent / (chip.link_bandwidth * max(1, chip.links // 2) / chip.devices_per_chip)

        held = self._state / (mesh["fsdp"] * mesh["tensor"])
        whole = 2 * weights if once and mesh["fsdp"] > 1 else weights / mesh["fsdp"]  # with gradients
        # Numbers kept for each that enters a layer, as compiled programs have them: attention's weights above all.
        kept = {"none": 90.0, "dots": 15.0, "full": 1.0}[config.model.remat.vision]
        micro = self._tokens / topology.devices / config.grad_accum_steps
        activations = micro * config.model.vision_width * 2.0 * kept * config.model.vision_layers
        memory = held + whole + activations / 2  # half: what rules out should be sure
        return Candidate(config, overrides_between(self._base, config), compute + network, memory)

    def _executed(self, config: RunConfig) -> float:
        remat = config.model.remat
        if remat not in self._operations:
            spec = dataclasses.replace(self._spec, config=config)
            counted = count_gradient_flops(spec, self._base.streams, self._batches, remat=True)
            self._operations[remat] = float(counted.total())
        return self._operations[remat]


def _tokens(config: RunConfig, name: str) -> float:
    """Tokens of a stream's batch in the tower where most of them are."""
    data = config.streams[name].data
    if data.kind == "text":
        return float(data.batch_size * data.examples.text_length)
    frames = data.visual.num_frames if data.kind == "video" else 1
    return float(data.batch_size * config.model.num_visual_tokens(frames, data.visual.image_size))


def search(
    config: RunConfig,
    topology: Topology,
    *,
    seconds: float,
    effort: float,
    say: Callable[[str], None],
    cache: Path | None = None,
) -> list[Tried]:
    """Compiles candidates until the time is up, the recipe's own first; returns them, the best first.

    Args:
        config: the run.
        topology: that it is for.
        seconds: after which no other compilation begins.
        effort: of the compiler.
        say: called with a line for every candidate.
        cache: folder of what was found of programs before, by their fingerprints.
    """
    start = time.monotonic()
    found = candidates(config, topology)
    say(f"{len(found)} candidates by the analytic model; compiling the most promising for {seconds / 60:.0f} minutes")
    tried: list[Tried] = []
    for number, candidate in enumerate(_spread(found), 1):
        spent = time.monotonic() - start
        if tried and spent + max(t.compile_seconds for t in tried) / 2 > seconds:
            break
        result = _try(candidate, topology, effort, cache)
        tried.append(result)
        best = min(tried, key=lambda t: t.score)
        say(
            f"{number:3}  {candidate}: {result.time}, {result.memory / 2**30:.1f} GiB"
            f"{' (cached)' if result.cached else f' ({result.compile_seconds:.0f} s)'}; "
            f"best {best.score * 1e3:,.0f} ms, {max(0.0, seconds - (time.monotonic() - start)) / 60:.0f} min left"
        )
    return sorted(tried, key=lambda t: (t.score, t.memory))


def _spread(found: Sequence[Candidate]) -> Iterator[Candidate]:
    """The recipe's own, then the fastest of each way to recompute and to gather in turn: a wrong guess costs little."""
    yield found[0]
    queues: dict[Any, list[Candidate]] = {}
    for candidate in found[1:]:
        queues.setdefault((candidate.config.model.remat, candidate.config.fsdp_gather), []).append(candidate)
    while queues:
        for key in list(queues):
            yield queues[key].pop(0)
            if not queues[key]:
                del queues[key]


def _try(candidate: Candidate, topology: Topology, effort: float, cache: Path | None) -> Tried:
    program = training_program(candidate.config, topology)
    kept = cache / f"{fingerprint(program)}{effort:+g}.json" if cache else None
    before = _remembered(candidate, kept)
    if before is not None:
        return before
    try:
        compiled = try_compile(program, effort)
    except jax.errors.JaxRuntimeError as error:  # one layout that the compiler refuses is no reason to give up the rest
        why = f"does not compile: {str(error).splitlines()[0][:80]}"
        return Tried(candidate, why, 0.0, (0.0, 0.0), 0.0, 0.0, 0.0, cached=False)
    if isinstance(compiled, Compiled):
        report = make_report(compiled, candidate.config)
        result = Tried(
            candidate, "", report.memory.peak, report.seconds, report.costs.overhead, report.timing.exposed_share,
            compiled.seconds, cached=False,
        )  # fmt: skip
    else:
        result = Tried(candidate, "does not fit", compiled.needed, (0.0, 0.0), 0.0, 0.0, 0.0, cached=False)
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        values = {f.name: getattr(result, f.name) for f in dataclasses.fields(result)}
        found = {k: v for k, v in values.items() if k not in ("candidate", "cached")}
        write_atomically(str(kept), json.dumps(found).encode())
    return result


def _remembered(candidate: Candidate, kept: Path | None) -> Tried | None:
    """What was found of a program before; None if nothing was, or the file is no longer what was written."""
    if kept is None:
        return None
    try:
        values = json.loads(kept.read_text())
        return Tried(candidate, cached=True, **{**values, "seconds": tuple(values["seconds"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None
