"""Requests to storage, retried while their errors are transient; and which errors are.

Transient are faults of a network or a server: 503, a timeout, a reset connection, a stale handle, an expired token. A
request that fails for longer than :func:`retry_limit` raises :class:`StorageUnavailableError`, which no handler of
damaged data catches; everything else is an ``OSError`` with a file name.
"""

import contextlib
import contextvars
import errno
import functools
import os
import random
import re
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from data_pipelines.errors import DataError, StorageUnavailableError

T = TypeVar("T")

DEFAULT_RETRY_SECONDS = 600.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 20.0
_WARN_SECONDS = 10.0
"""A request that has failed for this long is logged."""
_TRANSIENT_ERRNOS = frozenset(
    getattr(errno, name)
    for name in (
        "EAGAIN", "EBUSY", "ECONNABORTED", "ECONNREFUSED", "ECONNRESET", "EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN",
        "ENETRESET", "ENETUNREACH", "ENOTCONN", "EPIPE", "EREMOTEIO", "ESTALE", "ETIMEDOUT",
    )
    if hasattr(errno, name)
)  # fmt: skip
_TRANSIENT_TYPES = (
    ("aiohttp.", "ClientError"), ("requests.", "ConnectionError"), ("requests.", "Timeout"),
    ("requests.", "ChunkedEncodingError"), ("urllib3.", "HTTPError"), ("google.auth.", "TransportError"),
    ("google.auth.", "RefreshError"), ("botocore.", "HTTPClientError"), ("gcsfs.", "ChecksumError"),
    ("fsspec.", "FSTimeoutError"),
)  # fmt: skip
"""Modules and classes of errors of a network, compared by name: importing them all would take a second."""
_TRANSIENT_STATUS = frozenset({408, 429, *range(500, 505)})
_TRANSIENT_TEXT = re.compile(
    r"\b(UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|ABORTED)\b|CURL error|[rR]ateLimitExceeded"
)
"""In errors of tensorstore, which have no type of their own."""
_PERMANENT_TEXT = re.compile(
    r"invalid_grant|invalid_client|Reauthentication is needed|CERTIFICATE_VERIFY_FAILED|out of memory", re.IGNORECASE
)
"""In errors that are permanent although they match the above: of a login, a proxy, or the memory of a device."""
_MOUNTS = Path("/proc/self/mounts")
_NETWORK_KIND = re.compile("fuse(?!blk)|nfs|cifs|smb|9p|lustre|beegfs|ceph|glusterfs|gpfs")
_DENIED_TEXT = re.compile(r"\b(PERMISSION_DENIED|UNAUTHENTICATED)\b|Forbidden|Anonymous caller|Invalid Credentials")

_retry_seconds = DEFAULT_RETRY_SECONDS
_retry_seconds_here: contextvars.ContextVar[float] = contextvars.ContextVar("retry_seconds", default=float("inf"))


def set_retry_limit(seconds: float) -> None:
    """Set how long a request is retried in this process while its errors are transient."""
    global _retry_seconds
    _retry_seconds = seconds


def retry_limit() -> float:
    """Return how long a request is retried, in seconds."""
    return min(_retry_seconds, _retry_seconds_here.get())


@contextlib.contextmanager
def shorter_retries(seconds: float) -> Iterator[None]:
    """Retry the requests of this context for at most so many seconds; 0 for one attempt."""
    token = _retry_seconds_here.set(seconds)
    try:
        yield
    finally:
        _retry_seconds_here.reset(token)


class Backoff:
    """The pauses between the attempts at something: twice as long each time, and none after a limit in seconds."""

    def __init__(self, limit: float) -> None:
        self._limit, self._start, self._pause = limit, time.monotonic(), _FIRST_PAUSE

    @property
    def elapsed(self) -> float:
        """Return the seconds since the first attempt began."""
        return time.monotonic() - self._start

    def next_pause(self) -> float | None:
        """Return how many seconds to wait before the next attempt; None if that would be after the limit."""
        pause, self._pause = self._pause, min(2 * self._pause, _LONGEST_PAUSE)
        return pause * random.uniform(0.5, 1) if self.elapsed + pause <= self._limit else None


def is_url(path: str | os.PathLike[str]) -> bool:
    """Return whether a path is a URL, on another file system than this machine's."""
    return "://" in os.fspath(path)


def is_transient(error: BaseException) -> bool:
    """Return whether an error, or one that caused it, is a fault of a network or a server that may pass by itself."""
    if isinstance(error, FileNotFoundError | FileExistsError | PermissionError | DataError) or _is_bug(error):
        return False
    chain = list(_with_causes(error))
    return any(map(_is_transient, chain)) and not any(_PERMANENT_TEXT.search(str(cause)) for cause in chain)


def _is_bug(error: BaseException) -> bool:
    """Return whether an error is none that storage causes, as a TypeError."""
    if isinstance(error, NotImplementedError | RecursionError):
        return True
    of_storage = OSError | ValueError | RuntimeError | ImportError | BaseExceptionGroup
    return type(error).__module__ == "builtins" and type(error) is not Exception and not isinstance(error, of_storage)


