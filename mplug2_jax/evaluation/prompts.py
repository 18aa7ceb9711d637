"""Prompts of zero-shot classification, as token ids."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from data_pipelines.tokenizers import Tokenizer
from mplug2_jax.errors import UserError
from mplug2_jax.evaluation.config import EvaluationConfig
from mplug2_jax.model.mplug2 import ModelDef
from mplug2_jax.tasks.base import Prompts, TaskContext
from mplug2_jax.tasks.table import TASKS


def add_prompts(
    context: TaskContext, config: EvaluationConfig, where: str, model_def: ModelDef, tokenizer: Tokenizer,
    predict_batch_size: int,
) -> TaskContext:  # fmt: skip
    """Add an evaluation's prompts, if its task has any, to the context, in batches of ``predict_batch_size``.

    Raises:
        UserError: prompts or class names that do not fit the task or the classes.
    """
    if TASKS[config.task].precompute is None:
        if config.prompts or config.class_names or config.prompt_pooling != "features":
            raise UserError(
                f"{where}.prompts, class_names and prompt_pooling are for the task 'zero_shot', not for '{config.task}'"
            )
        return context
    classes = config.data.examples.classes
    names = config.class_names or classes
    if len(names) != len(classes):
        raise UserError(f"{where}.class_names has {len(names)} names, expected one for each of {len(classes)} classes")
    max_length = model_def.config.max_positions
    prompts = encode_prompts(where, config.prompts, names, tokenizer, max_length, predict_batch_size)
    return dataclasses.replace(context, prompts=prompts._replace(pooling=config.prompt_pooling))


def encode_prompts(
    where: str, templates: Sequence[str], names: Sequence[str], tokenizer: Tokenizer, max_length: int,
    predict_batch_size: int,
) -> Prompts:  # fmt: skip
    """Encode every template with every class name.

    Args:
        where: the config's field of the evaluation, for errors.
        templates: with ``{label}`` in place of a class name.
        names: of the classes.
        tokenizer: of the run.
        max_length: of a text, in tokens.
        predict_batch_size: texts of a batch; the last batch is padded.

    Raises:
        UserError: no templates, a template without ``{label}``, or with other braces.
    """
    if not templates:
        raise UserError(f"{where}.prompts is empty: task 'zero_shot' needs texts, as ('a picture of a {{label}}',)")
    for template in templates:
        if "{label}" not in template:
            raise UserError(f"{where}.prompts: {template!r} is the same for every class; add {{label}}")
    try:
        texts = [template.format(label=name) for name in names for template in templates]
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(f"{where}.prompts: a template is invalid ({error}); the only field is {{label}}") from error
    encoded = [tokenizer.encode(text, max_length=max_length) for text in texts]
    num_texts = -(-len(encoded) // predict_batch_size) * predict_batch_size
    ids = np.zeros((num_texts, max(map(len, encoded))), np.int32)  # 0 is every tokenizer's pad
    for row, text in zip(ids, encoded, strict=False):
        row[: len(text)] = text
    return Prompts(ids.reshape(-1, predict_batch_size, ids.shape[1]), len(names), len(templates))
