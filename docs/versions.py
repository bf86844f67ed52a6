"""The version of all distributions: core's `pyproject.toml` states it, `set_version` changes it everywhere."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from datetime import UTC, datetime
from email.utils import format_datetime
from pathlib import Path

_PATTERNS = (
    "core/pyproject.toml",
    "plugins/*/pyproject.toml",
    "plugins/*/ansible/*",
    "docs/guide/*.md",
    "debian/changelog",
)
_VERSION = re.compile(r"\d+\.\d+\.\d+(?:(?:a|b|rc)\d+)?")


def current_version(root: Path) -> str:
    """Returns the version of core, which all distributions share."""
    stated = tomllib.loads((root / "core/pyproject.toml").read_text())["project"]["version"]
    return str(stated)


def versioned_files(root: Path) -> Iterator[Path]:
    """Yields the files that may state the version."""
    for pattern in _PATTERNS:
        yield from (path for path in sorted(root.glob(pattern)) if path.is_file())


def debian_version(version: str) -> str:
    """Returns a version as Debian orders it: 1.0~rc1 is older than 1.0."""
    return re.sub(r"(?=(?:a|b|rc)\d+$)", "~", version)


def set_version(root: Path, version: str, date: str | None = None) -> None:
    """Changes the version of all distributions, what they require of each other, and file names in the guide.

    The Debian package has only the entry of this version in its changelog; `date` is that of the release, YYYY-MM-DD.
    """
    if not _VERSION.fullmatch(version):
        raise ValueError(f"version {version!r} is not X.Y.Z, X.Y.ZaN, X.Y.ZbN or X.Y.ZrcN")
    current = current_version(root)
    old = re.escape(current)
    stated = re.compile(rf'(^version(?: = "|: )|vmconv[a-z0-9-]*(?:==|[- ])){old}(?![\w.]\d|\w)', re.MULTILINE)
    for path in versioned_files(root):
        text = path.read_text()
        if path.name == "changelog":
            changed = text.replace(debian_version(current), debian_version(version))
            if date:
                time = format_datetime(datetime.fromisoformat(date).replace(tzinfo=UTC))
                changed = re.sub(r"(?<=>  ).*", time, changed)
        else:
            changed = stated.sub(lambda match: match[1] + version, text)
        if changed != text:
            path.write_text(changed)
