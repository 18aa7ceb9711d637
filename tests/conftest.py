"""Fixtures for all tests. Types and shapes of every call into our packages are checked, unless CHECK_TYPES=0."""

import collections
import gc
import itertools
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import jax
import pytest

from tests import emulator, fault_proxy, type_checks

os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # several test processes compile for TPUs at the same time
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
# Programs of tests run once or twice, so optimizing them would take most of the time.
jax.config.update("jax_disable_most_optimizations", True)
# A cached program with these fusions takes twice as long to load: each searches the whole program for its operation.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_experimental_ynn_fusion_type="
# One part per program instead of 32 would save 7 %, but then devices sometimes wait for each other forever.
if jax.__version_info__ < (0, 11):  # newer XLA exits at this flag, which it does not know
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

# No test asserts times; the first example of a property test compiles, or waits for other tests.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

if os.environ.get("CHECK_TYPES") != "0":
    type_checks.install()

REPOSITORY = Path(__file__).resolve().parents[1]


def pytest_configure(config: pytest.Config) -> None:
    """Share compiled programs between workers, processes that tests start, and the runs of one CI job."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in background jobs of a shell
        signal.signal(signal.SIGINT, signal.default_int_handler)  # or Ctrl-C would not stop tests and their processes
    if hasattr(config, "workerinput"):  # a worker inherits the controller's environment
        return
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        folder = tempfile.mkdtemp(prefix="mplug2-tests-compiled-")
        os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
        jax.config.update("jax_compilation_cache_dir", folder)
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Do not import files without a long test where only those are wanted: each worker spends 10 s on them."""
    long_only = config.option.markexpr == "slow" and collection_path.name.startswith("test_")
    return True if long_only and "mark.slow" not in collection_path.read_text(encoding="utf-8") else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the long tests at the root of tests/ first: at the end they would run alone.

    Tests that share a fixture of their module get a group, which one worker runs: each worker would make the fixture.
    """
    items.sort(key=lambda item: item.path.parent != REPOSITORY / "tests")
    for item in items:
        fixtures = item._fixtureinfo.name2fixturedefs.values() if hasattr(item, "_fixtureinfo") else ()
        if any(definition.scope == "module" for definitions in fixtures for definition in definitions):
            item.add_marker(pytest.mark.xdist_group(str(item.path)))


def pytest_collection_finish() -> None:
    """Freeze imported objects: scanning them in garbage collections takes a tenth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture(scope="session")
def reference() -> Path:
    """Return the folder of the official release's golden numbers: MPLUG2_REFERENCE, or next to the repository."""
    return _external_folder("MPLUG2_REFERENCE", "reference", "golden numbers of the release")


@pytest.fixture(scope="session")
def schemas() -> Path:
    """Return the folder of other projects' schemas: MPLUG2_SCHEMAS, or next to the repository."""
    return _external_folder("MPLUG2_SCHEMAS", "schemas", "schemas of other projects")


MISSING = "not found at"


def _external_folder(variable: str, name: str, what: str) -> Path:
    """Return a folder outside the repository, or skip the test that needs it."""
    folder = Path(os.environ.get(variable, REPOSITORY.parent / "shared" / name))
    if not folder.is_dir():
        pytest.skip(f"{what} {MISSING} {folder}; set {variable} to the folder that has them")
    return folder


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Report missing folders once, with the tests that were skipped."""
    files: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for report in terminalreporter.stats.get("skipped", ()):
        reason = report.longrepr[2].removeprefix("Skipped: ") if isinstance(report.longrepr, tuple) else ""
        if MISSING in reason:
            files[reason][report.nodeid.partition("::")[0]] += 1
    for reason, counts in files.items():
        tests = ", ".join(f"{file} ({count})" for file, count in sorted(counts.items()))
        terminalreporter.write_line(f"{counts.total()} tests skipped: {reason}: {tests}")


@pytest.fixture(scope="session")
def object_store() -> Iterator[str]:
    """Run an object store, which this process and those that it starts use for gs://, and return its address."""
    with emulator.serve() as url:
        emulator.use(url)  # for good: the libraries read these variables once
        yield url


@pytest.fixture
def bucket(object_store: str) -> str:
    """Return the URL of a new bucket."""
    return emulator.make_bucket(object_store, f"bucket-{next(_BUCKETS)}")


_BUCKETS = itertools.count()


@pytest.fixture
def proxy(object_store: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[fault_proxy.FaultProxy]:
    """Return a proxy that makes faults, through which this process uses gs:// (but for tensorstore), with short pauses.

    Processes that a test starts need ``emulator.environment(proxy.url)``.
    """
    monkeypatch.setattr("data_pipelines.storage.retry._FIRST_PAUSE", 0.01)
    with fault_proxy.serve(object_store) as proxy:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.url)
        yield proxy


@pytest.fixture
def optimized() -> Iterator[None]:
    """Compile programs as users do, for tests that inspect them."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="session")
def repository() -> Path:
    """Return the root of the repository."""
    return REPOSITORY
