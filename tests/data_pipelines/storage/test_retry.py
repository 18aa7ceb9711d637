"""Requests end in the right value or error: which faults are transient, and how long they are retried."""

import contextlib
import errno
import os
import threading
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import google.auth.exceptions
import pytest
import requests
from gcsfs.retry import ChecksumError, HttpError

from data_pipelines.errors import DataError, StorageUnavailableError
from data_pipelines.storage import retry
from data_pipelines.storage.file_system import file_system
from data_pipelines.storage.paths import to_path
from tests import fault_proxy


def http_error(code: int | str, message: str = "") -> HttpError:
    return HttpError({"code": code, "message": message})


def because(error: Exception, cause: BaseException | None = None, *, context: BaseException | None = None) -> Exception:
    error.__context__ = context
    if cause is not None:
        error.__cause__ = cause
    return error


def hidden(error: Exception) -> Exception:
    """Return an error raised "from None" while a connection was reset."""
    error.__context__, error.__suppress_context__ = ConnectionResetError(), True
    return error


def circular() -> Exception:
    first, second = ValueError("a"), ValueError("b")
    first.__cause__, second.__cause__ = second, first
    return first


def connector_error(reason: OSError) -> Exception:
    host: Any = types.SimpleNamespace(host="storage.googleapis.com", port=443, is_ssl=True, ssl=True)
    return aiohttp.ClientConnectorError(host, reason)


NO_GRANT = google.auth.exceptions.RefreshError("invalid_grant: Token has been expired or revoked.")
TRANSIENT = [
    ConnectionResetError(),
    TimeoutError(),
    *(OSError(getattr(errno, name), "") for name in ("ESTALE", "ETIMEDOUT", "EHOSTUNREACH", "ENETDOWN", "EBUSY")),
    aiohttp.ServerDisconnectedError(),
    aiohttp.ServerTimeoutError(),
    aiohttp.ClientPayloadError("Response payload is not completed"),
    aiohttp.ClientOSError(errno.EINVAL, "Can not write request body"),
    connector_error(OSError(errno.ECONNREFUSED, "Connect call failed")),
    connector_error(OSError(-3, "Temporary failure in name resolution")),
    *(http_error(code) for code in (408, 429, 500, 502, 503, 504, "503")),
    http_error(401, "Invalid Credentials"),
    ChecksumError("md5"),
    requests.ConnectionError(),
    requests.ReadTimeout(),
    requests.exceptions.ProxyError(),
    requests.exceptions.ChunkedEncodingError(),
    google.auth.exceptions.TransportError("Failed to retrieve http://metadata.google.internal"),
    google.auth.exceptions.RefreshError("HTTPSConnectionPool: Read timed out."),
    ValueError("UNAVAILABLE: Error reading: CURL error 56: Recv failure [source locations='x.cc']"),
    RuntimeError("DEADLINE_EXCEEDED: Deadline Exceeded"),
    ValueError("CURL error 6: Could not resolve host: storage.googleapis.com"),
    StorageUnavailableError("gs://b/x has been unavailable for 600 s"),
    ExceptionGroup("saves", [ValueError("a"), ExceptionGroup("arrays", [http_error(503)])]),
    because(ValueError("checkpoint cannot be read"), ConnectionResetError()),
    because(OSError(errno.EIO, "read failed"), context=OSError(errno.ESTALE, "Stale file handle")),
]
PERMANENT = [
    *(OSError(getattr(errno, name), "") for name in ("ENOENT", "EACCES", "ENOSPC", "EIO", "EISDIR", "EROFS")),
    *(http_error(code) for code in (400, 401, 403, 404, 409, 412)),
    because(http_error(401, "Invalid Credentials"), NO_GRANT),
    NO_GRANT,
    google.auth.exceptions.DefaultCredentialsError("no credentials"),
    connector_error(OSError(1, "[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed")),
    aiohttp.ClientResponseError(None, (), status=404),  # type: ignore[arg-type]
    requests.exceptions.InvalidURL(),
    OSError("Forbidden: gs://b/x"),
    ValueError("NOT_FOUND: no such object"),
    ValueError("PERMISSION_DENIED: x"),
    RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 16 bytes"),
    ValueError("unavailable"),
    DataError("a damaged file"),
    ExceptionGroup("saves", [ValueError("a"), OSError(errno.ENOSPC, "")]),
    because(FileNotFoundError(), ConnectionResetError()),
    because(TypeError("a bug in the handler"), context=ConnectionResetError()),
    because(KeyError("headers"), context=http_error(503)),
    hidden(ValueError("bad value")),
    circular(),
]


