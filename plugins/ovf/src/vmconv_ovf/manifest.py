"""The manifest of a package: digests of its files (DSP0243 1.1, 6).

    SHA256(web.ovf)= 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08
    SHA256(web-disk1.vmdk)= 2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae

SHA1 is that of OVF 1, SHA256 that of OVF 2; VMware writes SHA512 too. A certificate, `web.cert`, signs the manifest.
"""

from __future__ import annotations

import hashlib
import posixpath
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vmconv.machine import MAX_CONFIG, config_bytes, quoted
from vmconv.plugin import Digest, ImageError, Manifest

if TYPE_CHECKING:
    from vmconv.plugin import File, Member, Opener

MAX_DIGESTS = 10_000

# OpenSSL 3 calls the algorithms SHA2-256 and SHA2-512.
_LINE = re.compile(r"SHA(?:2?-)?(1|256|512)\s*\((.+)\)\s*=\s*([0-9a-fA-F]+)", re.IGNORECASE)
_DIGITS = {"1": 40, "256": 64, "512": 128}


def beside(file: File, opener: Opener) -> Manifest | None:
    """Returns the manifest beside a descriptor, which has its name; None if there is none."""
    found = opener.companion(file, (".mf",), "manifest")
    if found is None:
        return None
    name, manifest = found
    certificate = opener.companion(file, (".cert",), "certificate")
    own = posixpath.basename(file.path)
    digests = _checked(file.name, own, config_bytes(file), _parsed(name, config_bytes(manifest)))
    return Manifest(name, digests, certificate[0] if certificate else None)


def inside(package: str, members: Sequence[Member], descriptor: str, content: bytes) -> Manifest | None:
    """Returns the manifest among the members of a package, None if there is none.

    It has the descriptor's name, or is the only one beside it. `content` is that of the descriptor.
    """
    folder, stem = posixpath.split(posixpath.splitext(descriptor)[0])
    near = [each for each in members if posixpath.dirname(each.name) == folder]
    found = [each for each in near if each.name.lower().endswith(".mf")]
    if len(found) > 1:
        found = [each for each in found if posixpath.basename(each.name) == f"{stem}.mf"] or found
    if len(found) > 1:
        names = ", ".join(repr(each.name) for each in found[:8])
        raise ImageError(f"{package}: a package has one manifest, this one has {names}")
    if not found:
        return None
    name, table = found[0].name, found[0].table
    if table.size > MAX_CONFIG:
        raise ImageError(f"{package}: {name} has {table.size} bytes, a manifest has at most {MAX_CONFIG}")
    certificates = [each.name for each in near if each.name.lower().endswith(".cert")]
    listed = _parsed(f"{package}: {name}", table.read(0, table.size))
    digests = [each._replace(file=posixpath.normpath(posixpath.join(folder, each.file))) for each in listed]
    return Manifest(name, _checked(package, descriptor, content, digests), certificates[0] if certificates else None)


def _parsed(name: str, data: bytes) -> list[Digest]:
    """Returns the digests of a manifest; raises `ImageError` with the number of an invalid line."""
    found: dict[str, Digest] = {}
    # Names of files are bytes, and need not be UTF-8.
    text = data.decode("utf-8", "surrogateescape").removeprefix("\ufeff")
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        match = _LINE.fullmatch(line.strip())
        if match is None or len(match[3]) != _DIGITS[match[1]]:
            raise ImageError(
                f"{name}: line {number}: {quoted(line)} is no digest, such as SHA256(name)= and 64 digits",
                hint="unpack the package and remove its manifest, if it is known to be complete",
            )
        digest = Digest(match[2], f"sha{match[1]}", match[3].lower())
        if found.setdefault(digest.file, digest) != digest:
            raise ImageError(f"{name}: line {number}: a second digest of {quoted(digest.file)}")
        if len(found) > MAX_DIGESTS:
            raise ImageError(f"{name}: line {number}: has more than {MAX_DIGESTS} digests")
    return list(found.values())


def _checked(package: str, descriptor: str, content: bytes, digests: Sequence[Digest]) -> tuple[Digest, ...]:
    """Returns the digests of other files than the descriptor; raises `ImageError` if that has another one."""
    for each in digests:
        if each.file != descriptor:
            continue
        found = hashlib.new(each.algorithm, content).hexdigest()
        if found != each.value:
            raise ImageError(
                f"{package}: {each.algorithm} of the descriptor {descriptor} is {found}, its manifest has {each.value}",
                hint="the package is damaged; if the descriptor was edited, unpack the package and remove the manifest",
            )
    return tuple(each for each in digests if each.file != descriptor)
