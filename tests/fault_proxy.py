"""An HTTP proxy before the object store of :mod:`tests.emulator`, which injects faults.

    with emulator.serve() as store, fault_proxy.serve(store) as proxy:
        emulator.use(proxy.url)
        with proxy.fault("unavailable", rate=0.02), proxy.fault("slow", rate=0.1, seconds=0.2):
            ...
        with proxy.fault("unavailable"): ...                                # an outage
        with proxy.fault("denied", only="write|delete|copy|start"): ...     # a bucket that is read-only
        with proxy.fault("missing", only=r"\\w+ my-bucket/"): ...            # a bucket that was deleted
        with proxy.fault("cut", only="write .*/checkpoints/20/"): ...       # uploads of a checkpoint that are cut

Tests import it as ``tests.fault_proxy``; benchmarks do so, too, after they put the repository's root in ``sys.path``.
"""

import contextlib
import dataclasses
import http.client
import http.server
import json
import math
import random
import re
import socket
import struct
import threading
import time
import urllib.parse
from collections.abc import Iterator
from typing import Any

KINDS = {
    "unavailable": "the reply is 503",
    "throttled": "the reply is 429",
    "denied": "the reply is 403",
    "missing": "the reply is 404, as from a bucket that does not exist",
    "lost_request": "the connection is reset before the store gets the request",
    "lost_reply": "the connection is reset after the store did what was asked",
    "cut": "the connection is reset in the middle of the request's body",
    "truncated": "the connection is closed in the middle of the reply's body",
    "slow": "the reply comes late",
    "hanging": "no reply comes, and the connection stays open",
    "stalled": "the same, and the request's body is not read",
}
_REPLIES = {
    "unavailable": (503, "Service Unavailable"),
    "throttled": (429, "rateLimitExceeded"),
    "denied": (403, "The account does not have storage.objects.create access."),
    "missing": (404, "The specified bucket does not exist."),
}


@dataclasses.dataclass(eq=False)
class Fault:
    """A fault that some requests suffer.

    Args:
        kind: one of ``KINDS``.
        rate: share of the requests that suffer it.
        only: regular expression that the beginning of ``str(request)`` must match, as ``write bucket/name``.
        times: after how many requests it has passed.
        seconds: that a slow reply takes.
    """

    kind: str
    rate: float = 1.0
    only: str = ""
    times: float = math.inf
    seconds: float = 0.5


@dataclasses.dataclass
class Request:
    """A request of a client.

    ``kind`` is ``read``, ``stat``, ``list``, ``write``, ``start`` (of an upload in several requests), ``cancel``,
    ``delete``, ``copy``, ``update`` or ``bucket``; ``name`` is that of an object, or the prefix of a list.
    """

    kind: str
    bucket: str = ""
    name: str = ""
    range: str = ""  # of bytes, as the header has it
    fault: str = ""  # that it suffered
    status: int = 0  # of the store's reply; 0 if the store did not get it
    time: float = dataclasses.field(default_factory=time.time)  # of the reply

    def __str__(self) -> str:
        return f"{self.kind} {self.bucket}/{self.name}"


@dataclasses.dataclass
class _Upload:
    """An upload in several requests.

    Google ignores bytes that it has, which come again if its reply was lost; fake-gcs-server appends them, and crashes
    if it has all. So they end here.
    """

    bucket: str
    name: str
    stored: int = 0
    reply: tuple[int, dict[str, str], bytes] | None = None  # to the last request

    def repeated(self, content_range: str) -> tuple[int, dict[str, str], bytes] | None:
        """Return the reply to a request whose bytes the store has."""
        match = re.match(r"bytes (\d+)-", content_range)
        if self.reply or not match or int(match[1]) >= self.stored:
            return self.reply
        return 308, {"Range": f"bytes=0-{self.stored - 1}"}, b""

    def record(self, status: int, headers: dict[str, str], body: bytes) -> None:
        """Remember the store's reply."""
        if status == 308:
            self.stored = int(headers["Range"].rpartition("-")[2]) + 1
        elif status == 200:
            self.reply = status, headers, body


def _upload_id(target: str) -> str:
    return urllib.parse.parse_qs(urllib.parse.urlsplit(target).query).get("upload_id", [""])[0]


