"""The command line: help with an example that works, one status for invalid arguments, errors on one line."""

import argparse
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator

import pytest
from absl import logging

from data_pipelines.errors import DataError
from mplug2_jax import __version__, console
from mplug2_jax.cli import data_files, report
from mplug2_jax.cli.main import main, make_parser
from mplug2_jax.errors import Preempted, UserError

from .conftest import Outcome, mplug2


def walk(parser: argparse.ArgumentParser, *names: str) -> Iterator[tuple[str, ...]]:
    """Yield the names of every command and subcommand; none for the command line itself."""
    yield names
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, child in action.choices.items():
                yield from walk(child, *names, name)


COMMANDS = list(walk(make_parser()))
every_command = pytest.mark.parametrize("names", COMMANDS, ids=[" ".join(("mplug2", *names)) for names in COMMANDS])


def find_example(help: Outcome) -> list[str]:
    """Return the words of the example in the help of a command, without the program's name."""
    (line,) = re.findall(r"^example:\n  mplug2 (.*)$", help.out, re.MULTILINE)
    return shlex.split(line)


def test_the_commands_are_found() -> None:
    assert {("train",), ("eval",), ("generate",), ("data", "sample"), ("convert", "parity")} <= set(COMMANDS)


@every_command
def test_help_shows_an_example_that_parses(names: tuple[str, ...]) -> None:
    help = mplug2(*names, "--help")
    assert (help.status, help.err) == (0, "")
    words = find_example(help)
    assert tuple(words[: len(names)]) == names
    args, overrides = make_parser().parse_known_args(words)
    assert callable(args.run)
    assert all(word.startswith("--config.") for word in overrides)
    assert not overrides or hasattr(args, "overrides")


@every_command
def test_help_says_what_each_command_is_for(names: tuple[str, ...]) -> None:
    text = mplug2(*names, "--help").out.partition("\n\n")[2]
    assert re.match(r"\w.*\.\n", text)


@every_command
def test_unknown_arguments_are_refused(names: tuple[str, ...]) -> None:
    refused = mplug2(*find_example(mplug2(*names, "--help")), "--no-such-option")
    assert (refused.status, refused.out) == (2, "")
    assert refused.err.endswith("error: unrecognized arguments: --no-such-option\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("eval --workdir w --no-such-option --config.steps=3", "unrecognized arguments: --no-such-option"),
        ("report w --config.steps=3", "unrecognized arguments: --config.steps=3"),
        ("eval --workd w", "unrecognized arguments: --workd w"),
        ("trian", "did you mean 'train'?"),
        ("nothing-like-it", "invalid choice: 'nothing-like-it'"),
        ("data validat x", "did you mean 'validate'?"),
        ("completion bsh", "did you mean 'bash'?"),
        ("train --config demo --config.steps 5 --workdir w", "an override is one: --config.steps=5"),
        ("launch local --processes 2 -- train --config demo --config.steps 5 --workdir w", "is one: --config.steps=5"),
        ("train --config demo --steps 5 --workdir w", "a field of the recipe is set by --config.steps=VALUE"),
        (
            "launch local --processes 2 train --config demo --workdir w --config.steps=4",
            "put -- before the command: mplug2 launch local --processes 2 -- train --config demo --workdir w "
            "--config.steps=4",
        ),
        ("eval --workdir w --step two", "invalid int value: 'two'"),
    ],
)
def test_a_wrong_argument_is_named(words: str, message: str) -> None:
    refused = mplug2(*words.split())
    assert refused.status == 2
    assert message in refused.err.splitlines()[-1]


def test_commands_are_listed_by_purpose_with_a_line_each() -> None:
    listed = mplug2()
    assert listed == mplug2("--help")
    assert (listed.status, listed.err) == (0, "")
    listing = listed.out[listed.out.index("\nTrain:") : listed.out.index("\noptions:")]
    purposes = [group.split(":\n") for group in listing.strip().split("\n\n")]
    assert [purpose for purpose, _ in purposes] == [
        "Train", "Evaluate and use", "Data", "Plan and launch", "Weights", "Shell",
    ]  # fmt: skip
    rows = dict(line.split(maxsplit=1) for _, lines in purposes for line in lines.splitlines())
    assert set(rows) == {names[0] for names in COMMANDS if names}
    assert all(len(summary) < 80 and summary[0].isupper() and summary[-1] != "." for summary in rows.values())


def test_the_version_is_printed() -> None:
    assert mplug2("--version") == Outcome(0, f"mplug2 {__version__}\n", "")


WRONG = "config.steps is wrong:\n  because  of\n\nthis"  # whatever a library put into it