def _with_causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and all that caused it."""
    seen: set[int] = set()
    pending: list[BaseException | None] = [error]
    while pending:
        current = pending.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        pending += [current.__cause__, None if current.__suppress_context__ else current.__context__]
        if isinstance(current, BaseExceptionGroup):
            pending += current.exceptions


def http_status(error: BaseException) -> Any:
    """Return the HTTP status of an error, as aiohttp and gcsfs call it; None if it has none."""
    return getattr(error, "status", None) or getattr(error, "code", None)


def _is_transient(error: BaseException) -> bool:
    if isinstance(error, StorageUnavailableError | ConnectionError | TimeoutError | socket.gaierror):
        return True
    code = http_status(error)
    if code == 401 and "Invalid Credentials" in str(error):  # an expired token; gcsfs fetches a new one
        return True
    if isinstance(code, int | str) and str(code).isdigit():
        return int(code) in _TRANSIENT_STATUS
    if any(
        base.__module__.startswith(module) and base.__name__ == name
        for base in type(error).__mro__
        for module, name in _TRANSIENT_TYPES
    ):
        return True
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _TRANSIENT_ERRNOS
    return bool(_TRANSIENT_TEXT.search(str(error)))


def is_remote(path: str) -> bool:
    """Return whether a path is a URL, or on a mount of a network.

    Libraries that open such a file themselves take a failed read for damage: they are given its bytes.
    """
    return is_url(path) or _is_on_network(os.path.dirname(path))


def is_transient_at(error: Exception, path: str) -> bool:
    """Return whether an error is transient at a path: an I/O error also is on a network's mount, and not on a disk."""
    is_mount_error = isinstance(error, OSError) and error.errno == errno.EIO and not is_url(path) and is_remote(path)
    return is_mount_error or is_transient(error)


@functools.lru_cache(maxsize=1024)
def _is_on_network(folder: str) -> bool:
    """Return whether a local folder is a mount of a network or of a program, as gcsfuse (Linux)."""
    kinds = {"/": ""}
    with contextlib.suppress(OSError):
        for line in _MOUNTS.read_text(errors="replace").splitlines():
            _, mount, kind, *_ = line.split(" ")
            kinds[re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), mount)] = kind
    path = Path(os.path.realpath(folder))
    kind = next((kinds[str(parent)] for parent in (path, *path.parents) if str(parent) in kinds), "")
    return bool(_NETWORK_KIND.match(kind))


def is_access_error(error: BaseException) -> bool:
    """Return whether an error says that a file may not be read or written, and so nothing about its contents."""
    return any(isinstance(e, PermissionError) or _DENIED_TEXT.search(str(e)) for e in _with_causes(error))


def is_refused(path: str, error: BaseException) -> bool:
    """Return whether storage refuses to let this account read a URL. A web server refuses single files to everybody."""
    return is_url(path) and not path.startswith(("http://", "https://")) and is_access_error(error)


def retry(operation: Callable[[], T], path: str) -> T:
    """Return the result of an operation, retried while it fails with transient errors.

    Args:
        operation: without effect if it fails, or one that may be retried.
        path: that it reads or writes, for messages.

    Raises:
        StorageUnavailableError: it failed for longer than the limit.
        OSError: any other failure, with the path and the reason.
    """
    limit = retry_limit()
    backoff, warned = Backoff(limit), False
    while True:
        try:
            return operation()
        except StorageUnavailableError:
            raise
        except Exception as error:
            if not is_transient_at(error, path):
                problem = as_os_error(error, path)
                if problem is error:
                    raise
                raise problem from error
            pause, elapsed = backoff.next_pause(), backoff.elapsed
            if pause is None:
                raise StorageUnavailableError(
                    f"{path} has been unavailable for {elapsed:.0f} s ({_reason(error)}); start again later"
                ) from error
            if elapsed >= _WARN_SECONDS and not warned:
                from absl import logging  # here, because exported folders have this file and do without the package

                logging.warning("%s is unavailable (%s); retrying for up to %g s", path, _reason(error), limit)
                warned = True
        time.sleep(pause)


def as_os_error(error: Exception, path: str) -> Exception:
    """Return an error of storage as an OSError with a file name; what is no fault of storage stays as it is."""
    if isinstance(error, DataError | ExceptionGroup) or _is_bug(error):
        return error
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        return error
    if isinstance(error, ImportError):
        return DataError(f"{path} cannot be opened: {error}")
    if isinstance(error, FileNotFoundError | FileExistsError | IsADirectoryError | NotADirectoryError):
        number = {FileNotFoundError: errno.ENOENT, FileExistsError: errno.EEXIST}.get(type(error), error.errno)
        return type(error)(number, os.strerror(number) if number else str(error), path)
    if is_access_error(error):
        no_login = "Anonymous caller" in str(error) or "Invalid Credentials" in str(error)
        hint = "no valid credentials; log in, as with gcloud auth application-default login" if no_login else (
            "permission denied; grant this account access"
        )  # fmt: skip
        return PermissionError(errno.EACCES, hint, path)
    number = error.errno if isinstance(error, OSError) and error.errno else errno.EIO
    return OSError(number, _reason(error), path)


def _reason(error: BaseException) -> str:
    if isinstance(error, TimeoutError) and not str(error):
        return "no answer"
    code = http_status(error)
    text = " ".join((getattr(error, "strerror", None) or str(error)).split())[:200] or type(error).__name__
    return text if not code or str(code) in text else f"{code} {text}"
