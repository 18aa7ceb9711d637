"""Google Cloud Storage by gcsfs, with names taken literally, and requests retried by the rules of ``retry``."""

import asyncio
import logging
from typing import Any

import aiohttp
from gcsfs import core

from data_pipelines.storage.retry import Backoff, http_status, is_transient, retry_limit

_TIMEOUT = aiohttp.ClientTimeout(total=600.0, sock_connect=20.0, sock_read=60.0)
"""Limits of one request in seconds: in all, to connect, and between the request and its reply or two parts of it."""
_REQUEST_SECONDS = 30.0
"""A single request is retried for this long. Then its whole operation, which may consist of hundreds, starts over."""
_LISTED = "kind,nextPageToken,prefixes,items(name,bucket,size,updated,generation)"
"""Fields of each object that a listing requests; all fields would be about 1 kB per object."""

# Without gcsfs's own retries: they log tracebacks, take half a minute at least, and know no limit.
_request_once = getattr(core.GCSFileSystem._request, "__wrapped__", core.GCSFileSystem._request)

logging.getLogger("google.auth").setLevel(logging.ERROR)  # it warns of each place that has no credentials


class GoogleStorage(core.GCSFileSystem):
    """The plain class of gcsfs: its extended one asks for the kind of the bucket before each operation."""

    cachable = False

    def __init__(self) -> None:
        super().__init__(use_listings_cache=False, requests_timeout=_TIMEOUT)  # other processes write, too

    async def _request(self, method: str, path: str, *args: Any, **kwargs: Any) -> Any:
        if path == "b/{}/o" and method == "GET":
            kwargs.setdefault("fields", _LISTED)
        is_upload = "upload_id=" in path  # one in several requests
        backoff = Backoff(min(_REQUEST_SECONDS, retry_limit()))
        while True:
            try:
                return await _request_once(self, method, path, *args, **kwargs)
            except Exception as error:
                if is_upload and (isinstance(error, FileNotFoundError) or http_status(error) == 410):
                    if method == "DELETE":
                        return 204, {}, None, b""
                    # It was completed by a request whose reply was lost, or it was forgotten.
                    raise ConnectionResetError(f"the upload to {path} has ended") from error
                if not is_transient(error) or (pause := backoff.next_pause()) is None:
                    raise
            await asyncio.sleep(pause)
