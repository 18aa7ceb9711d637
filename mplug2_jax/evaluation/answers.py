"""A list of valid answers: from a file to the token ids that a search is constrained to."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int

from data_pipelines.config import ExampleConfig
from data_pipelines.errors import DataError
from data_pipelines.examples import Example, encode_answer
from data_pipelines.record import clean_text
from data_pipelines.storage.paths import to_path
from data_pipelines.tokenizers import Tokenizer
from mplug2_jax.errors import UserError, check_range
from mplug2_jax.evaluation.config import EvaluationConfig
from mplug2_jax.generation.config import SearchConfig
from mplug2_jax.generation.constrained import ANSWER_PAD
from mplug2_jax.model.mplug2 import ModelDef
from mplug2_jax.tasks.base import TaskContext


def add_answers(
    context: TaskContext, config: EvaluationConfig, where: str, model_def: ModelDef, tokenizer: Tokenizer
) -> TaskContext:
    """Add an evaluation's list of answers, if it has one, to the context. Raises UserError if they do not fit."""
    check_range(f"{where}.num_ranked", config.num_ranked, 0)
    if config.num_ranked and not config.answers_file:
        raise UserError(f"{where}.num_ranked={config.num_ranked} needs a list of answers: set {where}.answers_file")
    if not config.answers_file:
        return context
    if config.task not in ("answer", "vqa"):
        raise UserError(f"{where}.answers_file is for the tasks 'answer' and 'vqa', not for '{config.task}': remove it")
    data, max_positions = config.data.examples, model_def.config.max_positions
    search = None if config.num_ranked else context.config.search
    path = to_path(config.answers_file)
    answers = read_answers(path, f"{where}.answers_file", data, tokenizer, search, max_positions)
    return dataclasses.replace(
        context, answers=answers, num_ranked=config.num_ranked,
        double_count_first_token=data.tokenization == "released",
    )  # fmt: skip


def unreachable_answers_warning(
    examples: Sequence[Example], answers: Int[np.ndarray, "a m"], decode: Callable[[Sequence[int]], str],
    normalize: Callable[[str], str],
) -> tuple[str, ...]:  # fmt: skip
    """Return a warning about examples without any reference in the list of answers, if there are any.

    ``normalize`` maps texts that the score treats as equal to the same text.
    """
    reachable = {normalize(decode(row[row != ANSWER_PAD].tolist())) for row in answers}
    missed = [example for example in examples if not any(normalize(text) in reachable for text in example.answers)]
    if not missed:
        return ()
    count, first = f"{len(missed)} of {len(examples)} examples", missed[0]
    return (f"{count} have no reference in the list of answers, first {first.answers[0]!r} of {first.key}",)


def read_answers(
    path: Path, where: str, examples: ExampleConfig, tokenizer: Tokenizer, search: SearchConfig | None,
    max_positions: int,
) -> Int[np.ndarray, "a m"]:  # fmt: skip
    """Read answers from a JSON list, or an object of answers and their numbers; return the ids after the begin token.

    A blank text is an answer too: some annotators gave none.

    Args:
        path: of the file.
        where: the config's field that names it, for errors.
        examples: how the evaluation encodes its targets.
        tokenizer: of the run.
        search: constrained to the answers; None if they are ranked.
        max_positions: of the decoder.

    Returns:
        One row per distinct answer, padded with ``ANSWER_PAD``.

    Raises:
        UserError: no such file, not a list of texts, a too long answer, or a search that cannot be constrained.
    """
    for option in ("extend_finished", "top_p"):
        if search is not None and getattr(search, option):
            raise UserError(f"{where}={path}: a list of answers cannot be combined with config.tasks.search.{option}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{where}={path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}={path} is not JSON: {error}; expected a list of answers") from error
    if isinstance(content, dict) and all(type(number) is int for number in content.values()):
        content = sorted(content, key=content.__getitem__)  # in the order of the numbers
    if not isinstance(content, list) or not content:
        raise UserError(f'{where}={path} is empty or not a list; expected answers, as ["yes", "no"]')
    for i, answer in enumerate(content):
        if type(answer) is not int and not isinstance(answer, str):
            raise UserError(f'{where}={path}: entry {i} is {answer!r}; expected answers, as ["yes", "no"]')
    try:
        texts = [clean_text(str(answer)) for answer in content]
    except DataError as error:
        raise UserError(f"{where}={path}: {error}") from error
    rows = {tuple(encode_answer(answer, examples, tokenizer)[1:]): answer for answer in texts}
    longest = max(rows, key=len)
    if search is not None and len(longest) > search.max_length:
        raise UserError(
            f"{where}={path}: {rows[longest]!r} has {len(longest)} tokens with its end token, but "
            f"config.tasks.search.max_length={search.max_length}; set that to {len(longest)}, or remove the answer"
        )
    if len(longest) >= max_positions:
        raise UserError(
            f"{where}={path}: {rows[longest]!r} has {len(longest) + 1} tokens with its begin and end tokens, but "
            f"config.model.max_positions={max_positions}; remove the answer"
        )
    table = np.full((len(rows), search.max_length if search is not None else len(longest)), ANSWER_PAD, np.int32)
    for line, ids in zip(table, rows, strict=True):
        line[: len(ids)] = ids
    return table
