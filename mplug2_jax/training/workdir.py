"""A run's work directory: its config, tokenizer, checkpoints, metrics and evaluations."""

import contextlib
import functools
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from absl import logging

from data_pipelines.config import SourceConfig, VisualConfig
from data_pipelines.digitworld.source import vocabulary_texts
from data_pipelines.errors import DataError
from data_pipelines.storage.file_system import write_atomically
from data_pipelines.storage.object_log import flush_logs
from data_pipelines.storage.paths import RemotePath, to_path
from data_pipelines.tokenizers import Tokenizer, load_tokenizer, train_sentencepiece, train_wordpiece, vocab_fingerprint
from mplug2_jax.config import build, to_dict
from mplug2_jax.errors import UserError
from mplug2_jax.model.config import ModelConfig, SpecialTokens
from mplug2_jax.renames import without_warnings
from mplug2_jax.training.config import RunConfig, TokenizerConfig
from mplug2_jax.training.config_changes import ConfigChange, check_changes
from mplug2_jax.training.telemetry.events import EventLog, read_events

CONFIG_FORMAT = 2
"""Of ``config.json``. 1, without a number: config fields have names that ``OLD_NAMES`` of the configs translate."""


class WorkDir:
    """A folder that holds one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"
        self.evaluation_metrics = path / "metrics-eval.jsonl"  # of continuous evaluation: each file has one writer
        self.examples = path / "examples.jsonl"
        self.events = path / "events.jsonl"
        self.hosts = path / "hosts.jsonl"  # how busy each process was
        self.goodput = path / "goodput.jsonl"
        self.lock = path / "lock.json"  # of the process that trains here now
        self.compilation_cache = path / "compilation-cache"  # where the work directory is in a bucket
        self.slices = path / "slices"  # files by which elastic slices find each other
        self._config = path / "config.json"
        self.tokenizer_folder = path / "tokenizer"

    def evaluation_folder(self, step: int) -> Path:
        """Return the folder with the results of a step's evaluations."""
        return self.path / "evaluations" / str(step)

    def data_errors_path(self, process: int) -> Path:
        """Return the file in which a process lists the records that it could not use."""
        return self._process_file("data-errors", process)

    def faults_path(self, process: int) -> Path:
        """Return the file in which a process lists faulty steps, with its rows of their batches."""
        return self._process_file("faults", process)

    def _process_file(self, name: str, process: int) -> Path:
        return self.path / (f"{name}-{process}.jsonl" if process else f"{name}.jsonl")

    def exists(self) -> bool:
        """Return whether the directory holds a run."""
        return self._config.exists()

    def read_config(self) -> RunConfig:
        """Return the run's config; fields of older versions are read by their old names.

        Raises:
            UserError: no run here, or a config that is damaged or of a newer version.
        """
        if not self.exists():
            raise UserError(
                f"{self.path} holds no run: {self._config.name} is missing; give the --workdir of a training run"
            )
        try:
            values = json.loads(self._config.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{self._config} is not valid JSON ({error}); restore it or use another --workdir"
            ) from error
        if not isinstance(values, dict):
            raise UserError(f"{self._config} holds a {type(values).__name__}, not a run's config; restore it")
        version = values.pop("format_version", 1)
        if not isinstance(version, int) or version > CONFIG_FORMAT:
            raise UserError(
                f"{self._config} has format_version {version}, but this version reads up to {CONFIG_FORMAT}; update "
                "mplug2_jax"
            )
        try:
            if version == CONFIG_FORMAT:
                return build(RunConfig, values)
            logging.log_first_n(
                logging.INFO, "%s is of an older version: renamed fields are read by their old names", 1, self._config
            )
            with without_warnings():
                return build(RunConfig, values)
        except UserError as error:
            raise UserError(f"{self._config} is damaged or of another version: {error}") from error

    def check_config(self, config: RunConfig, force: Sequence[str] | None = ()) -> bool:
        """Return whether this run can resume here (True) or start here (False). Write nothing.

        ``force`` are the fields that ``--force-change`` names; None if the command has no such option.

        Raises:
            UserError: the folder holds something else, or a run whose config differs in a field that must not change;
                or ``force`` does not fit.
        """
        if not self.exists():
            if force:
                raise UserError(f"--force-change {force[0]}: {self.path} holds no run to resume; remove the option")
            if not isinstance(self.path, RemotePath) and re.match(r"[a-z][a-z0-9+.-]+:/", str(self.path)):
                raise UserError(f"--workdir {self.path} is a URL that was taken for a local path; use to_path")
            if self.path.exists() and not self.path.is_dir():
                raise UserError(f"--workdir {self.path} is a file; choose a new folder")
            if self.path.exists() and not all(map(self._is_coordination, self.path.iterdir())):
                raise UserError(f"--workdir {self.path} is not empty and holds no run; choose a new folder")
            return False
        old = self.read_config()
        check_changes(self.path, old, config, force, read_events(self.events))
        return True

    def _is_coordination(self, path: Path) -> bool:
        """Return whether a file or folder may be there before the run has begun."""
        return path.name.startswith(self.lock.name) or path == self.slices

    def initialize(self, config: RunConfig, tokenizer: Tokenizer | None) -> None:
        """Write the config and tokenizer of a run that passed all checks, so that an invalid one leaves no trace."""
        self.path.mkdir(parents=True, exist_ok=True)
        values = {"format_version": CONFIG_FORMAT, **to_dict(config)}
        write_atomically(str(self._config), json.dumps(values, indent=1).encode())
        if tokenizer and not self.tokenizer_folder.exists():
            tokenizer.save(self.tokenizer_folder)

    def change_config(
        self, config: RunConfig, tokenizer: Tokenizer | None, changes: Sequence[ConfigChange], step: int,
        events: EventLog,
    ) -> None:  # fmt: skip
        """Replace the config of a run that resumes after ``step``, once the events tell what it was."""
        for change in changes:
            details = {"field": change.field, "kind": change.kind, "forced": change.forced, **change.values}
            events.log_event("config_changed", step, **details)
        flush_logs()
        self.initialize(config, tokenizer)

    def load_tokenizer(self, config: RunConfig) -> Tokenizer:
        """Return the run's tokenizer: the one stored here or, for a new run, the one that the config asks for.

        That is the file that it names, or that of the run whose word tables it loads, or one that is trained.

        Raises:
            UserError: it has more tokens than the model's tables have rows.
            DataError: no tokenizer at the given path, or a damaged one.
        """
        inherited = _inherited_tokenizer(config)
        if self.tokenizer_folder.exists():
            tokenizer = load_tokenizer(self.tokenizer_folder)
        elif inherited and not config.tokenizer.path:
            tokenizer = load_tokenizer(inherited)
        else:
            tokenizer = load_or_train_tokenizer(config.tokenizer)
        check_vocabulary(tokenizer, config.model)
        return tokenizer


