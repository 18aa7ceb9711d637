"""Commands with all paths in a bucket do what they do on a disk, to the byte; what a bucket refuses is one line."""

import argparse
import ast
import dataclasses
import http.server
import importlib.util
import json
import re
import shlex
import shutil
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

from data_pipelines.storage import file_system as file_system_module
from data_pipelines.storage.file_system import FileSystem, file_system
from data_pipelines.storage.jsonl import read_jsonl
from data_pipelines.storage.paths import to_path, upload_folder
from mplug2_jax.cli.main import make_parser
from mplug2_jax.cli.parsing import output_path
from mplug2_jax.planning.plan_file import PlanFile
from mplug2_jax.training.telemetry.metric_log import read_train_metrics
from tests import emulator
from tests.weights import assert_same, official_config, official_file

from .conftest import Outcome, TrainedRun, mplug2
from .test_bad_input import error_of


def files(folder: Path) -> dict[str, bytes]:
    """Return the bytes of all files below a folder, local or not, by their paths in it."""
    fs, fs_path = file_system(str(folder))
    return {name.removeprefix(fs_path).lstrip("/"): fs.cat_file(name) for name in fs.find(fs_path)}


def comparable(content: bytes, root: Path) -> bytes:
    """Return an output without its place, and without times."""
    for name in (str(root), json.dumps(str(root))[1:-1]):
        content = content.replace(name.encode(), b"ROOT")
    content = re.sub(rb'("seconds"|"written"): ("[^"]*"|[\d.e-]+)', rb"\1: 0", content)
    return re.sub(rb"[\d.,]+ (s|MB/s)\b|\d{4}-\d\d-\d\dT[\d:+]+", b"0", content)


def run(command: str, **values: object) -> Outcome:
    """Run a command, with names in capitals replaced by values."""
    words = shlex.split(command)
    for name, value in values.items():
        words = [word.replace(name, str(value)) for word in words]
    return mplug2(*words)


def lines(text: str) -> list[str]:
    return text.strip().splitlines()


@dataclasses.dataclass(frozen=True)
class Places:
    """Two folders with the same runs, media and weights: one of a disk, one of a bucket."""

    local: Path
    remote: Path

    def __iter__(self) -> Iterator[Path]:
        return iter((self.local, self.remote))


@pytest.fixture(scope="module")
def places(
    tmp_path_factory: pytest.TempPathFactory, object_store: str, trained: TrainedRun, pictures: Path,
    contrastive_run: Path, media: Path, vocabulary: Path,
) -> Places:  # fmt: skip
    local = tmp_path_factory.mktemp("place") / "my runs é"
    remote = to_path(f"{emulator.make_bucket(object_store, 'commands')}/my runs é")
    official_file(local / "official" / "qa.safetensors", official_config(vocab_size=160))
    official_file(local / "torch" / "qa.pth", official_config(vocab_size=160))
    assert run("convert import ROOT/torch/qa.pth --task videoqa --to ROOT/imported", ROOT=local).status == 0
    (local / "texts").mkdir()
    (local / "texts" / "a.txt").write_text("a red four moves left\n" * 40)
    for name, folder in (
        ("text", trained.workdir), ("pictures", pictures), ("contrastive", contrastive_run), ("media", media),
        ("tokenizer", vocabulary.parent),
    ):  # fmt: skip
        shutil.copytree(folder, local / name)
    upload_folder(str(local), remote)
    return Places(local, remote)


