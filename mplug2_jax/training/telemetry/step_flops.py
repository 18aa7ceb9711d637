"""Floating-point operations of a train step, counted from its trace: frozen weights need no gradient."""

import collections
import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from mplug2_jax.model.config import RematConfig
from mplug2_jax.model.mplug2 import define_model
from mplug2_jax.model.prng import random_key
from mplug2_jax.objectives.group_gather import GATHER_SCOPE
from mplug2_jax.training.config import RunConfig, StreamConfig
from mplug2_jax.training.optim.partition import combine, partition
from mplug2_jax.training.state import RunSpec
from mplug2_jax.training.step import streams_loss
from mplug2_jax.training.telemetry.flops import count_flops, count_jaxpr_flops


def count_gradient_flops(
    spec: RunSpec, streams: Mapping[str, StreamConfig], batches: Mapping[str, Any], *, remat: bool
) -> collections.Counter[str]:
    """Return the operations of some streams' loss and gradient by outermost scope.

    Sampled captions count as if each had the maximum length.

    Args:
        spec: the run.
        streams: whose losses count.
        batches: of the streams; may be abstract.
        remat: whether to count the run's recomputation.
    """
    config: RunConfig = spec.config
    model = dataclasses.replace(config.model, attention="xla", remat=config.model.remat if remat else RematConfig())
    config = dataclasses.replace(config, model=model, streams=streams)
    xla_spec = dataclasses.replace(spec, config=config, model_def=define_model(model, spec.model_def.parts))

    def loss(trained: Any, frozen: Any, state: Any, batches: Any, alpha: Any) -> Any:
        params, queues, frequencies = combine(trained, frozen), state.get("queues", {}), state.get("frequencies")
        return streams_loss(xla_spec, params, state.get("teacher"), queues, batches, random_key(0), alpha, frequencies)

    state, batches = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (spec.shapes, dict(batches)))
    trained, frozen = partition(state["params"], config.frozen)
    state = {name: state[name] for name in ("teacher", "queues", "frequencies") if name in state}
    alpha = jax.ShapeDtypeStruct((), jnp.float32)
    flops = count_flops(
        jax.value_and_grad(loss, has_aux=True), trained, frozen, state, batches, alpha,
        trip_count=_max_sampling_steps(streams),
    )  # fmt: skip
    del flops[GATHER_SCOPE]
    return flops


def count_traced_step_flops(spec: RunSpec, jaxpr: Any) -> collections.Counter[str] | None:
    """Count the operations of a step from its own trace, which saves tracing its gradient a second time.

    Returns:
        Operations by outermost scope; None if the trace has other matmuls than the gradient needs, because it
        recomputes some, hides some in kernels, or holds those of one device.
    """
    model, sizes = spec.config.model, spec.mesh.shape
    uses_xla = model.attention == "xla" or (model.attention == "auto" and spec.mesh.devices.flat[0].platform == "cpu")
    if not uses_xla or model.remat != RematConfig() or sizes["sequence"] > 1:
        return None
    flops = count_jaxpr_flops(jaxpr, trip_count=_max_sampling_steps(spec.config.streams))
    del flops["optimizer"], flops[GATHER_SCOPE]  # Muon's products are not part of the gradient
    return flops


def _max_sampling_steps(streams: Mapping[str, StreamConfig]) -> int:
    """Return the most tokens that the loop that samples captions can generate."""
    return max([1, *(stream.data.examples.target_length - 1 for stream in streams.values())])
