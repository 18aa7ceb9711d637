"""What every test may ask for. Types and shapes of every call into our packages are checked while tests run."""

import collections
import functools
import gc
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import jax
import pytest
from jaxtyping import install_import_hook

os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # ahead-of-time compilation beside other test processes
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
# Programs of tests run once or twice: optimising them would take most of the time.
jax.config.update("jax_disable_most_optimizations", True)
if jax.__version_info__ < (0, 11):  # XLA ends the process at a flag that it does not know
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_use_fusion_emitters=false"
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

# No test asserts times; the first call of a search compiles, or waits for other tests.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

install_import_hook(["mplug2_jax", "data_pipelines"], "beartype.beartype")

REPOSITORY = Path(__file__).resolve().parents[1]


def pytest_configure(config: pytest.Config) -> None:
    """Share compiled programs between workers, the processes that tests start, and the runs of one CI."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as a shell starts its jobs in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)  # or tests and their processes were deaf to Ctrl-C
    if hasattr(config, "workerinput"):  # a worker: it has inherited the environment that the controller set
        return
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        folder = tempfile.mkdtemp(prefix="mplug2-tests-compiled-")
        os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
        jax.config.update("jax_compilation_cache_dir", folder)
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole pages and benchmarks come before the tests of rooms: the longest at the end would run alone."""
    items.sort(key=lambda item: item.path.parent != REPOSITORY / "tests")


def pytest_collection_finish() -> None:
    """Spare Python's collector what is imported by now: looking through it again and again is a tenth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture(scope="session", autouse=True)
def _train_tokenizers_once() -> Iterator[None]:
    """Train each tokeniser once: nearly every run of a test asks for the same."""
    from mplug2_jax.training import workdir

    def once(train: Callable[..., Any]) -> Callable[..., Any]:
        @functools.cache
        def trained(source: Callable[[], Any], vocab_size: int) -> Any:  # a test may put another source in place
            return train(workdir.tokenizer_training_texts(), vocab_size)

        return lambda texts, vocab_size: trained(workdir.vocabulary_texts, vocab_size)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workdir, "train_wordpiece", once(workdir.train_wordpiece))
        patch.setattr(workdir, "train_sentencepiece", once(workdir.train_sentencepiece))
        yield


@pytest.fixture(scope="session")
def reference() -> Path:
    """The folder with the official release's facts and golden numbers: MPLUG2_REFERENCE, or beside the repository."""
    return _beside("MPLUG2_REFERENCE", "reference", "golden numbers of the release")


@pytest.fixture(scope="session")
def schemas() -> Path:
    """The folder with other projects' schemas: MPLUG2_SCHEMAS, or beside the repository."""
    return _beside("MPLUG2_SCHEMAS", "schemas", "schemas of other projects")


ABSENT = "are not at"


def _beside(variable: str, name: str, what: str) -> Path:
    """Return a folder of files that do not belong to the repository, or skip the test that needs it."""
    folder = Path(os.environ.get(variable, REPOSITORY.parent / "shared" / name))
    if not folder.is_dir():
        pytest.skip(f"the {what} {ABSENT} {folder}; set {variable} to the folder that holds them")
    return folder


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say once what was not there, and which tests were skipped for it."""
    files: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for report in terminalreporter.stats.get("skipped", ()):
        reason = report.longrepr[2].removeprefix("Skipped: ") if isinstance(report.longrepr, tuple) else ""
        if ABSENT in reason:
            files[reason][report.nodeid.partition("::")[0]] += 1
    for reason, counts in files.items():
        listed = ", ".join(f"{file} ({count})" for file, count in sorted(counts.items()))
        terminalreporter.write_line(f"{counts.total()} tests skipped: {reason}: {listed}")


@pytest.fixture
def optimized() -> Iterator[None]:
    """Programs are compiled as users compile them: for tests that look at the compiled program."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The checkout."""
    return REPOSITORY
