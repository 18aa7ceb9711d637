"""Texts that stand for classes, as token ids."""

from collections.abc import Sequence

import numpy as np

from data_pipelines.tokenizers import Tokenizer
from mplug2_jax.errors import UserError
from mplug2_jax.tasks.base import Prompts


def encode_prompts(
    where: str, templates: Sequence[str], names: Sequence[str], tokenizer: Tokenizer, length: int, rows: int
) -> Prompts:
    """Every template with each name in its braces.

    Args:
        where: the config's field of the evaluation, for errors.
        templates: with ``{label}`` where a class's name belongs.
        names: what the classes are called.
        tokenizer: the run's.
        length: room for a text, in tokens.
        rows: texts of a batch; the last is filled up.

    Raises:
        UserError: no templates, one that does not name its class, or that has other braces.
    """
    if not templates:
        raise UserError(f"{where}.prompts is empty: task 'zero_shot' needs texts, as ('a picture of a {{label}}',)")
    for template in templates:
        if "{label}" not in template:
            raise UserError(f"{where}.prompts: {template!r} says the same of every class; write {{label}} into it")
    try:
        texts = [template.format(label=name) for name in names for template in templates]
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(f"{where}.prompts: a template fails ({error}); valid braces: {{label}}") from error
    encoded = [tokenizer.encode(text, max_length=length) for text in texts]
    ids = np.zeros((-(-len(encoded) // rows) * rows, max(map(len, encoded))), np.int32)  # 0 is every tokeniser's pad
    for row, text in zip(ids, encoded, strict=False):
        row[: len(text)] = text
    return Prompts(ids.reshape(-1, rows, ids.shape[1]), len(names), len(templates))