@pytest.mark.parametrize("error", TRANSIENT, ids=repr)
def test_faults_of_networks_and_servers_are_transient(error: Exception) -> None:
    assert retry.is_transient(error)


@pytest.mark.parametrize("error", PERMANENT, ids=repr)
def test_other_errors_are_permanent(error: Exception) -> None:
    assert not retry.is_transient(error)


class Failing:
    """An operation that fails with some errors, and then returns "done"."""

    def __init__(self, *errors: Exception) -> None:
        self.errors, self.attempts = list(errors), 0

    def __call__(self) -> str:
        self.attempts += 1
        if self.errors:
            raise self.errors.pop(0)
        return "done"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """Replace the clock by one that only pauses advance."""
    clock = types.SimpleNamespace(now=0.0, pauses=[])

    def sleep(seconds: float) -> None:
        clock.now += seconds
        clock.pauses.append(seconds)

    monkeypatch.setattr(retry, "time", types.SimpleNamespace(monotonic=lambda: clock.now, sleep=sleep))
    return clock


def test_the_limit_ends_in_one_sentence(clock: types.SimpleNamespace, caplog: pytest.LogCaptureFixture) -> None:
    operation = Failing(*[http_error(503, "Backend Error")] * 1000)
    with pytest.raises(StorageUnavailableError) as raised:
        retry.retry(operation, "gs://b/x")
    assert 540 < clock.now <= 600
    assert (
        str(raised.value)
        == f"gs://b/x has been unavailable for {clock.now:.0f} s (Backend Error, 503); start again later"
    )
    assert isinstance(raised.value.__cause__, HttpError)
    assert clock.pauses[0] <= 0.5
    assert max(clock.pauses) <= 20
    assert operation.attempts == len(clock.pauses) + 1 < 60
    (warning,) = caplog.messages
    assert warning == "gs://b/x is unavailable (Backend Error, 503); retrying for up to 600 s"


def test_a_limit_of_a_context_is_never_longer_and_of_its_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "_retry_seconds", 100.0)
    elsewhere: list[float] = []
    with retry.shorter_retries(500.0):
        assert retry.retry_limit() == 100
    with retry.shorter_retries(0.0):
        thread = threading.Thread(target=lambda: elsewhere.append(retry.retry_limit()))
        thread.start()
        thread.join()
        operation = Failing(*[ConnectionResetError()] * 9)
        with pytest.raises(StorageUnavailableError, match="for 0 s"):
            retry.retry(operation, "gs://b/x")
        assert operation.attempts == 1
    assert elsewhere == [100]


@pytest.mark.parametrize(
    "bug", [TypeError("a"), KeyError("b"), AssertionError(), NotImplementedError(), RecursionError()]
)
def test_bugs_stay_what_they_are(bug: Exception) -> None:
    operation = Failing(bug)
    with pytest.raises(type(bug)) as raised:
        retry.retry(operation, "gs://b/x")
    assert raised.value is bug
    assert operation.attempts == 1


@pytest.mark.parametrize(
    ("error", "kind", "number", "reason"),
    [
        (OSError("Forbidden: https://x"), PermissionError, errno.EACCES,
         "permission denied; grant this account access"),
        (http_error(401, "Anonymous caller does not have storage.objects.get access"), PermissionError, errno.EACCES,
         "no valid credentials; log in, as with gcloud auth application-default login"),
        (because(http_error(401, "Invalid Credentials"), NO_GRANT), PermissionError, errno.EACCES,
         "no valid credentials; log in, as with gcloud auth application-default login"),
        (FileNotFoundError("https://x"), FileNotFoundError, errno.ENOENT, "No such file or directory"),
        (FileExistsError("b/x"), FileExistsError, errno.EEXIST, "File exists"),
        (http_error(400, "Bad\n  Request"), OSError, errno.EIO, "Bad Request, 400"),
        (ValueError("Bad Request: x"), OSError, errno.EIO, "Bad Request: x"),
        (OSError(errno.ENOSPC, "No space left on device"), OSError, errno.ENOSPC, "No space left on device"),
    ],
    ids=repr,
)  # fmt: skip
def test_errors_name_the_file_and_the_reason(error: Exception, kind: type[OSError], number: int, reason: str) -> None:
    with pytest.raises(OSError) as raised:  # noqa: PT011
        retry.retry(Failing(error), "gs://b/x")
    assert type(raised.value) is kind
    assert (raised.value.errno, raised.value.strerror, raised.value.filename) == (number, reason, "gs://b/x")


MOUNTS = """\
/dev/sda1 / ext4 rw 0 0
filer:/v /mnt/my\\040data nfs4 rw 0 0
gcsfuse /mnt/bucket fuse.gcsfuse rw 0 0
/dev/sdb1 /mnt/usb fuseblk rw 0 0
"""


