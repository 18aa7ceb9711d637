"""Export a run for another engine: a folder with the programs, the tokenizer, and ``engine.json``."""

import dataclasses
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from mplug2_jax.conversion.engines import onnx, stablehlo
from mplug2_jax.conversion.engines.compare import compare_engine
from mplug2_jax.conversion.engines.programs import Program, define_programs
from mplug2_jax.conversion.export_plan import ExportPlan, plan_export
from mplug2_jax.conversion.export_weights import TORCH_SUFFIXES, write_state
from mplug2_jax.conversion.files.atomic import atomic_folder, check_free_space, check_not_existing
from mplug2_jax.conversion.hub import WEIGHTS, write_config_and_tokenizer
from mplug2_jax.conversion.layouts import official
from mplug2_jax.conversion.report import Comparison, summarize_comparisons
from mplug2_jax.conversion.runtime_files import inference_settings
from mplug2_jax.errors import UserError, check_range
from mplug2_jax.model.mplug2 import Params, define_model
from mplug2_jax.training.workdir import check_vocabulary, special_tokens

Format = Literal["onnx", "stablehlo"]
DESCRIPTION = "engine.json"
FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True)
class EngineReport:
    """The exported programs, and the comparisons of their outputs with our model's; None if not requested."""

    title: str
    programs: dict[str, Program]
    comparisons: Sequence[Comparison] | None

    @property
    def status(self) -> int:
        """Return the exit status: 1 if an array differs from our model's."""
        return int(any(not comparison.passed for comparison in self.comparisons or ()))

    def summary(self) -> str:
        """Return the programs and the largest difference, in a few lines."""
        lines = [f"export: {self.title}"]
        for name, program in self.programs.items():
            lines.append(f"  {name}: {', '.join(program.inputs)} -> {', '.join(program.outputs)}")
        if self.comparisons is not None:
            lines.append(f"  compared with our model: {summarize_comparisons(self.comparisons)}")
        return "\n".join(lines)


def export_engine(
    checkpoint: Path, to: Path, format: Format, *, dtype: str = "float32", ema: bool | None = None,
    frames: int | None = None, overwrite: bool = False, verify: bool = False,
) -> EngineReport:  # fmt: skip
    """Write a new folder with the programs of a run's model.

    Args:
        checkpoint: see :func:`~mplug2_jax.conversion.export_plan.plan_export`.
        to: the folder.
        format: of the programs.
        dtype: of weights and computation.
        ema: see :func:`~mplug2_jax.conversion.export_plan.plan_export`.
        frames: of a clip, 1 for images (default: as the run reads clips).
        overwrite: replace what exists.
        verify: compare with our model on random inputs.

    Raises:
        UserError: as :func:`~mplug2_jax.conversion.export_plan.plan_export`; a package is missing, the run has no
            tokenizer, the dtype is not one of the format's, or the output is a file or exists.
    """
    engine = {"onnx": onnx, "stablehlo": stablehlo}[format]
    if dtype not in engine.DTYPES:
        raise UserError(f"--dtype={dtype} does not fit --format {format}; expected {' or '.join(engine.DTYPES)}")
    if to.suffix in (".safetensors", *TORCH_SUFFIXES, ".onnx", ".stablehlo"):
        raise UserError(f"--to {to} names a file, but --format {format} writes a folder; give the path of a new one")
    check_range("--frames", frames, 1)
    check_not_existing(to, overwrite=overwrite)
    engine.check_packages()
    plan = plan_export(checkpoint, ema=ema, teacher=False)
    settings = _describe(plan, frames)
    programs = define_programs(
        plan.model.config, frames=settings["visual"]["num_frames"], question=plan.task == "videoqa", dtype=dtype
    )
    check_free_space(to, 3 * plan.nbytes)  # the programs share weights, and ONNX is written from a state dict
    with atomic_folder(to, overwrite=overwrite) as folder:
        write_config_and_tokenizer(plan, folder)
        parts = official.TASK_PARTS[plan.task]
        params: Params = {}  # read where they are used
        if format == "stablehlo" or verify:
            shapes = define_model(plan.model.config, parts).shapes
            params, _ = plan.checkpoints.restore_params(shapes, plan.step, tree=plan.tree)
        if format == "onnx":
            with tempfile.TemporaryDirectory(dir=folder) as state:
                write_config_and_tokenizer(plan, Path(state))
                write_state(plan, Path(state) / WEIGHTS, plan.nbytes)
                onnx.export_onnx(Path(state) / WEIGHTS, plan.task, programs, folder, dtype=dtype)
        else:
            stablehlo.export_stablehlo(params, plan.model.config, parts, programs, folder, dtype=dtype)
        content: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "format": format,
            "dtype": dtype,
            "task": plan.task,
        }
        content |= {"programs": {name: _describe_program(program) for name, program in programs.items()}, **settings}
        (folder / DESCRIPTION).write_text(json.dumps(content, indent=1), encoding="utf-8")
        comparisons = None
        if verify:
            loaded = onnx.load_onnx(folder) if format == "onnx" else stablehlo.load_stablehlo(folder)
            comparisons = compare_engine(loaded, programs, params, plan.model.config, parts, dtype)
    averaged = ", averaged weights" if plan.tree != "params" else ""
    return EngineReport(f"{plan.task} as {format} in {dtype}{averaged}", programs, comparisons)


def _describe(plan: ExportPlan, frames: int | None) -> dict[str, Any]:
    """Return what an engine needs besides the programs: special tokens, and how the run reads files and searches."""
    tokenizer = plan.tokenizer
    if tokenizer is None:
        raise UserError(
            f"{plan.workdir.path} has no tokenizer, which the engine needs for its special tokens; import the weights "
            "with --tokenizer"
        )
    check_vocabulary(tokenizer, plan.model.config)
    settings = inference_settings(plan.workdir.read_config())
    if frames:
        settings["visual"]["num_frames"] = frames
    tokens = special_tokens(tokenizer)
    return {"tokens": {"pad": tokens.pad, "begin": tokens.begin, "end": tokens.end}, **settings}


def _describe_program(program: Program) -> dict[str, Any]:
    return {
        kind: {name: spec._asdict() for name, spec in getattr(program, kind).items()} for kind in ("inputs", "outputs")
    }
