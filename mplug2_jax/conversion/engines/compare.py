"""Compare an engine with our model: the memory, and the logits of every token from a cache and from the whole text."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mplug2_jax.conversion.engines.programs import Program
from mplug2_jax.conversion.export_plan import EXPORT_DTYPES
from mplug2_jax.conversion.files.sources import HostArray
from mplug2_jax.conversion.report import Comparison
from mplug2_jax.conversion.tolerance import max_errors
from mplug2_jax.model.config import ModelConfig
from mplug2_jax.model.mplug2 import Params, define_model
from mplug2_jax.objectives.forward import ForwardPass

TOLERANCES = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}
"""By dtype, relative to the largest magnitude of an array."""

_BATCH, _BEAMS, _LENGTH = 2, 3, 4

Engine = Mapping[str, Callable[[Mapping[str, HostArray]], Mapping[str, HostArray]]]
"""The programs by name, as functions of arrays by name."""


def compare_engine(
    engine: Engine, programs: Mapping[str, Program], params: Params, config: ModelConfig, parts: tuple[str, ...],
    dtype: str,
) -> list[Comparison]:  # fmt: skip
    """Run random inputs through an engine and through our model, which computes in float32.

    Our model reads whole texts, so this also checks the engine's cache.
    """
    rng = np.random.default_rng(0)
    length = min(_LENGTH, config.max_positions)
    sizes = {"batch": _BATCH, "beams": _BEAMS, "length": length, "question": length}
    inputs: dict[str, HostArray] = {}
    for name, spec in programs["encode"].inputs.items():
        high = {"uint8": 256, "int32": config.vocab_size, "bool": 2}[spec.dtype]
        inputs[name] = rng.integers(0, high, spec.with_sizes(sizes)).astype(spec.dtype)
    if "question_mask" in inputs:
        inputs["question_mask"] = np.arange(length) < np.array([[length], [max(1, length // 2)]])
    tokens = rng.integers(1, config.vocab_size, (_BATCH, _BEAMS, length), np.int32)

    found = _run_engine(engine, programs, inputs, tokens, sizes)
    expected = _run_ours(params, config, parts, inputs, tokens)
    rows = []
    for name, value in expected.items():
        absolute, relative = max_errors(found[name], value)
        passed = found[name].shape == value.shape and relative <= TOLERANCES[dtype]
        program = "encode" if name in programs["encode"].outputs else "decode_step"
        rows.append(Comparison(program, name, value.shape, absolute, relative, passed))
    return rows


def _run_engine(
    engine: Engine, programs: Mapping[str, Program], inputs: Mapping[str, HostArray], tokens: HostArray,
    sizes: Mapping[str, int],
) -> dict[str, HostArray]:  # fmt: skip
    encoded = dict(engine["encode"](inputs))
    memory = {name: value for name, value in encoded.items() if name in programs["decode_step"].inputs}
    spec = programs["decode_step"].inputs["past_keys"]
    keys = values = np.zeros(spec.with_sizes(sizes), EXPORT_DTYPES[spec.dtype])
    logits = []
    for position in range(tokens.shape[-1]):
        step = {"tokens": tokens[..., position], "position": np.array(position, np.int32)}
        out = engine["decode_step"](memory | step | {"past_keys": keys, "past_values": values})
        keys, values = out["keys"], out["values"]
        logits.append(out["logits"])
    return {name: encoded[name] for name in ("memory", "memory_mask")} | {"logits": np.stack(logits, axis=2)}


def _run_ours(
    params: Params, config: ModelConfig, parts: tuple[str, ...], inputs: Mapping[str, HostArray], tokens: HostArray
) -> dict[str, HostArray]:
    exact = dataclasses.replace(config, dtype="float32", attention="xla", matmul_precision="highest")
    model_def = define_model(exact, parts)

    @jax.jit
    @model_def.with_precision
    def run(params: Params, batch: Any, ids: Any) -> Any:
        model = model_def.bind(params)
        memory, mask = ForwardPass(model, batch).caption_memory
        logits = model.decoder(ids.reshape(-1, ids.shape[-1]), None, memory, mask)
        return {"memory": memory, "memory_mask": mask, "logits": logits.reshape(*ids.shape, -1)}

    names = {"question": "instruction", "question_mask": "instruction_mask"}
    batch = {names.get(name, name): jnp.asarray(value) for name, value in inputs.items()}
    on_device = jax.tree.map(jnp.asarray, params)
    return {name: np.asarray(value) for name, value in run(on_device, batch, jnp.asarray(tokens)).items()}