@pytest.fixture
def mounts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    (tmp_path / "mounts").write_text(MOUNTS)
    monkeypatch.setattr(retry, "_MOUNTS", tmp_path / "mounts")
    retry._is_on_network.cache_clear()
    yield
    retry._is_on_network.cache_clear()


@pytest.mark.usefixtures("mounts", "clock")
def test_an_error_of_input_is_damage_on_a_disk_and_transient_on_a_mount_of_a_network() -> None:
    damage = OSError(errno.EIO, "Input/output error")
    for path in ("/mnt/my data/a/x", "/mnt/bucket/x"):
        assert retry.retry(Failing(damage), path) == "done"
    for path in ("/data/x", "/mnt/usb/x", "gs://b/x"):
        with pytest.raises(OSError, match="Input/output error"):
            retry.retry(Failing(damage), path)


@pytest.mark.parametrize("kind", ["unavailable", "throttled", "lost_request", "lost_reply", "cut", "truncated"])
def test_every_request_ends_in_the_right_value(proxy: fault_proxy.FaultProxy, bucket: str, kind: str) -> None:
    system, name = file_system(f"{bucket}/file")
    data = os.urandom(1000)

    @contextlib.contextmanager
    def fault() -> Iterator[None]:
        with proxy.fault(kind, times=2) as fault:
            yield
        assert fault.times == 0

    with fault():
        system.write(name, data)
    with fault():
        assert system.cat_file(name, 10, 20) == data[10:20]
    with fault():
        assert system.cat_ranges([name, name], [0, 5], [5, 9]) == [data[:5], data[5:9]]
    with fault():
        assert system.info(name)["size"] == 1000
    with fault():
        assert system.ls(bucket.removeprefix("gs://")) == [name]
    with fault():
        assert not system.create(name, b"other")
    with fault():
        assert system.create(f"{name}-2", b"new")
    with fault():
        system.copy(name, f"{name}-3")
    with fault():
        system.rm_file(name)
    with fault():
        assert not system.exists(name)
    assert system.find(bucket.removeprefix("gs://")) == [f"{name}-2", f"{name}-3"]
    assert system.cat_file(f"{name}-3") == data


def test_a_bad_day_changes_nothing(proxy: fault_proxy.FaultProxy, bucket: str) -> None:
    files = {to_path(f"{bucket}/{n}"): os.urandom(n * 100) for n in range(60)}
    with contextlib.ExitStack() as stack:
        for kind in ("unavailable", "lost_request", "lost_reply", "truncated", "cut"):
            stack.enter_context(proxy.fault(kind, rate=0.03))
        for path, data in files.items():
            path.write_bytes(data)
        assert sorted(to_path(bucket).iterdir()) == sorted(files)
        assert {path: path.read_bytes() for path in files} == files
    assert len([request for request in proxy.requests if request.fault]) > 5


@pytest.mark.parametrize("kind", ["unavailable", "lost_request", "hanging", "stalled"])
def test_an_outage_ends_in_one_sentence(
    proxy: fault_proxy.FaultProxy, bucket: str, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    system, name = file_system(f"{bucket}/file")
    monkeypatch.setattr(retry, "_retry_seconds", 0.1)
    monkeypatch.setattr(system._system, "requests_timeout", aiohttp.ClientTimeout(total=0.5, sock_read=0.2))
    with proxy.fault(kind), pytest.raises(StorageUnavailableError, match=r"/file has been unavailable for \d s \(.+\)"):
        system.write(name, bytes(20_000_000))
    assert not system.exists(name)


def test_a_bucket_that_refuses_and_one_that_is_gone(proxy: fault_proxy.FaultProxy, bucket: str) -> None:
    path = to_path(f"{bucket}/run/file")
    path.write_text("1")
    with proxy.fault("denied", only="write|start|delete"):
        with pytest.raises(PermissionError, match=r"permission denied; grant this account access: 'gs://.*/run/file'"):
            path.write_text("2")
        with pytest.raises(PermissionError, match="permission denied"):
            path.unlink()
        assert path.read_text() == "1"
    with proxy.fault("denied"):
        for ask in (path.exists, path.is_file, path.is_dir, path.parent.is_dir, path.read_bytes):
            with pytest.raises(PermissionError):
                ask()
    with proxy.fault("missing"):
        with pytest.raises(FileNotFoundError, match=r"the bucket does not exist: 'gs://.*/run/file'"):
            path.write_text("2")
        with pytest.raises(FileNotFoundError):
            path.read_text()
        assert not path.exists()
    assert len(proxy.find("write")) == 3  # nothing of this was retried
