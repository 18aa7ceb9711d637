"""Tokenizers: one interface over BERT WordPiece and SentencePiece, trained here or read from files.

Both return ``[CLS] tokens [SEP]`` with padding id 0. Special tokens in a text are not recognized: a literal "[SEP]" in
a caption becomes ordinary tokens, so that no data set can end a sequence early. (The release's tokenization in
``data_pipelines.text`` recognizes it.)
"""

import functools
import hashlib
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from data_pipelines.arrays import Bool
from data_pipelines.errors import DataError

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WORDPIECE_FILE = "vocab.txt"
SENTENCEPIECE_FILE = "sentencepiece.model"


@runtime_checkable
class Tokenizer(Protocol):
    """Conversion of text to token ids and back. Instances are picklable, and encoding does not change them."""

    pad_id: int  # always 0
    cls_id: int
    sep_id: int
    mask_id: int
    unk_id: int
    vocab_size: int

    def encode(self, text: str, max_length: int | None = None, add_sep: bool = True) -> list[int]:
        """Return token ids ``[CLS] tokens``, and ``[SEP]`` if ``add_sep``, which truncation to ``max_length`` keeps."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, without ``[PAD]``, ``[CLS]`` and ``[SEP]``.

        An id beyond the vocabulary becomes ``[UNK]``: a model's embedding table may have more rows than tokens.
        """

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """Return the token of each id, including special tokens."""

    def word_starts(self, ids: Sequence[int]) -> Bool[np.ndarray, " l"]:
        """Return True where a new word begins; every special token is a word."""

    def save(self, directory: Path) -> Path:
        """Write the tokenizer into a directory that ``load_tokenizer`` reads; return the file."""

    def __hash__(self) -> int:
        """Return a hash of the identity, for caches by tokenizer."""


def _add_special_tokens(tokenizer: Tokenizer, pieces: list[int], max_length: int | None, add_sep: bool) -> list[int]:
    """Return ``[CLS] pieces``, and ``[SEP]`` if ``add_sep``, with the pieces truncated to fit."""
    end = [tokenizer.sep_id] if add_sep else []
    if max_length is None:
        return [tokenizer.cls_id, *pieces, *end]
    num_pieces = max_length - 1 - len(end)
    if num_pieces < 0:
        raise DataError(f"max_length is {max_length}, expected at least {1 + len(end)} to hold the special tokens")
    return [tokenizer.cls_id, *pieces[:num_pieces], *end]


def round_trip(tokenizer: Tokenizer, text: str) -> str:
    """Return a text encoded and decoded, the closest that a model can generate.

    Unknown tokens become U+FFFD, which no model generates; otherwise all unknown words would be equal.
    """
    return tokenizer.decode(tokenizer.encode(text)).replace("[UNK]", "\ufffd")


def join_wordpieces(tokens: Sequence[str]) -> str:
    """Join WordPiece tokens to text, with BERT's usual cleanup of spaces before punctuation and in contractions.

    Hyphenated words become "off - road": the tokens do not tell whether there were spaces.
    """
    text = " ".join(tokens).replace(" ##", "").strip()
    for mark in (".", "?", "!", ","):
        text = text.replace(f" {mark}", mark)
    text = text.replace(" ' ", "'")
    for suffix in ("n't", "'m", "'s", "'ve", "'re"):
        text = text.replace(f" {suffix}", suffix)
    return text