class FaultProxy:
    """The proxy; all methods may be called by any thread while it serves."""

    def __init__(self, store: str, seed: int) -> None:
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self._random, self._lock, self._ended = random.Random(seed), threading.Lock(), threading.Event()
        self._uploads: dict[str, _Upload] = {}  # by the number that the store gave it
        self.store = urllib.parse.urlsplit(store).netloc
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.proxy = self
        self.host = f"127.0.0.1:{self._server.server_port}"
        self.url = f"http://{self.host}"

    @contextlib.contextmanager
    def fault(self, kind: str, **options: Any) -> Iterator[Fault]:
        """Cause a fault in this context; the options are those of :class:`Fault`."""
        assert kind in KINDS, kind
        fault = Fault(kind, **options)
        self.faults.append(fault)
        try:
            yield fault
        finally:
            self.faults.remove(fault)

    def find(self, only: str = "") -> list[Request]:
        """Return the requests that match a pattern, as in :class:`Fault`, in the order of their replies."""
        return [request for request in list(self.requests) if re.match(only, str(request))]

    def writes(self, only: str = "") -> dict[str, list[float]]:
        """Return when each object was written, in Unix seconds, by ``bucket/name``; ``only`` matches the latter."""
        times: dict[str, list[float]] = {}
        for request in list(self.requests):
            name = f"{request.bucket}/{request.name}"
            if request.kind in ("write", "copy") and request.status == 200 and re.match(only, name):
                times.setdefault(name, []).append(request.time)
        return times

    def draw(self, request: Request) -> Fault | None:
        """Return the fault that a request suffers."""
        with self._lock:
            for fault in list(self.faults):
                if fault.times > 0 and re.match(fault.only, str(request)) and self._random.random() < fault.rate:
                    fault.times -= 1
                    request.fault = fault.kind
                    return fault
        return None

    def classify(self, method: str, target: str, headers: Any, body: bytes) -> Request:
        """Return what a request asks for."""
        url = urllib.parse.urlsplit(target)
        query = {name: values[0] for name, values in urllib.parse.parse_qs(url.query).items()}
        if upload := self.find_upload(target):
            return Request("cancel" if method == "DELETE" else "write", upload.bucket, upload.name)
        match = _PATH.fullmatch(url.path)
        if not match:
            return Request("bucket")
        bucket, name, action = (urllib.parse.unquote(match[group] or "") for group in ("bucket", "name", "action"))
        if match["upload"]:
            kind = "start" if query.get("uploadType") == "resumable" else "write"
            return Request(kind, bucket, query.get("name") or _name_in_body(body))
        if match["name"] is None:
            return Request("list" if match["objects"] else "bucket", bucket, query.get("prefix", ""))
        if action:
            return Request("copy", bucket, action.rpartition("/o/")[2] or name)
        is_read = bool(match["download"]) or query.get("alt") == "media"
        kind = {"GET": "read" if is_read else "stat", "DELETE": "delete"}.get(method, "update")
        return Request(kind, bucket, name, headers.get("range", ""))

    def start_upload(self, address: str, request: Request) -> None:
        """Remember which object an upload in several requests is for."""
        self._uploads[_upload_id(address)] = _Upload(request.bucket, request.name)

    def find_upload(self, target: str) -> "_Upload | None":
        """Return the upload that a request is a part of."""
        return self._uploads.get(_upload_id(target))

    def wait_until_ended(self) -> None:
        """Wait until the proxy ends."""
        self._ended.wait()

    def run(self) -> None:
        """Serve until :meth:`end` is called."""
        self._server.serve_forever(poll_interval=0.05)

    def end(self) -> None:
        """End, with the connections that hang."""
        self._ended.set()
        self._server.shutdown()
        self._server.server_close()


