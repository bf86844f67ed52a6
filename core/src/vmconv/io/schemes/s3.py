"""Objects of S3 and of servers that speak its protocol: HTTP ranges, with requests that botocore signs.

Region, endpoint and credentials come from where the AWS tools have them: the environment, `~/.aws`, or the machine's
role. Without credentials, requests are anonymous.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any, NamedTuple

from vmconv.errors import AccessError, UsageError
from vmconv.interface.scheme import parse_url
from vmconv.io.schemes.connections import Place
from vmconv.io.schemes.http import HttpObject

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vmconv.interface.scheme import Url
    from vmconv.io.schemes.http import Sign

_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_DEFAULT_REGION = "us-east-1"
_REGION = re.compile(r"[a-z0-9-]{1,32}")


class S3Location(NamedTuple):
    """Where `s3://BUCKET/KEY` is, and the session of botocore that has the credentials.

    `key` is decoded. `version` is empty for the newest. `endpoint` is None for Amazon's.
    """

    bucket: str
    key: str
    version: str
    session: Any
    region: str
    endpoint: str | None

    @classmethod
    def of(cls, url: Url) -> S3Location:
        """Returns the location that a URL names. Raises `UsageError` if it names none."""
        query = url.query
        if not _BUCKET.fullmatch(url.host) or url.user or url.port or len(url.path) < 2:
            raise UsageError(f"{url.shown}: is not s3://BUCKET/KEY")
        if query and not re.fullmatch(r"versionId=[A-Za-z0-9._-]{1,1024}", query):
            raise UsageError(f"{url.shown}: has a query other than versionId=")
        session = _session(url)
        region = _setting(session, "region", "AWS_REGION", "AWS_DEFAULT_REGION") or _DEFAULT_REGION
        if not _REGION.fullmatch(region):
            raise UsageError(f"{region!r} is not the name of a region")
        endpoint = _setting(session, "endpoint_url", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
        version = query.removeprefix("versionId=")
        return cls(url.host, url.decoded_path[1:], version, session, region, endpoint)

    def credentials(self) -> Any:
        """Returns the credentials of botocore; None without any. Raises `AccessError` if they cannot be read."""
        from botocore.exceptions import BotoCoreError

        try:
            return self.session.get_credentials()
        except BotoCoreError as exc:
            raise AccessError(f"s3://{self.bucket}: credentials cannot be read: {exc}") from exc


def opened(url: Url) -> HttpObject:
    """Returns the object `s3://BUCKET/KEY`, of the version in `?versionId=` if there is one."""
    from urllib.parse import quote

    at = S3Location.of(url)
    # Signatures are of this encoding; others of the same key do not match it.
    key = f"/{quote(at.key, safe='/-_.~', errors='surrogateescape')}" + (f"?{url.query}" if url.query else "")
    return HttpObject(url, place=_place(at.bucket, key, at.region, at.endpoint), sign=_signer(at, url))


def _session(url: Url) -> Any:
    try:
        from botocore.session import Session
    except ImportError as exc:
        raise UsageError(f"{url.shown}: needs botocore", hint="pip install vmconv[s3]") from exc
    return Session()


def _setting(session: Any, name: str, *variables: str) -> str | None:
    """Returns a setting of the environment, or else of the profile."""
    found: str | None = next((os.environ[variable] for variable in variables if os.environ.get(variable)), None)
    if found:
        return found
    from botocore.exceptions import BotoCoreError

    try:
        value = session.get_scoped_config().get(name)
    except BotoCoreError as exc:
        raise AccessError(f"the configuration of AWS cannot be read: {exc}") from exc
    return value if isinstance(value, str) else None


def _place(bucket: str, key: str, region: str, endpoint: str | None) -> Place:
    if endpoint:
        url = parse_url(endpoint)
        if url.scheme not in ("http", "https") or not url.host or url.query or url.user:
            raise UsageError(f"{url.shown}: is not an endpoint of S3")
        return Place.of(url)._replace(target=f"{url.path.rstrip('/')}/{bucket}{key}")
    # A certificate is for one name before the domain, so a bucket with dots is named in the path.
    if "." in bucket:
        return Place("https", f"s3.{region}.amazonaws.com", 443, f"/{bucket}{key}")
    return Place("https", f"{bucket}.s3.{region}.amazonaws.com", 443, key)


def _signer(at: S3Location, url: Url) -> Sign | None:
    """Returns what signs requests; None without credentials."""
    from botocore.auth import S3SigV4Auth
    from botocore.awsrequest import AWSRequest
    from botocore.exceptions import BotoCoreError

    credentials = at.credentials()
    if credentials is None:
        return None

    def sign(place: Place, headers: Mapping[str, str]) -> Mapping[str, str]:
        address = f"{place.scheme}://{place.authority}{place.target}"
        request = AWSRequest(method="GET", url=address, headers=dict(headers))
        try:
            # Credentials of a role expire; botocore gets new ones.
            S3SigV4Auth(credentials.get_frozen_credentials(), "s3", at.region).add_auth(request)
        except BotoCoreError as exc:
            raise AccessError(f"{url.shown}: the request cannot be signed: {exc}") from exc
        return dict(request.headers.items())

    return sign
