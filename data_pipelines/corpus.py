"""Plain text, tokenized once and cut into records of a fixed number of tokens, for text streams."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from array_record.python.array_record_module import ArrayRecordWriter

from data_pipelines.errors import DataError
from data_pipelines.record import Record
from data_pipelines.sources.array_record import SUFFIX, encode_record
from data_pipelines.sources.files import read_lines
from data_pipelines.storage.local_files import write_locally
from data_pipelines.storage.paths import check_can_write
from data_pipelines.tokenizers import Tokenizer, fingerprint

Progress = Callable[[int], None]


def chunk_corpus(
    files: Iterable[Path], tokenizer: Tokenizer, length: int, on_progress: Progress = lambda num_bytes: None
) -> Iterator[Record]:
    """Yield chunks ``[CLS] tokens [SEP]`` of ``length`` ids, contiguous; only the last may be shorter.

    Each line is tokenized as a whole, and lines are concatenated: a chunk may begin inside a line, and span files.
    ``on_progress`` is called with the number of bytes read so far.

    Raises:
        DataError: ``length`` is below 3, or a text is not UTF-8 (with its line).
    """
    capacity = length - 2
    if capacity < 1:
        raise DataError(f"the chunk length is {length}, expected at least 3 to hold [CLS], a token and [SEP]")
    name, number, pending = fingerprint(tokenizer), 0, list[int]()
    for line in read_lines(files, on_progress):
        pending += tokenizer.encode(line, None, add_sep=False)[1:]
        while len(pending) >= capacity:
            yield _chunk(number, pending[:capacity], tokenizer, name)
            number, pending = number + 1, pending[capacity:]
    if pending:
        yield _chunk(number, pending, tokenizer, name)


def write_corpus(
    files: Iterable[Path], tokenizer: Tokenizer, length: int, out: Path, on_progress: Progress = lambda num_bytes: None
) -> int:
    """Write the chunks of files as a new ArrayRecord file; return the number of records. See ``chunk_corpus``.

    Raises:
        DataError: the file exists, has another suffix, or the text is empty or cannot be read.
    """
    if out.suffix != SUFFIX or out.exists():
        raise DataError(f"{out} exists or does not end in {SUFFIX}; choose another name")
    check_can_write(out)
    count = 0
    with write_locally(str(out)) as temporary:
        writer = ArrayRecordWriter(temporary, "group_size:1,zstd")
        for record in chunk_corpus(files, tokenizer, length, on_progress):
            writer.write(encode_record(record))
            count += 1
        writer.close()
        if not count:
            raise DataError(f"{', '.join(map(str, files))}: found no text, expected lines of words")
    return count


def _chunk(number: int, tokens: list[int], tokenizer: Tokenizer, name: str) -> Record:
    return Record(str(number), tokens=(tokenizer.cls_id, *tokens, tokenizer.sep_id), tokenizer=name)