@contextlib.contextmanager
def serve(store: str, seed: int = 0) -> Iterator[FaultProxy]:
    """Run a proxy before the object store at an address, in threads of this process.

    Args:
        store: the address, as ``http://127.0.0.1:4443``.
        seed: of the draws of faults; their order also depends on that of the requests.
    """
    proxy = FaultProxy(store, seed)
    thread = threading.Thread(target=proxy.run, name="fault proxy", daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.end()
        thread.join()


_PATH = re.compile(
    r"/(?:(?P<upload>upload/)|(?P<download>download/))?storage/v1/b/(?P<bucket>[^/]+)"
    r"(?P<objects>/o(?:/(?P<name>.+?)(?P<action>/(?:rewriteTo|copyTo|moveTo|compose)\b.*)?)?)?/?"
)


def _name_in_body(body: bytes) -> str:
    """Return the object's name in a request whose body begins with the object's metadata as JSON."""
    with contextlib.suppress(ValueError):
        metadata, _ = json.JSONDecoder().raw_decode(body[body.index(b"{") :].split(b"\n--")[0].decode())
        return str(metadata.get("name", ""))
    return ""


class _Server(http.server.ThreadingHTTPServer):
    proxy: FaultProxy
    request_queue_size = 256

    def shutdown_request(self, request: Any) -> None:
        self.close_request(request)  # without saying so before, so that it may be a reset

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: clients may go away."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def setup(self) -> None:
        super().setup()
        self._store = http.client.HTTPConnection(self.server.proxy.store, timeout=60)

    def finish(self) -> None:
        self._store.close()
        with contextlib.suppress(OSError):
            super().finish()

    def log_message(self, *args: object) -> None:
        """Say nothing."""

    def _relay(self) -> None:
        proxy = self.server.proxy
        if any(fault.kind == "stalled" for fault in proxy.faults):
            proxy.wait_until_ended()
            return self._reset()
        body = self._read_body()
        request = proxy.classify(self.command, self.path, self.headers, body)
        fault = proxy.draw(request)
        kind = fault.kind if fault else ""
        if fault and kind == "slow":
            time.sleep(fault.seconds)
        elif kind == "hanging":
            proxy.requests.append(request)
            proxy.wait_until_ended()
            return self._reset()
        elif kind in ("lost_request", "cut"):
            if kind == "cut":
                self._forward(body[: len(body) // 2], cut=True)
            proxy.requests.append(request)
            return self._reset()
        elif kind in _REPLIES:
            status, message = _REPLIES[kind]
            proxy.requests.append(request)
            return self._reply(status, {"content-type": "application/json"},
                               json.dumps({"error": {"code": status, "message": message}}).encode())  # fmt: skip
        upload = proxy.find_upload(self.path) if request.kind == "write" else None
        repeated = upload and upload.repeated(self.headers.get("content-range", ""))
        status, headers, reply = repeated or self._forward(body)
        if upload:
            upload.record(status, headers, reply)
        request.status, request.time = status, time.time()
        proxy.requests.append(request)
        if request.kind == "start" and (location := headers.get("Location")):
            headers["Location"] = location.replace(f"//{proxy.store}", f"//{proxy.host}")
            proxy.start_upload(location, request)
        if kind == "lost_reply":
            return self._reset()
        return self._reply(status, headers, reply, is_truncated=kind == "truncated")

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = _relay

    def _read_body(self) -> bytes:
        if self.headers.get("transfer-encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("content-length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():  # trailers
            pass
        return b"".join(parts)

    def _forward(self, body: bytes, *, cut: bool = False) -> tuple[int, dict[str, str], bytes]:
        """Return the store's reply. If the request is cut, the store gets a part of it and no reply is awaited."""
        skipped = {"host", "connection", "transfer-encoding", "content-length", "expect"}
        headers = {name: value for name, value in self.headers.items() if name.lower() not in skipped}
        self._store.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        length = self.headers.get("content-length") or 2 * len(body) + 1 if cut else len(body)
        for name, value in (headers | {"Host": self.server.proxy.store, "Content-Length": str(length)}).items():
            self._store.putheader(name, value)
        self._store.endheaders(body)
        if cut:
            self._store.close()
            return 0, {}, b""
        response = self._store.getresponse()
        reply = response.read()
        return response.status, dict(response.getheaders()), reply

    def _reply(self, status: int, headers: dict[str, str], body: bytes, *, is_truncated: bool = False) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                self.send_header(name, value)
        has_body = status >= 200 and status not in (204, 304) and self.command != "HEAD"
        if has_body:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if has_body:
            self.wfile.write(body[: len(body) // 2] if is_truncated else body)
        self.close_connection = self.close_connection or (is_truncated and has_body)

    def _reset(self) -> None:
        """End the connection so that the client sees a reset."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