COMMANDS = """
eval --workdir ROOT/text --only masked_words
eval --config RECIPE --checkpoint ROOT/text/checkpoints/2 --out ROOT/out/results
eval --workdir ROOT/text --follow --poll 1
report ROOT/text
report ROOT/text --against ROOT/out/results --out ROOT/out/against.html
replay ROOT/text --step 2 --rank 2
generate --workdir ROOT/pictures ROOT/media --out ROOT/out/answers.jsonl
embed --workdir ROOT/contrastive ROOT/media --kind image --out ROOT/out/features
data tokenizer ROOT/texts/a.txt --vocab-size 60 --out ROOT/out/words
data tokenizer ROOT/texts/a.txt --kind sentencepiece --vocab-size 25 --out ROOT/out/pieces
data sample --kind image --count 1 --out ROOT/out/samples
data sample --kind video --count 1 --out ROOT/out/samples
data show RECIPE --out ROOT/out/sheets
data show PICTURES --config.tokenizer.path=ROOT/tokenizer --out ROOT/out/sheets
data validate files:ROOT/media --kind image
data convert digitworld: --kind video --max-records 5 --shards 2 --out ROOT/out/records
data chunk ROOT/texts/a.txt --tokenizer ROOT/tokenizer --length 16 --out ROOT/out/chunks.array_record
convert inspect ROOT/official
convert inspect ROOT/torch/qa.pth
convert inspect ROOT/imported
convert import ROOT/official --to ROOT/out/imported --tokenizer ROOT/tokenizer/vocab.txt
convert import ROOT/torch/qa.pth --task videoqa --to ROOT/out/imported --overwrite
convert verify ROOT/out/imported
convert export ROOT/out/imported --to ROOT/out/hub --shard-size 0.0005
convert export ROOT/imported/checkpoints --to ROOT/out/qa.pth --leftover ROOT/imported/official-rest.safetensors
convert export ROOT/imported/checkpoints/0 --to ROOT/out/half/qa.safetensors --dtype bfloat16
convert export ROOT/imported --to ROOT/out/half/qa.safetensors --dtype bfloat16 --overwrite
convert verify ROOT/out/hub/conversion-report.json
convert diff ROOT/out/imported ROOT/out/hub --out ROOT/out/diff.html --json ROOT/out/diff.json
convert verify ROOT/out/half
"""


@pytest.mark.slow
def test_commands_do_in_a_bucket_what_they_do_on_a_disk(places: Places, recipes: Path) -> None:
    for root in places:
        (root / "text" / "evaluations" / "2" / "more_words.json").unlink()  # for eval --follow
    for command in lines(COMMANDS):
        for root, outcome in (outcomes := {
            root: run(command, ROOT=root, RECIPE=recipes / "text.py", PICTURES=recipes / "pictures.py")
            for root in places
        }).items():  # fmt: skip
            assert outcome.status == 0, (command, outcome)
            for text in ("out", "err"):
                expected, found = (getattr(outcomes[r], text).encode() for r in (places.local, root))
                assert comparable(found, root) == comparable(expected, places.local), command
    # Conversions write tensors in any order: checkpoints are compared by their exports, archives by their tensors.
    assert_same(*(root / "out" / "qa.pth" for root in places))
    logs = [read_jsonl(root / "text" / "metrics-eval.jsonl") for root in places]
    assert logs[0] == logs[1] != []
    local, remote = (
        {
            name: comparable(content, root)
            for name, content in files(root).items()
            if "checkpoints/" not in name and "metrics-eval" not in name and not name.endswith("out/qa.pth")
        }
        for root in places
    )
    assert sorted(remote) == sorted(local)
    assert [name for name in local if remote[name] != local[name]] == []


@pytest.mark.slow
def test_a_run_with_all_paths_in_a_bucket_loads_the_program_compiled_there(places: Places, trained: TrainedRun) -> None:
    values = {"ROOT": places.remote, "RECIPE": trained.recipe}
    planned = run(
        "plan --config RECIPE --topology cpu:8 --json ROOT/plans/plan.json --html ROOT/plans/plan.html "
        "--save-executable ROOT/executables", **values,
    )  # fmt: skip
    assert planned.status == 0, planned.err
    assert json.loads((places.remote / "plans" / "plan.json").read_text())["topology"] == "cpu:8"
    assert "</html>" in (places.remote / "plans" / "plan.html").read_text()
    PlanFile(config=str(trained.recipe), overrides=(), topology="cpu:8").write(places.remote / "chosen.json")
    done = run(
        "train --plan ROOT/chosen.json --workdir ROOT/new --config.compilation_cache=ROOT/executables "
        "--config.tokenizer.path=ROOT/tokenizer/vocab.txt", **values,
    )  # fmt: skip
    assert (done.status, done.err) == (0, "")
    assert "loaded from the AOT program" in done.log
    losses, expected = (
        [line["loss"] for line in read_train_metrics(run / "metrics.jsonl")]
        for run in (places.remote / "new", trained.workdir)
    )
    assert losses == expected != []
    *_, evaluate, export = [line.partition("  mplug2 ")[2] for line in lines(done.out)]
    assert shlex.split(evaluate) == ["eval", "--workdir", str(places.remote / "new")]
    assert shlex.split(export) == ["convert", "export", str(places.remote / "new"), "--to", "exports/new"]
    second = run("train --config RECIPE --workdir ROOT/second --config.steps=1 --config.init_from=ROOT/new", **values)
    assert second.status == 0, second.err
    assert f"initializing from {places.remote / 'new'} (step 2): mlm, text, universal" in second.log


