"""The connection of a process to an S3 store, and when it is made anew."""

from __future__ import annotations

import asyncio
import os
import threading
from datetime import datetime
from typing import Any

from vidbatch.storage.base import StoreSettings

CONNECT_TIMEOUT_S = 10
READ_TIMEOUT_S = 60
"""Without an answer or a further byte for so long the request is sent again."""
CONNECTIONS = 64
"""Of one process to one store; several decoders' read-ahead share them."""

_connections: dict[Any, Any] = {}
_connecting = threading.Lock()


def forget(fs: Any) -> None:
    """The next request connects anew, with what the chain of credentials gives by then."""
    with _connecting:
        for key in [k for k, known in _connections.items() if known is fs]:
            del _connections[key]


def connect(settings: StoreSettings) -> Any:
    """The S3FileSystem of these settings and of the environment's credentials, made once."""
    chain = tuple(sorted(i for i in os.environ.items() if i[0].startswith("AWS_")))
    with _connecting:
        key = (os.getpid(), settings, READ_TIMEOUT_S, chain)
        if key not in _connections:
            _connections[key] = _new_connection(settings)
        return _connections[key]


def _new_connection(settings: StoreSettings) -> Any:
    import s3fs
    from aiobotocore.session import AioSession  # type: ignore[import-untyped]

    session = AioSession(profile=settings.profile)
    # botocore's own guesses the format: half the CPU time of listing a key
    parsers = session.get_component("response_parser_factory")
    parsers.set_parser_defaults(timestamp_parser=_timestamp)
    fs = s3fs.S3FileSystem(
        session=session,
        endpoint_url=settings.endpoint_url,
        requester_pays=settings.requester_pays,
        client_kwargs={"region_name": settings.region} if settings.region else {},
        config_kwargs={
            "connect_timeout": CONNECT_TIMEOUT_S,
            "read_timeout": READ_TIMEOUT_S,
            "max_pool_connections": CONNECTIONS,
            "retries": {"mode": "standard", "total_max_attempts": 1},
            # Content-MD5 guards what we put; older servers answer 411 to trailing checksums
            "request_checksum_calculation": "when_required",
            "response_checksum_validation": "when_required",
        },
        use_listings_cache=False,
        skip_instance_cache=True,
    )
    fs.retries = 1
    fs.loop.set_exception_handler(_on_stray_error)
    return fs


def _on_stray_error(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """For what no request waits for any more.

    When a server dies, aiohttp forgets the task that was sending the body; the request itself has
    failed and is sent again, so the task's own error is no news.
    """
    if not isinstance(context.get("exception"), ConnectionResetError):
        loop.default_exception_handler(context)


def _timestamp(value: Any) -> datetime:
    """What the parsers of botocore take a time for, the ISO form of listings first."""
    from botocore.utils import parse_timestamp  # type: ignore[import-untyped]

    try:
        found = datetime.fromisoformat(value)
    except (TypeError, ValueError):
        found = None
    if found is not None and found.tzinfo is not None:
        return found
    guessed: datetime = parse_timestamp(value)
    return guessed