class WordPieceTokenizer:
    """BERT's uncased WordPiece: lower case, accents stripped, greedy longest match, ``##`` continues a word.

    Args:
        vocab: the tokens; a token's position is its id. ``[PAD]`` comes first, and all of ``SPECIAL_TOKENS`` occur.
        name: of the vocabulary in errors, usually its file.

    Raises:
        DataError: a special token is missing, ``[PAD]`` is not first, or a token is empty or duplicate.
    """

    def __init__(self, vocab: Sequence[str], name: str = "the vocabulary") -> None:
        ids = {piece: position for position, piece in enumerate(vocab)}
        missing = [token for token in SPECIAL_TOKENS if token not in ids]
        if missing:
            raise DataError(
                f"{name} has {len(vocab)} entries and lacks {', '.join(missing)}; expected a BERT vocabulary, "
                "one token per line"
            )
        if vocab[0] != "[PAD]":
            raise DataError(f"{name} begins with {vocab[0]!r}, expected [PAD] first because the padding id is 0")
        if len(ids) != len(vocab) or "" in ids:
            raise DataError(f"{name} has {len(vocab)} entries, some empty or duplicate; expected each token once")
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = (ids[token] for token in SPECIAL_TOKENS)
        self.vocab_size = len(vocab)
        self._vocab, self._ids = tuple(vocab), ids
        self._library = _library_tokenizer(ids)
        self._starts_word = np.array([not piece.startswith("##") for piece in vocab])

    def encode(self, text: str, max_length: int | None = None, add_sep: bool = True) -> list[int]:
        """See ``Tokenizer``. Raises DataError when ``max_length`` cannot hold the special tokens."""
        return _add_special_tokens(self, self._library.encode(text, add_special_tokens=False).ids, max_length, add_sep)

    def decode(self, ids: Sequence[int]) -> str:
        """See ``Tokenizer``; spaces are cleaned up as in ``join_wordpieces``."""
        skipped = (self.pad_id, self.cls_id, self.sep_id)
        return join_wordpieces(self.tokens([i for i in ids if i not in skipped]))

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """See ``Tokenizer``."""
        return [self._vocab[i] if i < self.vocab_size else "[UNK]" for i in ids]

    def token_id(self, token: str) -> int:
        """Return the id of one token, which must exist."""
        return self._ids[token]

    def word_starts(self, ids: Sequence[int]) -> Bool[np.ndarray, " l"]:
        """See ``Tokenizer``."""
        return self._starts_word[np.asarray(ids, np.int64)]

    def to_json(self) -> str:
        """Return the ``tokenizer.json`` of Hugging Face's libraries.

        It encodes a text to the same ids, unless the text contains the name of a special token.
        """
        library = _library_tokenizer(self._ids)
        library.post_processor = processors.BertProcessing(("[SEP]", self.sep_id), ("[CLS]", self.cls_id))
        library.decoder = decoders.WordPiece(cleanup=True)
        library.add_special_tokens(list(SPECIAL_TOKENS))
        return library.to_str(pretty=True)

    def save(self, directory: Path) -> Path:
        """See ``Tokenizer``: writes ``vocab.txt``, one token per line."""
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / WORDPIECE_FILE
        path.write_text("\n".join(self._vocab) + "\n", encoding="utf-8", newline="\n")
        return path


class SentencePieceTokenizer:
    """A SentencePiece model after the five special tokens: piece i of the model has id i + 5.

    The model's control symbols (``<s>``, ``</s>``, ``<pad>``, if any) are never produced; its unknown piece becomes
    ``unk_id``. So any model file works, whatever ids it gives them.

    Args:
        model: the bytes of a ``.model`` file.
        name: of the model in errors, usually its file.

    Raises:
        DataError: the bytes are not a SentencePiece model, or the library is not installed.
    """

    pad_id, unk_id, cls_id, sep_id, mask_id = range(len(SPECIAL_TOKENS))

    def __init__(self, model: bytes, name: str = "the model") -> None:
        try:
            import sentencepiece  # here, because most exported folders do without it
        except ModuleNotFoundError as error:
            raise DataError(f"{name} needs the package sentencepiece: pip install sentencepiece") from error
        try:
            # The library accepts an empty model and fails at its first use; it rejects a zero byte.
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model or b"\0")
        except RuntimeError as error:
            raise DataError(
                f"{name} is damaged: its {len(model)} bytes are not a SentencePiece model; download it again"
            ) from error
        self._model = model
        self._offset = len(SPECIAL_TOKENS)
        self.vocab_size = self._offset + self._processor.vocab_size()
        self._pieces = (*SPECIAL_TOKENS, *map(self._processor.id_to_piece, range(self._processor.vocab_size())))
        self._starts_word = np.array([i < self._offset or p.startswith("\u2581") for i, p in enumerate(self._pieces)])

    def encode(self, text: str, max_length: int | None = None, add_sep: bool = True) -> list[int]:
        """See ``Tokenizer``. Raises DataError when ``max_length`` cannot hold the special tokens."""
        unknown = self._processor.unk_id()
        pieces = [self.unk_id if i == unknown else i + self._offset for i in self._processor.encode(text)]
        return _add_special_tokens(self, pieces, max_length, add_sep)

    def decode(self, ids: Sequence[int]) -> str:
        """See ``Tokenizer``."""
        skipped = (self.pad_id, self.cls_id, self.sep_id)
        return self._processor.decode(self.tokens([i for i in ids if i not in skipped]))

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """See ``Tokenizer``."""
        return [self._pieces[i] if i < self.vocab_size else "[UNK]" for i in ids]

    def word_starts(self, ids: Sequence[int]) -> Bool[np.ndarray, " l"]:
        """See ``Tokenizer``."""
        return self._starts_word[np.asarray(ids, np.int64)]

    def save(self, directory: Path) -> Path:
        """See ``Tokenizer``: writes ``sentencepiece.model``."""
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / SENTENCEPIECE_FILE
        path.write_bytes(self._model)
        return path