def test_an_upload_that_stopped_is_not_taken_for_whole(
    places: Places, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = FileSystem.upload

    def stopping(self: FileSystem, local: str, path: str, **options: Any) -> None:
        if path.endswith(stop):
            raise KeyboardInterrupt
        upload(self, local, path, **options)

    monkeypatch.setattr(FileSystem, "upload", stopping)
    values = {"ROOT": places.local, "OUT": bucket}
    stop = "checkpoints/0/commit_success.txt"
    assert run("convert import ROOT/official --to OUT/imported", **values).status == 130
    assert "checkpoints/0/state/commit_success.txt" in files(to_path(f"{bucket}/imported"))
    assert "holds no checkpoint" in error_of(run("convert export OUT/imported --to OUT/x", **values))
    stop = "model.safetensors.index.json"
    assert run("convert export ROOT/imported --to OUT/hub --shard-size 0.0005", **values).status == 130
    assert "model-00001-of-" in "".join(files(to_path(f"{bucket}/hub")))
    assert "files of weights" in error_of(run("convert inspect OUT/hub", **values))
    assert "expected a conversion-report.json" in error_of(run("convert verify OUT/hub", **values))
    assert "replace it with --overwrite" in error_of(run("convert export ROOT/imported --to OUT/hub", **values))
    stop = "nothing"
    again = run("convert export ROOT/imported --to OUT/hub --shard-size 0.0005 --overwrite", **values)
    assert again.status == run("convert verify OUT/hub", **values).status == 0


# Bad input


INPUTS = """
train --config RECIPE --workdir new --config.init_from=BAD
train --config RECIPE --workdir new --config.tokenizer.path=BAD
train --plan BAD --workdir new
eval --workdir BAD
eval --config RECIPE --checkpoint BAD
report BAD
report RUN --against BAD
replay BAD --step 1
generate --workdir BAD FILE
generate --workdir PICTURES BAD
embed --workdir BAD FILE --out new
embed --workdir PICTURES BAD --out new
data tokenizer BAD --out new
data chunk BAD --tokenizer VOCABULARY --out new.array_record
data chunk TEXT --tokenizer BAD --out new.array_record
convert import BAD --to new
convert import OFFICIAL --to new --tokenizer BAD
convert export BAD --to new
convert export IMPORTED --to new --leftover BAD
convert verify BAD
convert inspect BAD
convert diff BAD OFFICIAL
convert diff OFFICIAL BAD
convert parity BAD
"""
OUTPUTS = """
train --config RECIPE --workdir BAD
eval --config RECIPE --checkpoint RUN --out BAD
generate --workdir PICTURES FILE --out BAD
embed --workdir PICTURES FILE --feature visual/out --out BAD
data tokenizer --out BAD
data sample --out BAD
data show RECIPE --out BAD
data convert digitworld: --max-records 2 --out BAD
data chunk TEXT --tokenizer VOCABULARY --out BAD/x.array_record
convert import OFFICIAL --to BAD
convert export IMPORTED --to BAD
convert export IMPORTED --to BAD/x.pth
convert diff OFFICIAL OFFICIAL --out BAD
convert diff OFFICIAL OFFICIAL --json BAD
plan --config RECIPE --topology cpu:8 --json BAD
plan --config RECIPE --topology cpu:8 --html BAD
plan --config RECIPE --topology cpu:8 --save-executable BAD
plan --config RECIPE --topology cpu:8 --search --out BAD
report RUN --against RUN --out BAD
"""
NOT_PATHS = {
    "az://bucket/x": "expected a path on this machine, gs://BUCKET/PATH or s3://BUCKET/PATH",
    "http://host/x": "expected a path on this machine, gs://BUCKET/PATH or s3://BUCKET/PATH",
    "gs:/bucket/x": "expected gs://BUCKET/PATH",
    "gs:bucket/x": "expected gs://BUCKET/PATH",
    "gs://": "expected gs://BUCKET/PATH",
    "gs://bucket/a/../b": "an object store has no '..'",
}

Refused = Callable[[str, str], str]


@pytest.fixture(scope="module")
def compiled() -> list[str]:
    """Return a list to which every compilation adds an event."""
    events: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: events.append(event) if "backend_compile" in event else None
    )
    return events


