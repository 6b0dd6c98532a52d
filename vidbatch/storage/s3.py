"""S3 and what speaks its protocol, through s3fs: one request per call, retried and counted here.

Neither s3fs nor botocore repeats a request (each would multiply the other's patience): `persist`
does. (aiohttp sends once more by itself when a connection is reset.) Errors are told apart by the
answer's status and code, never by errno: s3fs maps 43 codes to EINVAL, and not every server fills
in the message of a 412.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Mapping
from datetime import datetime
from functools import partial
from typing import Any

from vidbatch.errors import (
    ExistsInStore,
    ForbiddenByStore,
    NotFoundInStore,
    StoreError,
    UsageError,
    VidbatchError,
)
from vidbatch.storage.base import (
    Entry,
    Store,
    StoreSettings,
    changed,
    check_put,
    persist,
    shown,
    utc,
)
from vidbatch.storage.checksum import is_damaged
from vidbatch.storage.s3_connection import connect, forget

PAGE_KEYS = 1000

_RIGHTS = "check the credentials in the environment and the rights of their user"
_CODES: dict[str, tuple[type[StoreError], str, str, str]] = {
    "NoSuchBucket": (NotFoundInStore, "no_bucket", "there is no such bucket",
                     "check its name and the endpoint_url"),
    "InvalidBucketName": (NotFoundInStore, "no_bucket", "this is no name of a bucket",
                          "check its name"),
    "InvalidAccessKeyId": (ForbiddenByStore, "wrong_key", "the store does not know this access key",
                           "check AWS_ACCESS_KEY_ID, the profile and the endpoint_url"),
    "SignatureDoesNotMatch": (ForbiddenByStore, "wrong_secret",
                              "the secret key does not belong to the access key",
                              "check AWS_SECRET_ACCESS_KEY or the profile"),
    "ExpiredToken": (ForbiddenByStore, "expired", "the credentials have expired",
                     "renew them and submit the same command"),
    "RequestTimeTooSkewed": (ForbiddenByStore, "clock_skew",
                             "this machine's clock differs from the store's", "set the clock"),
    "InvalidObjectState": (StoreError, "archived_object",
                           "the object lies in an archive tier and cannot be read at once",
                           "restore it first"),
    "PermanentRedirect": (StoreError, "wrong_region", "the bucket lies in another region",
                          "set store.region"),
    "AuthorizationHeaderMalformed": (StoreError, "wrong_region",
                                     "the bucket lies in another region", "set store.region"),
    "NotImplemented": (StoreError, "not_supported", "the store cannot do this",
                       "use a store with conditional PUT"),
}  # fmt: skip
_TRANSIENT_CODES = {
    "BadDigest": "reset",
    "IncompleteBody": "reset",
    "XAmzContentSHA256Mismatch": "reset",
    "RequestTimeout": "timeout",
    "SlowDown": "busy",
}
_TRANSIENT_STATUS = {409: "conflict", 429: "busy", 503: "busy"}


class S3Store(Store):
    """Objects under `s3://bucket/prefix`."""

    def __init__(self, bucket: str, prefix: str, settings: StoreSettings) -> None:
        self.bucket, self.settings = bucket, settings
        self.uri = f"s3://{bucket}/{prefix}".rstrip("/")
        self._root = f"{prefix}/" if prefix else ""

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """See `Store.list`."""
        more: dict[str, str] = {}
        while True:
            page = self._call(
                "list_objects_v2", prefix, Prefix=self._root + prefix, MaxKeys=PAGE_KEYS, **more
            )
            for item in page.get("Contents", ()):
                yield _entry(
                    item["Key"][len(self._root) :], item["Size"], item["ETag"], item["LastModified"]
                )
            if not page.get("IsTruncated"):
                return
            token = page.get("NextContinuationToken")
            if not token or token == more.get("ContinuationToken"):
                raise StoreError(
                    f"{shown(self.uri_of(prefix))}: the store says that there is more to"
                    " list, but not where to go on",
                    kind="bad_answer",
                )
            more = {"ContinuationToken": token}

    def get(self, key: str) -> bytes:
        """See `Store.get`."""

        def whole() -> bytes:
            said = self._once("get_object", key, Key=self._root + key)
            return self._checked(self._read(said, key), said, key)

        return persist(whole)

    def head(self, key: str) -> Entry | None:
        """See `Store.head`."""
        try:
            said = self._call("head_object", key, Key=self._root + key)
        except NotFoundInStore as error:
            if error.kind != "not_found":
                raise
            return None
        return _entry(key, said["ContentLength"], said["ETag"], said["LastModified"])

    def metadata(self, key: str) -> dict[str, str]:
        """See `Store.metadata`."""
        return dict(self._call("head_object", key, Key=self._root + key).get("Metadata", {}))

    def read_at(self, key: str, offset: int, length: int, *, version: str | None = None) -> bytes:
        """See `Store.read_at`."""
        return persist(partial(self._read_at, key, offset, length, version))

    def _read_at(self, key: str, offset: int, length: int, version: str | None) -> bytes:
        if length <= 0:
            return b""
        match = {"IfMatch": f'"{version}"'} if version else {}
        wanted = f"bytes={offset}-{offset + length - 1}"
        try:
            said = self._once("get_object", key, Key=self._root + key, Range=wanted, **match)
        except StoreError as error:
            if error.kind == "past_the_end":
                return b""
            raise
        # a proxy or server that does not know the conditions sends whatever it has
        if version and said["ETag"].strip('"') != version:
            self._drop(said)
            raise changed(self.uri_of(key))
        first, _, total = said.get("ContentRange", "").removeprefix("bytes ").partition("/")
        whole = not total and offset == 0 and said.get("ContentLength", 0) <= length
        if not whole and first.partition("-")[0] != str(offset):
            self._drop(said)
            raise StoreError(
                f"{shown(self.uri_of(key))}: the store ignores Range, so each piece read"
                " would cost the whole object; it is not read — use a store or a proxy that honours"
                " Range",
                kind="no_range",
            )
        data = self._read(said, key, most=length)
        expected = len(data) if whole or total == "*" else min(length, int(total) - offset)
        if len(data) != expected:
            raise self._short(key, len(data), expected)
        return self._checked(data, said, key) if whole or total == str(len(data)) else data

    def put_new(self, key: str, data: bytes, metadata: Mapping[str, str] = {}) -> None:
        """See `Store.put_new`: one PUT with `If-None-Match: *`, also for zero bytes."""
        check_put(self.uri_of(key), data, metadata)
        md5 = base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()
        try:
            self._call(
                "put_object", key, Key=self._root + key, Body=data, IfNoneMatch="*",
                ContentMD5=md5, Metadata=dict(metadata),
            )  # fmt: skip
        except StoreError as error:
            if error.kind != "source_changed":
                raise
            raise ExistsInStore(
                f"{shown(self.uri_of(key))} exists: another attempt was first", kind="exists"
            ) from error

    def remove(self, key: str) -> None:
        """See `Store.remove`."""
        self._call("delete_object", key, Key=self._root + key)

    def _call(self, operation: str, key: str, **parameters: Any) -> dict[str, Any]:
        return persist(lambda: self._once(operation, key, **parameters))

    def _once(self, operation: str, key: str, **parameters: Any) -> dict[str, Any]:
        try:
            fs = connect(self.settings)
            answer: dict[str, Any] = fs.call_s3(operation, Bucket=self.bucket, **parameters)
        except _failures() as error:
            failure = _translate(error, self.uri_of(key))
            if failure.kind == "expired":
                forget(fs)
            raise failure from error
        return answer

    def _read(self, answer: dict[str, Any], key: str, most: int | None = None) -> bytes:
        """The body of an answer, complete; one that is longer than `most` is not read."""
        from fsspec.asyn import sync

        declared = answer.get("ContentLength")
        if declared is None:
            self._drop(answer)
            raise StoreError(
                f"{shown(self.uri_of(key))}: the store does not say how long its answer is; it is"
                " not read, for it may have no end — use a store or a proxy that sends"
                " Content-Length",
                kind="no_length",
            )
        if most is not None and declared > most:
            self._drop(answer)
            raise self._short(key, declared, most)
        try:
            data: bytes = sync(connect(self.settings).loop, answer["Body"].read)
        except _failures() as error:
            raise _translate(error, self.uri_of(key)) from error
        finally:
            self._drop(answer)
        if len(data) != declared:
            raise self._short(key, len(data), declared)
        return data

    def _checked(self, data: bytes, answer: dict[str, Any], key: str) -> bytes:
        if is_damaged(self.bucket, data, answer):
            what = "the bytes that came are not those that are stored"
            raise StoreError(f"{shown(self.uri_of(key))}: {what}", kind="damaged")
        return data

    def _drop(self, answer: dict[str, Any]) -> None:
        from fsspec.asyn import sync

        sync(connect(self.settings).loop, answer["Body"].aclose)

    def _short(self, key: str, got: int, expected: int) -> StoreError:
        return StoreError(
            f"{shown(self.uri_of(key))}: the store sent {got} of {expected} bytes",
            kind="short_body",
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return S3Store, (self.bucket, self._root.rstrip("/"), self.settings)


def _failures() -> tuple[type[Exception], ...]:
    """What a request may raise: s3fs gives OSError for answers, the layers below their own."""
    from aiohttp import ClientError
    from botocore.exceptions import BotoCoreError  # type: ignore[import-untyped]
    from botocore.parsers import ResponseParserError  # type: ignore[import-untyped]

    return OSError, BotoCoreError, ResponseParserError, ClientError, ValueError


def _entry(key: str, size_bytes: int, etag: str, modified_at: datetime) -> Entry:
    mtime_ns = int(modified_at.timestamp()) * 10**9  # a HEAD says whole seconds, some LISTs more
    return Entry(
        key=key,
        size_bytes=size_bytes,
        etag=etag.strip('"'),
        modified_at=utc(mtime_ns),
        mtime_ns=mtime_ns,
    )


def _translate(error: Exception, uri: str) -> VidbatchError:
    """What went wrong, as a class of errors.py whose kind says whether to try again."""
    answer = getattr(error.__cause__, "response", None)
    uri = shown(uri)
    if answer:
        code = str(answer.get("Error", {}).get("Code", ""))
        status = int(answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        return _translate_answer(code, status, uri)
    return _translate_failure(error, uri)


def _translate_answer(code: str, status: int, uri: str) -> VidbatchError:
    if code in _CODES:
        cls, kind, what, advice = _CODES[code]
        return cls(f"{uri}: {what} ({code}) — {advice}", kind=kind, advice=advice)
    if status == 412:
        return changed(uri)
    if status == 416:
        return StoreError(f"{uri}: nothing lies past its end", kind="past_the_end")
    if status == 404:
        return NotFoundInStore(f"{uri} is not there", kind="not_found")
    if status in (401, 403):
        return ForbiddenByStore(
            f"{uri}: the store refuses access ({code}) — {_RIGHTS}",
            kind="access_denied",
            advice=_RIGHTS,
        )
    if status in (301, 307):
        return _translate_answer("PermanentRedirect", 0, uri)
    other = "server_error" if status >= 500 else "refused"
    kind = _TRANSIENT_CODES.get(code) or _TRANSIENT_STATUS.get(status) or other
    return StoreError(f"{uri}: the store answered {status} {code}", kind=kind)


def _translate_failure(error: Exception, uri: str) -> VidbatchError:
    from botocore import exceptions as boto  # type: ignore[import-untyped]

    why = " ".join(str(error).split()) or type(error).__name__
    if isinstance(
        error,
        boto.NoCredentialsError
        | boto.PartialCredentialsError
        | boto.CredentialRetrievalError
        | boto.ProfileNotFound
        | boto.TokenRetrievalError
        | boto.SSOError,
    ):
        advice = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile, or a role of the pod"
        return ForbiddenByStore(
            f"{uri}: no credentials ({why}) — {advice}", kind="no_credentials", advice=advice
        )
    if isinstance(error, boto.SSLError):
        advice = "name the store's CA in AWS_CA_BUNDLE"
        return StoreError(
            f"{uri}: the store's certificate is not trusted ({why}) — {advice}",
            kind="tls",
            advice=advice,
        )
    if isinstance(error, boto.ConnectTimeoutError | boto.ReadTimeoutError | TimeoutError):
        return StoreError(f"{uri}: the store did not answer in time", kind="timeout")
    if isinstance(error, boto.EndpointConnectionError | boto.ProxyConnectionError):
        advice = "check the endpoint_url and that the store is up"
        return StoreError(
            f"{uri}: the store cannot be reached ({why}) — {advice}",
            kind="unreachable",
            advice=advice,
        )
    if isinstance(error, boto.ParamValidationError | boto.InvalidRegionError | ValueError):
        return UsageError(f"{uri}: not a request that S3 knows ({why})", kind="bad_request")
    return StoreError(f"{uri}: the connection broke ({why})", kind="reset")