def make_report_fail(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(args: argparse.Namespace) -> int:
        raise error

    monkeypatch.setattr(report, "run", run)


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UserError(WRONG), 2, "error: config.steps is wrong: because of this"),
        (DataError(WRONG), 2, "error: config.steps is wrong: because of this"),
        (PermissionError(13, "Permission denied", "runs/config.json"), 2, "error: runs/config.json: Permission denied"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_errors_are_one_line(error: BaseException, status: int, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make_report_fail(error, monkeypatch)
    assert mplug2("report", "w") == Outcome(status, "", f"mplug2: {line}\n")


def test_a_bug_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    make_report_fail(ZeroDivisionError(), monkeypatch)
    with pytest.raises(ZeroDivisionError):
        main(["report", "w"])


@pytest.mark.parametrize(
    ("words", "levels"),
    [
        (["report", "w"], "IWE"), (["--quiet", "report", "w"], "WE"), (["report", "--quiet", "w"], "WE"),
        (["-v", "report", "w"], "DIWE"), (["report", "w", "--verbose"], "DIWE"),
        (["--quiet", "data", "validate", "w"], "WE"), (["data", "-v", "validate", "w"], "DIWE"),
    ],
)  # fmt: skip
def test_verbosity_is_chosen_before_and_after_the_command(
    words: list[str], levels: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(args: argparse.Namespace) -> int:
        for log in (logging.debug, logging.info, logging.warning, logging.error):
            log("from %s", "here")
        return 0

    monkeypatch.setattr(console, "_OURS", (__file__,))
    monkeypatch.setattr(report, "run", run)
    monkeypatch.setattr(data_files, "run_validate", run)
    assert main(words) == 0
    lines = capsys.readouterr().err.splitlines()
    assert "".join(line[0] for line in lines) == levels
    assert all(line.endswith(" p0] from here") for line in lines)


def test_verbose_and_quiet_exclude_each_other() -> None:
    refused = mplug2("report", "w", "-v", "--quiet")
    assert refused.status == 2
    assert "not allowed with argument" in refused.err


def test_preemption_is_a_warning_and_exits_with_75(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_report_fail(Preempted("SIGTERM: saved step 40 of 100, exiting"), monkeypatch)
    assert main(["--quiet", "report", "w"]) == 75
    assert re.fullmatch(r"W\d{4} [\d:]+ p0\] SIGTERM: saved step 40 of 100, exiting\n", capsys.readouterr().err)


REFUSED = (
    "train --config demo --config.modle.width=3 --workdir w",
    "train --config demo --config.model.width=wide --workdir w",
    "train --config demo --config.steps=0 --workdir w",
    "train --config demo --config.freeze=('eyes',) --workdir w",
    "train --config demmo --workdir w",
    "train --config cola:tiny --config.streams.set.objectives.clasify=1 --workdir w",
    "plan --config pretrain --config.modle.width=3 --shardings",
    "data show finetune:caption --config.modle.width=3",
)
HEAVY = {
    "PIL", "array_record", "av", "flax", "fsspec", "grain", "jax", "jinja2", "matplotlib", "optax", "orbax", "scipy",
    "sentencepiece", "shtab", "sklearn", "tensorboardX", "tensorflow_datasets", "tensorstore", "tokenizers",
}  # fmt: skip
UNUSED = {"matplotlib", "nltk", "scipy.stats", "tensorflow", "tensorflow_datasets", "torch"}
IMPORTED = f"""
import sys
from mplug2_jax.cli.main import main
print([main(line.split()) for line in {REFUSED}])
print({HEAVY} & set(sys.modules))
import mplug2_jax.training.loop
print({UNUSED} & set(sys.modules))
print(main("data validate digitworld: --kind text --size 2".split()), "tensorflow_datasets" in sys.modules)
"""


def test_a_run_does_not_import_packages_that_it_does_not_use() -> None:
    """An invalid config is refused before heavy packages are imported, and a run imports only what it needs.

    PyTorch, nltk and SciPy's statistics take longer to import than everything that a run needs.
    """
    done = subprocess.run([sys.executable, "-c", IMPORTED], capture_output=True, text=True, check=True)
    refused, heavy, unused, *_, other_data = done.stdout.splitlines()
    assert refused == str([2] * len(REFUSED))
    assert len(Outcome.split(0, "", done.stderr).err.splitlines()) == len(REFUSED)
    assert (heavy, unused) == ("set()", "set()")
    assert other_data == "0 False"


def test_a_full_disk_under_the_output_is_an_error_of_one_line():
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "mplug2_jax.cli.main", "tasks"]
        process = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (process.stderr, process.returncode) == ("mplug2: error: writing: No space left on device\n", 2)


def test_a_reader_that_has_read_enough_is_no_error():
    process = subprocess.Popen(
        [sys.executable, "-m", "mplug2_jax.cli.main", "tasks"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    assert (process.stderr.read(), process.wait()) == (b"", 141)