def check_tokenizer_unchanged(config: RunConfig, tokenizer: Tokenizer, changes: Sequence[ConfigChange]) -> None:
    """Check that a config whose tokenizer changed still names the run's own.

    Raises:
        UserError: it names another one, to which the model's tables do not belong.
        DataError: as :func:`load_or_train_tokenizer`.
    """
    changed = next((change for change in changes if change.field.startswith("tokenizer.")), None)
    if changed and vocab_fingerprint(load_or_train_tokenizer(config.tokenizer)) != vocab_fingerprint(tokenizer):
        raise UserError(
            f"config.{changed} names another tokenizer than the one that the run's word tables belong to: set it back, "
            "or start a new --workdir"
        )


def _inherited_tokenizer(config: RunConfig) -> Path | None:
    """Return the tokenizer folder of the run that ``config.init_from`` names, if its word tables are loaded."""
    if not config.init_from or (config.init_parts and not {"text", "decoder"} & set(config.init_parts)):
        return None
    path = to_path(config.init_from)
    candidates = (WorkDir(folder).tokenizer_folder for folder in (path, path.parent, path.parent.parent))
    return next((folder for folder in candidates if folder.is_dir()), None)


def load_or_train_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """Load or train the tokenizer that a config names.

    Raises:
        DataError: a missing or damaged file, or a source that cannot be opened.
        UserError: a source without texts.
    """
    if config.path:
        return load_tokenizer(to_path(config.path))
    if config.source:
        return _train_tokenizer(config.kind, config.vocab_size, _texts_of(config.source))
    return _train_default_tokenizer(config.kind, config.vocab_size)


@functools.cache
def _train_default_tokenizer(kind: str, vocab_size: int) -> Tokenizer:
    """Train a tokenizer on the default texts, once for all runs of a process."""
    return _train_tokenizer(kind, vocab_size, tokenizer_training_texts())


def _train_tokenizer(kind: str, vocab_size: int, texts: Iterator[str]) -> Tokenizer:
    return (train_wordpiece if kind == "wordpiece" else train_sentencepiece)(texts, vocab_size)


def tokenizer_training_texts() -> Iterator[str]:
    """Yield the texts that a tokenizer is trained on by default: DigitWorld's, and the numbers of boxes."""
    yield from vocabulary_texts()
    yield from (str(number) for number in range(32) for _ in range(100))


def _texts_of(source: SourceConfig) -> Iterator[str]:
    """Yield the texts of a source's usable records; training reports the others."""
    from data_pipelines.sources.formats import open_source  # imports every format's library

    records, num_texts = open_source(source, VisualConfig()), 0
    for index in range(len(records)):
        with contextlib.suppress(DataError):
            record = records[index]
            for text in record.texts or record.captions:
                num_texts += 1
                yield text
    if not num_texts:
        raise UserError(
            f"config.tokenizer.source: none of the {len(records):,} records of {source.path} has a text; check them "
            "with mplug2 data validate"
        )


def check_vocabulary(tokenizer: Tokenizer, model: ModelConfig) -> None:
    """Check that every token has a row in the model's tables.

    Raises:
        UserError: the model's vocabulary is too small.
    """
    if tokenizer.vocab_size > model.vocab_size:
        raise UserError(
            f"config.model.vocab_size={model.vocab_size} is too small for the tokenizer's {tokenizer.vocab_size} "
            f"tokens; raise it to at least {tokenizer.vocab_size}"
        )


def special_tokens(tokenizer: Tokenizer) -> SpecialTokens:
    """Return the token ids that objectives and search need."""
    return SpecialTokens(pad=tokenizer.pad_id, begin=tokenizer.cls_id, end=tokenizer.sep_id, mask=tokenizer.mask_id)