@pytest.fixture
def refused(
    places: Places, recipes: Path, tmp_path: Path, compiled: list[str], monkeypatch: pytest.MonkeyPatch
) -> Refused:
    """Return a function that runs a command with a bad path, which must make and compile nothing; returns the error."""
    monkeypatch.chdir(tmp_path)
    root = places.local
    values = {
        "RECIPE": recipes / "text.py", "RUN": root / "text", "PICTURES": root / "pictures",
        "FILE": root / "media" / "a.png", "TEXT": root / "texts" / "a.txt", "VOCABULARY": root / "tokenizer",
        "OFFICIAL": root / "official", "IMPORTED": root / "imported",
    }  # fmt: skip

    def refused(command: str, bad: str) -> str:
        compiled.clear()
        outcome = run(command, **values, BAD=bad)
        assert (list(tmp_path.iterdir()), compiled) == ([], [])
        return error_of(outcome)

    return refused


@pytest.mark.parametrize("command", [*lines(INPUTS), *lines(OUTPUTS)])
def test_what_is_not_a_path_is_refused(command: str, refused: Refused) -> None:
    for bad, message in NOT_PATHS.items():
        error = refused(command, bad)
        assert bad.rstrip("/") in error
        assert message in error


def test_a_recipe_is_not_read_from_a_url(refused: Refused) -> None:
    message = "is a URL, and recipes are programs, which are read from this machine: copy it"
    assert refused("train --config BAD --workdir new", "gs://bucket/x.py:large").endswith(message)


@pytest.mark.parametrize("command", lines(OUTPUTS))
def test_outputs_are_in_a_bucket_that_exists_and_not_the_bucket(
    command: str, refused: Refused, object_store: str
) -> None:
    assert "the bucket does not exist" in refused(command, "gs://no-such-bucket/x")
    if "BAD/x" not in command:
        message = "gs://bucket: expected a file or folder in the bucket, as in gs://bucket/runs/one"
        assert refused(command, "gs://bucket") == message


