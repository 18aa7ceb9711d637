"""Export the programs as ONNX, from the PyTorch runtime; a file above 1.5 GB has its weights next to it."""

import importlib.util
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from mplug2_jax.conversion.engines.programs import Program
from mplug2_jax.conversion.files.sources import HostArray
from mplug2_jax.errors import UserError

DTYPES = ("float32", "float16")


def check_packages() -> None:
    """Raise UserError if a package is not installed that exports, or runs the result."""
    needed = ("torch", "onnx", "onnxscript", "onnxruntime")
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        raise UserError(f"--format onnx needs the package {missing[0]}: pip install 'mplug2-jax[onnx]'")


def export_onnx(weights: Path, task: str, programs: Mapping[str, Program], folder: Path, *, dtype: str) -> None:
    """Write ``encode.onnx`` and ``decode_step.onnx``.

    Args:
        weights: an official state dict in float32, with ``config.json`` next to it.
        task: "caption" or "videoqa".
        programs: their inputs and outputs.
        folder: to write to.
        dtype: of the weights and of what is computed.
    """
    import torch

    from mplug2_jax.conversion.exported.model import KINDS
    from mplug2_jax.conversion.torch_runtime.decoder import DecodeStep
    from mplug2_jax.conversion.torch_runtime.model import Encode

    model = KINDS[task].from_pretrained(weights).to(getattr(torch, dtype))
    modules = {"encode": Encode(model), "decode_step": DecodeStep(model.text_decoder)}
    for name, module in modules.items():
        program = programs[name]
        # Any sizes above 1 that differ: equal ones would be taken for the same axis.
        sizes = {"batch": 2, "question": 3, "beams": 4, "length": 5, "memory": 6}
        inputs = {
            name: torch.zeros(spec.with_sizes(sizes), dtype=getattr(torch, spec.dtype))
            for name, spec in program.inputs.items()
        }
        axes = {
            name: {i: size for i, size in enumerate(spec.shape) if isinstance(size, str)}
            for name, spec in program.inputs.items()
        }
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of PyTorch about itself
            exported = torch.onnx.export(
                module.eval(), kwargs=inputs, input_names=list(program.inputs), output_names=list(program.outputs),
                dynamic_shapes=axes, dynamo=True, verbose=False,
            )  # fmt: skip
        assert exported is not None
        exported.save(folder / f"{name}.onnx")


def load_onnx(folder: Path) -> dict[str, Callable[[Mapping[str, HostArray]], dict[str, HostArray]]]:
    """Return the programs of a folder, in ONNX Runtime, as functions of arrays by name."""
    import onnxruntime

    def load(name: str) -> Callable[[Mapping[str, HostArray]], dict[str, HostArray]]:
        session = onnxruntime.InferenceSession(folder / f"{name}.onnx", providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        return lambda inputs: dict(zip(names, map(np.asarray, session.run(names, dict(inputs))), strict=True))

    return {name: load(name) for name in ("encode", "decode_step")}
