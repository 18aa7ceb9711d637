"""A run's work directory: its config, tokeniser, checkpoints, metrics and evaluations, so that it explains itself."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_pipelines.digitworld.source import vocabulary_texts
from data_pipelines.tokenizers import Tokenizer, load_tokenizer, train_sentencepiece, train_wordpiece
from mplug2_jax.config import build, to_dict
from mplug2_jax.errors import UserError
from mplug2_jax.model.config import ModelConfig, SpecialTokens
from mplug2_jax.training.config import RunConfig, TokenizerConfig

# What may change when a run resumes: none of it changes what a step computes. Steps may become more, too.
MUTABLE_ON_RESUME = (
    "mesh", "checkpoint", "faults", "log_every", "log_example_ids", "watchdog_timeout", "profile", "wandb_project",
    "compilation_cache", "eval_every", "evaluations",
)  # fmt: skip


class WorkDir:
    """A folder that holds one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"
        self.evaluation_metrics = path / "metrics-eval.jsonl"  # of who follows the run: each file has one writer
        self.examples = path / "examples.jsonl"
        self.events = path / "events.jsonl"
        self.goodput = path / "goodput.jsonl"
        self.lock = path / "lock.json"  # of the run that lives here now
        self._config = path / "config.json"
        self.tokenizer_folder = path / "tokenizer"

    def evaluation_folder(self, step: int) -> Path:
        """Where the results of a step's evaluations are."""
        return self.path / "evaluations" / str(step)

    def data_errors_path(self, process: int) -> Path:
        """Where a process writes down the records that it could not use."""
        return self._of("data-errors", process)

    def faults_path(self, process: int) -> Path:
        """Where a process writes down the steps that went wrong, with its rows of their batches."""
        return self._of("faults", process)

    def _of(self, name: str, process: int) -> Path:
        return self.path / (f"{name}-{process}.jsonl" if process else f"{name}.jsonl")

    def exists(self) -> bool:
        """Whether a run has begun here."""
        return self._config.exists()

    def read_config(self) -> RunConfig:
        """The config that the run was started with.

        Raises:
            UserError: no run here, or a damaged or unknown config.
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
        try:
            return build(RunConfig, _tuples(values))
        except UserError as error:
            raise UserError(f"{self._config} is damaged or of another version: {error}") from error

    def check_config(self, config: RunConfig) -> bool:
        """True if the run was here before and may go on, False if it may begin here. Writes nothing.

        Raises:
            UserError: the folder holds something else, or a run whose config differs where it matters.
        """
        if not self.exists():
            if re.match(r"[a-z][a-z0-9+.-]+:/", str(self.path)):
                raise UserError(
                    f"--workdir {self.path}: a run writes to a folder; mount the bucket, as mplug2 launch gke and "
                    "tpu-vm do"
                )
            if self.path.exists() and not self.path.is_dir():
                raise UserError(f"--workdir {self.path} is a file; choose a new folder")
            if self.path.exists() and not all(child.name.startswith(self.lock.name) for child in self.path.iterdir()):
                raise UserError(f"--workdir {self.path} is not empty and holds no run; choose a new folder")
            return False
        before, now = (flatten_dict(json.loads(json.dumps(to_dict(v)))) for v in (self.read_config(), config))
        changed = [
            f"{name} was {before.get(name)!r} and is {now.get(name)!r}"
            for name in sorted({*before, *now})
            if before.get(name) != now.get(name)
            and name.split(".")[0] not in MUTABLE_ON_RESUME
            and not (name == "steps" and before[name] < now[name])
        ]
        if changed:
            more = f", and {len(changed) - 3} more" if len(changed) > 3 else ""
            raise UserError(
                f"--workdir {self.path} holds a run with another config: {'; '.join(changed[:3])}{more}. Use the same "
                "config to resume it, or a new --workdir"
            )
        return True

    def initialize(self, config: RunConfig, tokenizer: Tokenizer | None) -> None:
        """Keeps the config and the tokeniser of a run that was checked, so that a refused one leaves no trace."""
        self.path.mkdir(parents=True, exist_ok=True)
        _write_json(self._config, to_dict(config))
        if tokenizer and not self.tokenizer_folder.exists():
            tokenizer.save(self.tokenizer_folder)

    def load_tokenizer(self, config: RunConfig) -> Tokenizer:
        """The run's tokeniser: the one that is kept here, or before there is one, what the config says.

        That is the file it names, or that of the run whose word tables it starts from, or one that it trains.

        Raises:
            UserError: it has more tokens than the model's tables have rows.
            DataError: no tokeniser at the given path, or a damaged one.
        """
        kept = self.tokenizer_folder
        inherited = _tokenizer_of(config)
        if kept.exists():
            tokenizer = load_tokenizer(kept)
        elif inherited and not config.tokenizer.path:
            tokenizer = load_tokenizer(inherited)
        else:
            tokenizer = load_or_train_tokenizer(config.tokenizer)
        check_vocabulary(tokenizer, config.model)
        return tokenizer


def _tokenizer_of(config: RunConfig) -> Path | None:
    """The tokeniser that the words of ``config.init_from`` were learned with, if that is known."""
    if not config.init_from or (config.init_parts and not {"text", "decoder"} & set(config.init_parts)):
        return None
    path = Path(config.init_from)
    kept = (WorkDir(folder).tokenizer_folder for folder in (path, path.parent, path.parent.parent))
    return next((folder for folder in kept if folder.is_dir()), None)


def load_or_train_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """The tokeniser that a config names, loaded or trained. Raises DataError for a file that is missing or damaged."""
    if config.path:
        return load_tokenizer(Path(config.path))
    train = train_wordpiece if config.kind == "wordpiece" else train_sentencepiece
    return train(tokenizer_training_texts(), config.vocab_size)


def tokenizer_training_texts() -> Iterator[str]:
    """What a run without a tokeniser file trains its own on: DigitWorld's texts, and the numbers of boxes."""
    yield from vocabulary_texts()
    yield from (str(number) for number in range(32) for _ in range(100))


def check_vocabulary(tokenizer: Tokenizer, model: ModelConfig) -> None:
    """Checks that every token has a row.

    Raises:
        UserError: a vocabulary of the model that is too small.
    """
    if tokenizer.vocab_size > model.vocab_size:
        raise UserError(
            f"config.model.vocab_size={model.vocab_size} is too small for the tokeniser's {tokenizer.vocab_size} "
            f"tokens; raise it to at least {tokenizer.vocab_size}"
        )


def special_tokens(tokenizer: Tokenizer) -> SpecialTokens:
    """The ids that objectives and search need."""
    return SpecialTokens(pad=tokenizer.pad_id, begin=tokenizer.cls_id, end=tokenizer.sep_id, mask=tokenizer.mask_id)


def _write_json(path: Path, values: Any) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(values, indent=1), encoding="utf-8")
    temporary.replace(path)


def _tuples(value: Any) -> Any:
    """JSON's lists as tuples."""
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def flatten_dict(value: Any, path: str = "") -> dict[str, Any]:
    """Nested dicts as one, by dotted names."""
    if not isinstance(value, dict):
        return {path: value}
    inner = (flatten_dict(item, f"{path}.{key}".lstrip(".")) for key, item in value.items())
    return {name: leaf for leaves in inner for name, leaf in leaves.items()}
