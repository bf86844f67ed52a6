"""Requests on one object of S3, by botocore. The store is not trusted with numbers and texts."""

from __future__ import annotations

import os
import re
import threading
from base64 import b64encode
from collections.abc import Mapping
from functools import cached_property
from hashlib import md5
from http.client import HTTPException
from typing import TYPE_CHECKING, Any, NamedTuple

from vmconv.plugin import BackendError, S3Location, UsageError

if TYPE_CHECKING:
    from vmconv.plugin import Url

_TRIES = 5
_CONNECTIONS = 16
_SILENCE = 300
"""Seconds that the store may send nothing: it copies a part meanwhile."""
_ETAG = re.compile(r'"?([!#-~]{1,200})"?')
_CODE = re.compile(r"[A-Za-z0-9]{1,64}")
_UPLOAD = re.compile(r"[!-~]{1,2048}")
_MARK = "vmconv-upload"
_PAGES = 1000


class StoreError(BackendError):
    """The store refused a request, or did not answer it: `status` is 0 then."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class Found(NamedTuple):
    """An object: `mark` is what its upload has written on it, empty for objects of others."""

    etag: str
    size: int
    mark: str


class Made(NamedTuple):
    """A part that the store has; `is_plain` is False if encryption makes its ETag something else than its MD5."""

    etag: str
    is_plain: bool


class Version(NamedTuple):
    """What the store says of a completed upload; `version` is empty without versions."""

    etag: str
    version: str


class Store:
    """Requests on the object at a URL; thread-safe.

    `sent` are the bytes of bodies so far, with those that were sent again.
    """

    def __init__(self, url: Url) -> None:
        self.url, self.shown = url, url.shown
        self.location = at = S3Location.of(url)
        if at.version:
            raise UsageError(f"{self.shown}: names a version, and an upload makes a new one")
        try:
            at.key.encode()
        except UnicodeEncodeError as exc:
            raise UsageError(f"{self.shown}: is no UTF-8, as keys of S3 are") from exc
        # urllib3 would resolve them as a browser does.
        if {".", ".."} & set(at.key.split("/")):
            raise UsageError(f"{self.shown}: a part of its key is . or ..")
        self.sent = 0
        self._lock = threading.Lock()

    @cached_property
    def _client(self) -> Any:
        from botocore import UNSIGNED
        from botocore.config import Config

        at = self.location
        config = Config(
            signature_version=None if at.credentials() else UNSIGNED,
            s3={"addressing_style": "path"} if at.endpoint else {},
            retries={"mode": "standard", "total_max_attempts": _TRIES},
            read_timeout=_SILENCE,
            max_pool_connections=_CONNECTIONS,
            # Content-MD5 is known to more stores.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        )
        client = at.session.create_client(
            "s3",
            region_name=at.region,
            endpoint_url=at.endpoint,
            config=config,
            verify=os.environ.get("SSL_CERT_FILE"),
        )
        client.meta.events.register("before-send.s3", self._count)
        return client

    def _count(self, request: Any, **_: Any) -> None:
        with self._lock:
            self.sent += int(request.headers.get("Content-Length") or 0)

    def ask(self, operation: str, **parameters: Any) -> Mapping[str, Any]:
        """Returns the answer to a request, tried again where that may help. Raises `StoreError`."""
        from botocore.exceptions import BotoCoreError, ClientError
        from botocore.parsers import ResponseParserError

        try:
            answer: Mapping[str, Any] = getattr(self._client, operation)(
                Bucket=self.location.bucket, Key=self.location.key, **parameters
            )
        except ClientError as exc:
            status = exc.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            code = str(exc.response.get("Error", {}).get("Code", ""))
            said = f"{status} {code}" if _CODE.fullmatch(code) and code != str(status) else f"{status}"
            raise StoreError(f"{self.shown}: the store answers {said} to {exc.operation_name}", status) from exc
        except (BotoCoreError, ResponseParserError, HTTPException, OSError, ValueError) as exc:
            text = " ".join(str(exc).split())[:200]
            raise StoreError(f"{self.shown}: the request {operation} failed: {text}") from exc
        return answer

    def head(self) -> Found | None:
        """Returns what is known of the object; None if there is none."""
        try:
            answer = self.ask("head_object")
        except StoreError as exc:
            if exc.status == 404:
                return None
            if exc.status == 403:
                exc.hint = "without the right to list the bucket (s3:ListBucket), the store says so of a missing object"
            raise
        mark = answer.get("Metadata", {}).get(_MARK, "")
        return Found(self._etag(answer), int(answer.get("ContentLength", -1)), str(mark))

    # -- an upload

    def begin(self, mark: str) -> str:
        """Returns the id of a new upload, whose object will have this mark."""
        answer = self.ask("create_multipart_upload", Metadata={_MARK: mark}, ContentType="application/octet-stream")
        found = str(answer.get("UploadId", ""))
        if not _UPLOAD.fullmatch(found):
            raise StoreError(f"{self.shown}: the store begins an upload without an id")
        return found

    def send(self, upload: str, number: int, data: bytes) -> Made:
        """Sends a part. The store compares its MD5, and the ETag is compared with it."""
        digest = md5(data, usedforsecurity=False)
        made = self._made(
            self.ask(
                "upload_part",
                UploadId=upload,
                PartNumber=number,
                Body=data,
                ContentMD5=b64encode(digest.digest()).decode(),
            )
        )
        if made.is_plain and made.etag != digest.hexdigest():
            raise StoreError(
                f"{self.shown}: part {number}: the store received other bytes: "
                f"its ETag is {made.etag[:40]}, the MD5 is {digest.hexdigest()}"
            )
        return made

    def copy(self, upload: str, number: int, source: S3Location, etag: str, offset: int, length: int) -> Made:
        """Has the store copy a part from an object that has this ETag."""
        answer = self.ask(
            "upload_part_copy",
            UploadId=upload,
            PartNumber=number,
            CopySource=copy_source(source),
            CopySourceIfMatch=f'"{etag}"',
            CopySourceRange=f"bytes={offset}-{offset + length - 1}",
        )
        return self._made({**answer, **answer.get("CopyPartResult", {})})

    def parts(self, upload: str) -> dict[int, tuple[str, int]]:
        """Returns ETag and size of each part that the store has, by number."""
        found: dict[int, tuple[str, int]] = {}
        after = 0
        for _ in range(_PAGES):
            answer = self.ask("list_parts", UploadId=upload, PartNumberMarker=after)
            rows = answer.get("Parts", [])
            found.update({int(row["PartNumber"]): (self._etag(row), int(row["Size"])) for row in rows})
            if not answer.get("IsTruncated"):
                return found
            if not rows or max(found) <= after:
                break
            after = max(found)
        raise StoreError(f"{self.shown}: the list of its parts has no end")

    def complete(self, upload: str, etags: list[str], *, new: bool) -> Version:
        """Makes the object appear; with `new` only if there is none. The answer may be lost: see `head`."""
        named = [{"PartNumber": number, "ETag": f'"{etag}"'} for number, etag in enumerate(etags, start=1)]
        given = {"UploadId": upload, "MultipartUpload": {"Parts": named}}
        try:
            answer = self.ask("complete_multipart_upload", **given, **({"IfNoneMatch": "*"} if new else {}))
        except StoreError as exc:
            # A store may not know the condition.
            if not (new and exc.status == 501):
                raise
            answer = self.ask("complete_multipart_upload", **given)
        version = str(answer.get("VersionId") or "")
        return Version(self._etag(answer), "" if version == "null" else version)

    def cancel(self, upload: str) -> None:
        """Removes an upload with its parts, if it is there."""
        try:
            self.ask("abort_multipart_upload", UploadId=upload)
        except StoreError as exc:
            if exc.status != 404:
                raise

    def remove(self, found: Found, version: str) -> None:
        """Removes the object that was found, or this version of it, unless it has been replaced."""
        if version:
            self.ask("delete_object", VersionId=version)
            return
        try:
            self.ask("delete_object", IfMatch=f'"{found.etag}"')
        except StoreError as exc:
            if exc.status not in (412, 501):
                raise
            # Swift 2.38 compares another ETag than the one it states, and others may not know the condition.
            now = self.head()
            if now and now.mark == found.mark:
                self.ask("delete_object")

    def _made(self, answer: Mapping[str, Any]) -> Made:
        kms = str(answer.get("ServerSideEncryption", "")).startswith("aws:kms")
        return Made(self._etag(answer), not (kms or answer.get("SSECustomerAlgorithm")))

    def _etag(self, answer: Mapping[str, Any]) -> str:
        found = _ETAG.fullmatch(str(answer.get("ETag", "")))
        if found is None:
            raise StoreError(f"{self.shown}: the store states no ETag")
        return found[1]


def copy_source(source: S3Location) -> dict[str, str]:
    """Returns a source of a copy as botocore has it."""
    named = {"Bucket": source.bucket, "Key": source.key}
    return {**named, "VersionId": source.version} if source.version else named