@functools.lru_cache(maxsize=8)
def vocab_fingerprint(tokenizer: Tokenizer) -> str:
    """Return a fingerprint of a vocabulary, equal for tokenizers with the same token for every id."""
    pieces = "\n".join(tokenizer.tokens(range(tokenizer.vocab_size)))
    return hashlib.blake2b(pieces.encode(), digest_size=8).hexdigest()


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a tokenizer.

    Args:
        path: a BERT ``vocab.txt``, a SentencePiece ``*.model``, or a directory with one of them.

    Raises:
        DataError: no such file, or a damaged one.
    """
    if path.is_dir():
        files = [path / WORDPIECE_FILE] if (path / WORDPIECE_FILE).is_file() else sorted(path.glob("*.model"))
        if len(files) != 1:
            raise DataError(f"{path} holds {len(files)} tokenizers, expected one {WORDPIECE_FILE} or one *.model file")
        path = files[0]
    if not path.is_file():
        raise DataError(f"{path} does not exist; expected a {WORDPIECE_FILE}, a *.model file or a directory with one")
    data = path.read_bytes()
    if path.suffix == ".model":
        return SentencePieceTokenizer(data, str(path))
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is damaged: byte {error.start} is not UTF-8; download the vocabulary again") from error
    # Not splitlines: BERT vocabularies contain characters that Python treats as line ends.
    return WordPieceTokenizer(text.replace("\r\n", "\n").removesuffix("\n").split("\n"), str(path))


def _library_tokenizer(vocab: dict[str, int]) -> LibraryTokenizer:
    library = LibraryTokenizer(models.WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=100))
    library.normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=True)
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return library


def train_wordpiece(texts: Iterable[str], vocab_size: int) -> WordPieceTokenizer:
    """Train a WordPiece tokenizer; the same texts always give the same vocabulary.

    Args:
        texts: training texts; held in memory.
        vocab_size: maximum size; little text may give a smaller vocabulary. The special tokens come first.

    Raises:
        DataError: ``vocab_size`` is smaller than what the special tokens and the characters of the texts need.
    """
    library = _library_tokenizer({"[UNK]": 0})
    texts = [library.normalizer.normalize_str(text) for text in texts]
    alphabet = sorted({character for text in texts for character in text if not character.isspace()})
    # The library would number the continuation characters in the random order of a hash table, which decides ties
    # between merges; as special tokens they have fixed ids.
    fixed = [*SPECIAL_TOKENS, *(f"##{character}" for character in alphabet)]
    needed = len(fixed) + len(alphabet)
    if vocab_size < needed:
        raise DataError(
            f"vocab_size is {vocab_size}, expected at least {needed}: {len(SPECIAL_TOKENS)} special tokens and "
            f"2 x {len(alphabet)} characters of the texts"
        )
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=fixed, initial_alphabet=alphabet, limit_alphabet=len(alphabet),
        min_frequency=0, show_progress=False,
    )  # fmt: skip
    library.train_from_iterator(texts, trainer)
    vocab: dict[str, int] = library.get_vocab()
    return WordPieceTokenizer(sorted(vocab, key=vocab.__getitem__))


def train_sentencepiece(texts: Iterable[str], vocab_size: int) -> SentencePieceTokenizer:
    """Train a unigram SentencePiece model, which keeps case; the same texts always give the same model.

    Args:
        texts: training texts.
        vocab_size: maximum size, special tokens included; little text may give a smaller vocabulary.

    Raises:
        DataError: no text, or ``vocab_size`` is too small for the characters of the texts.
    """
    if vocab_size <= len(SPECIAL_TOKENS):
        raise DataError(f"vocab_size is {vocab_size}, expected more than the {len(SPECIAL_TOKENS)} special tokens")
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=model, vocab_size=vocab_size - len(SPECIAL_TOKENS),
            unk_id=0, bos_id=-1, eos_id=-1, pad_id=-1, character_coverage=1.0, hard_vocab_limit=False, num_threads=1,
            minloglevel=2,
        )  # fmt: skip
    except RuntimeError as error:
        raise DataError(
            f"vocab_size {vocab_size} does not fit the texts to train on ({str(error).rpartition('] ')[2] or error}); "
            "expected some text, and a size above the number of its characters"
        ) from error
    return SentencePieceTokenizer(model.getvalue())
