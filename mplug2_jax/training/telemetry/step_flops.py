"""What the gradient of a step computes, counted from its trace: frozen weights have none of their own."""

import collections
import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from mplug2_jax.model.config import RematConfig
from mplug2_jax.model.mplug2 import define_model
from mplug2_jax.model.prng import random_key
from mplug2_jax.training.config import RunConfig, StreamConfig
from mplug2_jax.training.optim.partition import combine, partition
from mplug2_jax.training.state import RunSpec
from mplug2_jax.training.step import streams_loss
from mplug2_jax.training.telemetry.flops import count_flops, count_jaxpr_flops


def gradient_flops(
    spec: RunSpec, streams: Mapping[str, StreamConfig], batches: Mapping[str, Any], *, remat: bool
) -> collections.Counter[str]:
    """Operations of some streams' loss and gradient by outermost scope, with or without the run's recomputation.

    Captions that are drawn count as if each were as long as there is room for.
    """
    config: RunConfig = spec.config
    model = dataclasses.replace(config.model, attention="xla", remat=config.model.remat if remat else RematConfig())
    config = dataclasses.replace(config, model=model, streams=streams)
    plain = dataclasses.replace(spec, config=config, definition=define_model(model, spec.definition.parts))

    def loss(trained: Any, frozen: Any, state: Any, batches: Any, alpha: Any) -> Any:
        params, queues, frequencies = combine(trained, frozen), state.get("queues", {}), state.get("frequencies")
        return streams_loss(plain, params, state.get("teacher"), queues, batches, random_key(0), alpha, frequencies)

    whole = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (spec.shapes, dict(batches)))
    state, batches = whole
    trained, frozen = partition(state["params"], config.frozen)
    state = {name: state[name] for name in ("teacher", "queues", "frequencies") if name in state}
    alpha = jax.ShapeDtypeStruct((), jnp.float32)
    return count_flops(
        jax.value_and_grad(loss, has_aux=True), trained, frozen, state, batches, alpha, turns=_turns(streams)
    )


def flops_of_step(spec: RunSpec, jaxpr: Any) -> collections.Counter[str] | None:
    """Count a step's operations from the step's own trace, which spares tracing its gradient a second time.

    Returns:
        Operations by outermost scope; None where the trace holds other matmuls than the gradient needs: it recomputes
        some, hides some in kernels, or holds one device's part of them.
    """
    model, sizes = spec.config.model, spec.mesh.shape
    plain = model.attention == "xla" or (model.attention == "auto" and spec.mesh.devices.flat[0].platform == "cpu")
    if not plain or model.remat != RematConfig() or sizes["sequence"] > 1:
        return None
    return count_jaxpr_flops(jaxpr, turns=_turns(spec.config.streams))


def _turns(streams: Mapping[str, StreamConfig]) -> int:
    """How often the loop that draws captions may run."""
    return max([1, *(stream.data.examples.target_length - 1 for stream in streams.values())])
