"""Plain text, tokenized once and cut into records of a fixed number of tokens, for text streams."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from array_record.python.array_record_module import ArrayRecordWriter

from data_pipelines.errors import DataError
from data_pipelines.preparation.jobs import SINGLE_WORKER, Job, Worker
from data_pipelines.preparation.shards import ShardManifest, prepare_output_folder, write_shard
from data_pipelines.record import Record
from data_pipelines.sources.array_record import SUFFIX, encode_record
from data_pipelines.sources.files import read_lines
from data_pipelines.storage.local_files import staged_write
from data_pipelines.storage.paths import check_can_write
from data_pipelines.tokenizers import Tokenizer, vocab_fingerprint

Progress = Callable[[int], None]


def chunk_corpus(lines: Iterable[str], tokenizer: Tokenizer, length: int, key_prefix: str = "") -> Iterator[Record]:
    """Yield chunks ``[CLS] tokens [SEP]`` of ``length`` ids, contiguous; only the last may be shorter.

    Each line is tokenized as a whole, and lines are concatenated: a chunk may begin inside a line, and span files.

    Raises:
        DataError: ``length`` is below 3.
    """
    capacity = length - 2
    if capacity < 1:
        raise DataError(f"the chunk length is {length}, expected at least 3 to hold [CLS], a token and [SEP]")
    name, number, pending = vocab_fingerprint(tokenizer), 0, list[int]()

    def chunk(tokens: Sequence[int]) -> Record:
        return Record(f"{key_prefix}{number}", tokens=(tokenizer.cls_id, *tokens, tokenizer.sep_id), tokenizer=name)

    for line in lines:
        pending += tokenizer.encode(line, None, add_sep=False)[1:]
        while len(pending) >= capacity:
            yield chunk(pending[:capacity])
            number, pending = number + 1, pending[capacity:]
    if pending:
        yield chunk(pending)


def write_corpus(
    files: Sequence[Path], tokenizer: Tokenizer, length: int, out: Path, on_progress: Progress = lambda num_bytes: None
) -> int:
    """Write the chunks of files as a new ArrayRecord file; return the number of records. See ``chunk_corpus``.

    ``on_progress`` is called with the number of bytes read so far.

    Raises:
        DataError: the file exists, has another suffix, or the text is empty or cannot be read.
    """
    if out.suffix != SUFFIX or out.exists():
        raise DataError(f"{out} exists or does not end in {SUFFIX}; choose another name")
    check_can_write(out)
    count = 0
    with staged_write(str(out)) as temporary:
        writer = ArrayRecordWriter(temporary, "group_size:1,zstd")
        for record in chunk_corpus(read_lines(files, on_progress), tokenizer, length):
            writer.write(encode_record(record))
            count += 1
        writer.close()
        if not count:
            raise DataError(f"{', '.join(map(str, files))}: found no text, expected lines of words")
    return count


def write_corpus_shards(
    files: Sequence[Path],
    tokenizer: Tokenizer,
    length: int,
    out: Path,
    *,
    shards: int,
    worker: Worker = SINGLE_WORKER,
    on_progress: Progress = lambda num_bytes: None,
) -> Iterator[tuple[Path, ShardManifest]]:
    """Write the chunks of files as ``shards`` ArrayRecord files into a folder; complete ones are kept.

    A shard has the lines that begin in its part of the bytes of all files; its last chunk may be shorter.

    Args:
        files: the texts.
        tokenizer: of the texts.
        length: ids of a chunk.
        out: the folder.
        shards: number of files.
        worker: writes only its share of the files.
        on_progress: called with the number of bytes read so far.

    Yields:
        The path and the manifest of each shard, as they are done.

    Raises:
        DataError: a folder that holds something else, a shard without text, or a text that cannot be read.
    """
    sizes = [path.stat().st_size for path in files]
    if not 1 <= shards <= max(1, sum(sizes)):
        raise DataError(f"cannot write {shards} shards of {sum(sizes):,} bytes of text; expected at least 1 byte each")
    settings = {
        "texts": list(map(str, files)), "bytes": sizes, "tokenizer": vocab_fingerprint(tokenizer), "length": length
    }  # fmt: skip
    paths = prepare_output_folder(out, Job("chunk", settings, shards))
    bounds = [sum(sizes) * i // shards for i in range(shards + 1)]
    parts = list(zip(range(shards), paths, bounds[:-1], bounds[1:], strict=True))
    done = 0
    for number, path, start, stop in worker.select_share(parts):
        lines = read_lines(files, lambda count, done=done: on_progress(done + count), start=start, stop=stop)
        chunks = chunk_corpus(lines, tokenizer, length, f"{number:05}-")
        yield path, write_shard(path, settings, start, stop, "zstd", map(encode_record, chunks))
        done += stop - start
        on_progress(done)