class RefusingHandler(http.server.BaseHTTPRequestHandler):
    """Answers as Google does to those who may not read (status 401 or 403) or may only read (status 0)."""

    server: "RefusingServer"

    def handle_request(self) -> None:
        self.rfile.read(int(self.headers.get("content-length", 0)))
        if self.command == "GET" and not self.server.status:
            try:
                with urllib.request.urlopen(self.server.target + self.path) as response:
                    self.reply(response.status, response.read())
            except urllib.error.HTTPError as error:
                self.reply(error.code, error.read())
            return
        status, access = self.server.status or 403, "get" if self.command == "GET" else "create"
        who = "Anonymous caller" if status == 401 else "me@example.com"
        message = f"{who} does not have storage.objects.{access} access to the Google Cloud Storage object."
        self.reply(status, json.dumps({"error": {"code": status, "message": message}}).encode())

    do_GET = do_POST = do_PUT = do_DELETE = handle_request

    def reply(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


class RefusingServer(http.server.ThreadingHTTPServer):
    target, status = "", 0

    def handle_error(self, *_: object) -> None:
        """Ignore clients that do not wait for the answer."""


@pytest.fixture
def refusing_store(object_store: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[RefusingServer]:
    """Run an object store that refuses, which this process uses."""
    with RefusingServer(("127.0.0.1", 0), RefusingHandler) as server:
        server.target = object_store
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{server.server_port}")
        yield server
        server.shutdown()


@pytest.mark.parametrize("command", lines(INPUTS))
def test_a_bucket_that_may_not_be_read_is_an_error(
    command: str, refused: Refused, refusing_store: RefusingServer
) -> None:
    for status, message in (
        (401, "no valid credentials; log in, as with gcloud auth application-default login"),
        (403, "permission denied; grant this account access"),
    ):
        refusing_store.status = status
        error = refused(command, "gs://bucket/a run")
        assert error.startswith("gs://bucket/a run")
        assert error.endswith(message)


@pytest.mark.parametrize("command", lines(OUTPUTS))
def test_a_bucket_that_may_only_be_read_is_an_error(
    command: str, refused: Refused, refusing_store: RefusingServer, bucket: str
) -> None:
    error = refused(command, f"{bucket}/a run")
    assert f"{bucket}/a run" in error
    assert "permission denied; grant this account access" in error


def test_a_package_that_is_not_installed_is_named(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gcsfs" else find_spec(name))
    file_system_module._is_installed.cache_clear()
    try:
        for command in ("train --config RECIPE --workdir BAD", "report BAD", "data tokenizer --out BAD"):
            message = "gs://bucket/x needs the package gcsfs, which is not installed: pip install 'mplug2-jax[gcs]'"
            assert refused(command, "gs://bucket/x") == message
    finally:
        file_system_module._is_installed.cache_clear()


# All options and fields


def actions(parser: argparse.ArgumentParser, command: str = "") -> Iterator[tuple[str, argparse.Action]]:
    """Yield all options and positionals of all commands, each with its command."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, sub_parser in action.choices.items():
                yield from actions(sub_parser, f"{command} {name}".strip())
        else:
            yield command, action


PATHS = re.compile(
    "workdir|out|to|checkpoint|against|plan|html|save_executable|tokenizer|leftover|pretrained|files|texts|folder|report"
    "|sources|path"
)
"""Names of options and positionals that take a file or folder."""


def test_every_option_that_takes_a_path_takes_a_url() -> None:
    paths = []
    for command, action in actions(make_parser()):
        assert action.type is not Path, (command, action.dest)
        others = command.startswith("launch") or command == "data index"  # a pattern, as sources have it
        if PATHS.fullmatch(action.dest) and action.nargs != 0 and not others:
            assert action.type in (to_path, output_path), (command, action.dest)
        if action.type in (to_path, output_path):
            paths.append(action.dest)
    assert len(paths) >= 40


LOCAL = {
    "data_pipelines/preparation/shards.py": "a temporary file",
    "data_pipelines/storage/": "makes the paths",
    "mplug2_jax/cli/launch.py": "writes where it was started",
    "mplug2_jax/config.py": "recipes are programs of this machine",
    "mplug2_jax/conversion/engines/export_engine.py": "a temporary folder",
    "mplug2_jax/conversion/exported/": "exported folders, of machines without the data package's storage",
    "mplug2_jax/conversion/files/atomic.py": "temporary folders",
    "mplug2_jax/conversion/files/open.py": "names without folders",
    "mplug2_jax/conversion/torch_runtime/loading.py": "names without folders",
    "mplug2_jax/conversion/torch_runtime/model.py": "does not depend on the data package",
    "mplug2_jax/launch/job.py": "mounts",
    "mplug2_jax/launch/slurm.py": "the folder that the nodes share",
    "mplug2_jax/metrics/java_metrics.py": "a package, temporary folders",
    "mplug2_jax/report/results.py": "names without folders",
}
"""Modules that make a local path of more than a constant, with what it is."""


def test_no_other_module_makes_a_local_path_of_a_text(repository: Path) -> None:
    """``Path(URL)`` is a folder ``gs:`` of the current directory."""

    def is_local(node: ast.expr) -> bool:
        while isinstance(node, ast.JoinedStr | ast.BinOp):
            node = node.values[0] if isinstance(node, ast.JoinedStr) else node.left
        return isinstance(node, ast.Constant) or (isinstance(node, ast.Name) and node.id == "__file__")

    found = {
        f"{path}: {ast.unparse(node)}"
        for package in ("mplug2_jax", "data_pipelines")
        for file in sorted((repository / package).rglob("*.py"))
        if not (path := file.relative_to(repository).as_posix()).startswith(tuple(LOCAL))
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("Path", "PurePath", "PosixPath")
        and not all(map(is_local, node.args))
    }  # fmt: skip
    assert found == set()
