"""Plain text cut once into records of a fixed number of tokens, for the stream of text."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from array_record.python.array_record_module import ArrayRecordWriter

from data_pipelines.errors import DataError
from data_pipelines.record import Record
from data_pipelines.sources.array_record import SUFFIX, encode_record
from data_pipelines.tokenizers import Tokenizer, fingerprint


def cut_corpus(files: Iterable[Path], tokenizer: Tokenizer, length: int) -> Iterator[Record]:
    """Pieces ``[CLS] tokens [SEP]`` of ``length`` ids that follow each other without gaps; only the last is shorter.

    A line is encoded as a whole, and lines run together: a piece may begin inside a line, and in another file.

    Raises:
        DataError: a length without room for a word, or text that is not UTF-8 (with its line).
    """
    room = length - 2
    if room < 1:
        raise DataError(f"pieces of {length} tokens have no room beside [CLS] and [SEP]; expected at least 3")
    name, number, waiting = fingerprint(tokenizer), 0, list[int]()
    for line in _lines(files):
        waiting += tokenizer.encode(line, None, close=False)[1:]
        while len(waiting) >= room:
            yield _piece(number, waiting[:room], tokenizer, name)
            number, waiting = number + 1, waiting[room:]
    if waiting:
        yield _piece(number, waiting, tokenizer, name)


def write_corpus(files: Iterable[Path], tokenizer: Tokenizer, length: int, out: Path) -> int:
    """Cuts files into an ArrayRecord file that is not there yet; returns the number of records.

    Raises:
        DataError: the file exists, has another suffix, or the text is empty or cannot be read.
    """
    if out.suffix != SUFFIX or out.exists():
        raise DataError(f"{out} exists or does not end in {SUFFIX}; choose another name")
    temporary, count = out.with_suffix(".tmp"), 0
    writer = ArrayRecordWriter(str(temporary), "group_size:1,zstd")
    try:
        for record in cut_corpus(files, tokenizer, length):
            writer.write(encode_record(record))
            count += 1
        writer.close()
        if not count:
            raise DataError(f"no text in {', '.join(map(str, files))}; expected lines of words")
        temporary.replace(out)
    finally:
        temporary.unlink(missing_ok=True)
    return count


def _piece(number: int, tokens: list[int], tokenizer: Tokenizer, name: str) -> Record:
    return Record(str(number), tokens=(tokenizer.cls_id, *tokens, tokenizer.sep_id), tokenizer=name)


def _lines(files: Iterable[Path]) -> Iterator[str]:
    for path in files:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    text = line.decode("utf-8").strip()
                except UnicodeDecodeError as error:
                    raise DataError(f"text file {path} is not UTF-8: {error.reason} in line {number}") from error
                if text:
                    yield text
