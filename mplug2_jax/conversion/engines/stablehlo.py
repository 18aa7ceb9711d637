"""Export our model's programs as StableHLO, serialized by ``jax.export``, which any later JAX loads for half a year.

A program takes the weights, a dict from name to array as in ``model.safetensors``, and a dict of inputs; it returns a
dict of outputs. It holds no kernel of one platform, so it runs on CPUs, GPUs and TPUs.
"""

import dataclasses
import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import export as jax_export
from jaxtyping import Array
from safetensors.numpy import load_file

from mplug2_jax.conversion.engines.programs import Program
from mplug2_jax.conversion.export_plan import EXPORT_DTYPES
from mplug2_jax.conversion.files.safetensors_writer import SafetensorsWriter
from mplug2_jax.conversion.files.sources import HostArray, TensorInfo
from mplug2_jax.errors import UserError
from mplug2_jax.model.config import ModelConfig
from mplug2_jax.model.decoder import DecoderCache
from mplug2_jax.model.mplug2 import ModelDef, Mplug2, Params, define_model
from mplug2_jax.objectives.forward import ForwardPass

PLATFORMS = ("cpu", "cuda", "tpu")
WEIGHTS = "model.safetensors"
DTYPES = ("float32", "bfloat16")

Arrays = dict[str, Array]


def check_packages() -> None:
    """Raise UserError if what serializes a program is not installed."""
    if importlib.util.find_spec("flatbuffers") is None:
        raise UserError("--format stablehlo needs the package flatbuffers: pip install 'mplug2-jax[stablehlo]'")


def export_stablehlo(
    params: Params, config: ModelConfig, parts: tuple[str, ...], programs: Mapping[str, Program], folder: Path, *,
    dtype: str,
) -> None:  # fmt: skip
    """Write ``encode.stablehlo``, ``decode_step.stablehlo`` and the weights, which both take.

    Args:
        params: our parameters, on the host.
        config: the model's sizes.
        parts: of the model.
        programs: their inputs and outputs.
        folder: to write to.
        dtype: of the weights and of what is computed; norms, softmax and logits are float32.
    """
    numerics = {"dtype": dtype, "matmul_precision": "highest" if dtype == "float32" else "default"}
    config = dataclasses.replace(config, attention="xla", **numerics)  # type: ignore[arg-type]  # they are checked
    model_def = define_model(config, parts)
    weights = {name: np.asarray(value, EXPORT_DTYPES[dtype]) for name, value in flatten_dict(params, sep="/").items()}
    writer = SafetensorsWriter(folder / WEIGHTS, {n: TensorInfo(x.shape, x.dtype) for n, x in weights.items()})
    for name, value in weights.items():
        writer.write(name, value)
    writer.close()
    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in weights.items()}
    for name, function in (("encode", encode), ("decode_step", decode_step)):
        exported = _export(model_def, function, shapes, programs[name])
        (folder / f"{name}.stablehlo").write_bytes(exported.serialize())


def _export(
    model_def: ModelDef, function: Callable[[Mplug2, Arrays], Arrays], weights: Mapping[str, Any], program: Program
) -> jax_export.Exported:
    @jax.jit
    @model_def.with_precision
    def run(weights: Arrays, inputs: Arrays) -> Arrays:
        return function(model_def.bind(unflatten_dict(weights, sep="/")), inputs)

    bounded = {"question", "length"} & {size for spec in program.inputs.values() for size in spec.shape}
    scope = jax_export.SymbolicScope([f"{axis} <= {model_def.config.max_positions}" for axis in sorted(bounded)])

    def symbolic(size: int | str) -> Any:
        return jax_export.symbolic_shape(size, scope=scope)[0] if isinstance(size, str) else size

    inputs = {
        name: jax.ShapeDtypeStruct(tuple(map(symbolic, spec.shape)), spec.dtype)
        for name, spec in program.inputs.items()
    }
    return jax_export.export(run, platforms=PLATFORMS)(dict(weights), inputs)


def encode(model: Mplug2, inputs: Arrays) -> Arrays:
    """Return the decoder's memory, and its keys and values in every layer."""
    names = {"question": "instruction", "question_mask": "instruction_mask"}
    forward = ForwardPass(model, {names.get(name, name): value for name, value in inputs.items()})
    memory, mask = forward.caption_memory
    cache = model.decoder.init_cache(memory, mask, num_sequences=1, length=1)
    keys, values = (x.swapaxes(2, 3) for x in (cache.cross_keys, cache.cross_values))
    return {"memory": memory, "memory_keys": keys, "memory_values": values, "memory_mask": mask}


def decode_step(model: Mplug2, inputs: Arrays) -> Arrays:
    """Return the logits for the next token of every sequence, and the cache with the keys and values of this one."""
    tokens, past = inputs["tokens"], inputs["past_keys"]
    layers, batch, beams, heads, length, width = past.shape
    rows = (layers, batch * beams, heads, length, width)
    keys, values = (inputs[name].reshape(rows).swapaxes(2, 3) for name in ("past_keys", "past_values"))
    memory_keys, memory_values = (inputs[name].swapaxes(2, 3) for name in ("memory_keys", "memory_values"))
    cache = DecoderCache(keys, values, memory_keys, memory_values, inputs["memory_mask"])
    logits, cache = model.decoder.decode_step(tokens.reshape(-1), inputs["position"], cache)
    keys, values = (x.swapaxes(2, 3).reshape(past.shape) for x in (cache.self_keys, cache.self_values))
    return {"logits": logits.reshape(*tokens.shape, -1), "keys": keys, "values": values}


def load_stablehlo(folder: Path) -> dict[str, Callable[[Mapping[str, HostArray]], dict[str, HostArray]]]:
    """Return the programs of a folder as functions of arrays by name."""
    weights = jax.device_put(load_file(folder / WEIGHTS))

    def load(name: str) -> Callable[[Mapping[str, HostArray]], dict[str, HostArray]]:
        call = jax.jit(jax_export.deserialize(bytearray((folder / f"{name}.stablehlo").read_bytes())).call)

        def run(inputs: Mapping[str, HostArray]) -> dict[str, HostArray]:
            outputs = call(weights, {name: jnp.asarray(value) for name, value in inputs.items()})
            return {name: np.asarray(value) for name, value in outputs.items()}

        return run

    return {name: load(name) for name in ("encode", "decode_step")}
