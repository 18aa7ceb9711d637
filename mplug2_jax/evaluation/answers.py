"""A list of all answers that may be given, from a file to the token ids that a search is held to."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int

from data_pipelines.config import ExampleConfig
from data_pipelines.errors import DataError
from data_pipelines.examples import Example, answer_ids
from data_pipelines.record import clean_text
from data_pipelines.tokenizers import Tokenizer
from mplug2_jax.errors import UserError
from mplug2_jax.generation.config import SearchConfig
from mplug2_jax.generation.constrained import ANSWER_PAD


def unreachable_answers_warning(
    examples: Sequence[Example], answers: Int[np.ndarray, "a m"], decode: Callable[[Sequence[int]], str],
    alike: Callable[[str], str],
) -> str:  # fmt: skip
    """A sentence about the examples none of whose right answers is listed; nothing where there are none.

    ``alike`` makes equal what the score takes for equal.
    """
    listed = {alike(decode(row[row != ANSWER_PAD].tolist())) for row in answers}
    missed = [example for example in examples if not any(alike(answer) in listed for answer in example.answers)]
    if not missed:
        return ""
    first = missed[0]
    return (
        f"{len(missed)} of {len(examples)} examples can never be right: no answer of theirs is listed, the first is "
        f"{first.answers[0]!r} of {first.key}"
    )


def read_answers(
    path: Path, where: str, examples: ExampleConfig, tokenizer: Tokenizer, search: SearchConfig | None, positions: int
) -> Int[np.ndarray, "a m"]:
    """The answers of a JSON list, or of an object with their numbers, each as what follows the begin token to its end.

    A blank answer is one, as some annotators gave none.

    Args:
        path: the file.
        where: the config's field that names it, for errors.
        examples: how the evaluation makes its targets.
        tokenizer: the run's.
        search: that will be held to them; None: they are ranked.
        positions: of the decoder's table.

    Raises:
        UserError: no such file, none or other than a list of words, an answer that no search of this length finds, or a
            search that a list cannot hold.
    """
    for option in ("extend_finished", "top_p"):
        if search is not None and getattr(search, option):
            raise UserError(f"{where}={path}: a list of answers needs a plain search, not config.tasks.search.{option}")
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{where}={path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}={path} is not JSON: {error}; expected a list of answers") from error
    if isinstance(listed, dict) and all(type(number) is int for number in listed.values()):
        listed = sorted(listed, key=listed.__getitem__)  # answers and their numbers
    if not isinstance(listed, list) or not listed:
        raise UserError(f'{where}={path} should be a list of answers, as ["yes", "no"], and not an empty one')
    for i, answer in enumerate(listed):
        if type(answer) is not int and not isinstance(answer, str):
            raise UserError(f'{where}={path}: entry {i} is {answer!r}; expected a list of answers, as ["yes", "no"]')
    try:
        listed = [clean_text(str(answer)) for answer in listed]
    except DataError as error:
        raise UserError(f"{where}={path}: {error}") from error
    rows = {tuple(answer_ids(answer, examples, tokenizer)[1:]): answer for answer in listed}
    longest = max(rows, key=len)
    if search is not None and len(longest) > search.max_length:
        raise UserError(
            f"{where}={path}: {rows[longest]!r} has {len(longest)} tokens with its end, and "
            f"config.tasks.search.max_length={search.max_length}; set that to {len(longest)}, or leave the answer out"
        )
    if len(longest) >= positions:
        raise UserError(
            f"{where}={path}: {rows[longest]!r} has {len(longest) + 1} tokens with its begin and end, and "
            f"config.model.max_positions={positions}; leave the answer out"
        )
    table = np.full((len(rows), search.max_length if search is not None else len(longest)), ANSWER_PAD, np.int32)
    for line, ids in zip(table, rows, strict=True):
        line[: len(ids)] = ids
    return table
