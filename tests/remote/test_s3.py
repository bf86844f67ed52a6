"""Sources at s3://: signatures by the specification, and where requests go."""

from __future__ import annotations

import hashlib
import hmac
import re
from pathlib import Path
from urllib.parse import quote, unquote

import pytest

import vmconv
from support.requirements import oracle_module
from support.web import Handler, Server, sparse_disk
from vmconv.errors import AccessError, UsageError
from vmconv.interface.scheme import parse_url

oracle_module("botocore")

KEY, SECRET = "AKIDEXAMPLE", "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY"
MIB = 1 << 20


def digest(key: bytes, text: str) -> bytes:
    return hmac.new(key, text.encode(), hashlib.sha256).digest()


def signature_of(handler: Handler, secret: str) -> tuple[str, str]:
    """Returns the signature of a request as it arrived, and the one it should have (AWS, "Signature Version 4")."""
    found = re.fullmatch(
        r"AWS4-HMAC-SHA256 Credential=(\w+)/(\d{8})/([\w-]+)/s3/aws4_request, SignedHeaders=([\w;-]+), Signature=(\w+)",
        handler.headers["Authorization"] or "",
    )
    assert found is not None
    key, day, region, names, given = found.groups()
    assert key == KEY
    path, _, query = handler.path.partition("?")
    canonical = "\n".join(
        [
            "GET",
            quote(unquote(path), safe="/-_.~"),
            "&".join(sorted(query.split("&"))) if query else "",
            *(f"{name}:{' '.join((handler.headers[name] or '').split())}" for name in names.split(";")),
            "",
            names,
            handler.headers["X-Amz-Content-SHA256"] or "",
        ]
    )
    when = handler.headers["X-Amz-Date"] or ""
    scope = f"{day}/{region}/s3/aws4_request"
    text = "\n".join(["AWS4-HMAC-SHA256", when, scope, hashlib.sha256(canonical.encode()).hexdigest()])
    secret_key = f"AWS4{secret}".encode()
    for part in (day, region, "s3", "aws4_request"):
        secret_key = digest(secret_key, part)
    return given, digest(secret_key, text).hex()


@pytest.fixture(autouse=True)
def no_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PROFILE", "REGION", "DEFAULT_REGION", "ENDPOINT_URL", "ENDPOINT_URL_S3", "SESSION_TOKEN"):
        monkeypatch.delenv(f"AWS_{name}", raising=False)
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"):
        monkeypatch.delenv(f"AWS_{name}", raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.fixture
def bucket(web: Server, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", web.url(""))
    directory = web.directory / "images"
    directory.mkdir()
    return directory


@pytest.mark.parametrize("name", ["disk.raw", "a disk+(1)é.raw"])
def test_requests_are_signed(web: Server, bucket: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    raw = sparse_disk(bucket / name, 2 * MIB, [(0, MIB)])
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_REGION", "eu-central-1")
    seen = []

    def check(handler: Handler, first: int, last: int) -> bool:
        given, wanted = signature_of(handler, SECRET)
        seen.append(given == wanted)
        handler.part(raw, first, last)
        return True

    web.spoil = check
    made = web.directory.parent / "made.qcow2"
    vmconv.convert(f"s3://images/{quote(name)}", made)
    assert seen
    assert all(seen)
    assert vmconv.compare(raw, made)


def test_without_credentials_requests_are_anonymous(web: Server, bucket: Path) -> None:
    raw = sparse_disk(bucket / "disk.raw", MIB, [(0, MIB)])
    assert vmconv.compare("s3://images/disk.raw", raw)
    assert all("Authorization" not in sent for sent in web.headers)


def test_a_bucket_in_another_region_is_a_hint(web: Server, bucket: Path) -> None:
    sparse_disk(bucket / "disk.raw", MIB, [(0, MIB)])

    def elsewhere(handler: Handler, first: int, last: int) -> bool:
        handler.answer(301, {"x-amz-bucket-region": "eu-west-1"}, b"")
        return True

    web.spoil = elsewhere
    with pytest.raises(AccessError, match="redirects to nowhere") as caught:
        vmconv.info("s3://images/disk.raw")
    assert caught.value.hint == "the bucket is in eu-west-1: AWS_REGION=eu-west-1"


@pytest.mark.parametrize(
    ("bucket_name", "region", "address"),
    [
        ("images", None, "https://images.s3.us-east-1.amazonaws.com/a/b.qcow2"),
        ("images", "eu-north-1", "https://images.s3.eu-north-1.amazonaws.com/a/b.qcow2"),
        ("my.images", "eu-north-1", "https://s3.eu-north-1.amazonaws.com/my.images/a/b.qcow2"),
    ],
)
def test_buckets_of_amazon_are_at_its_addresses(
    monkeypatch: pytest.MonkeyPatch, bucket_name: str, region: str | None, address: str
) -> None:
    from vmconv.io.schemes import s3

    places = []
    monkeypatch.setattr(s3, "HttpObject", lambda *_, place, sign: places.append((place, sign)))
    if region:
        monkeypatch.setenv("AWS_REGION", region)
    s3.opened(parse_url(f"s3://{bucket_name}/a/b.qcow2"))
    ((place, sign),) = places
    assert f"{place.scheme}://{place.authority}{place.target}" == address
    assert sign is None


@pytest.mark.parametrize(
    "url", ["s3://images", "s3://images/", "s3://x/k", "s3://u@images/k", "s3://images/k?acl", "s3://-images/k"]
)
def test_a_url_without_meaning_is_refused(url: str) -> None:
    with pytest.raises(UsageError):
        vmconv.info(url)


def test_without_botocore_the_hint_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "botocore.session", None)
    with pytest.raises(UsageError, match="needs botocore") as caught:
        vmconv.info("s3://images/disk.raw")
    assert caught.value.hint == "pip install vmconv[s3]"
