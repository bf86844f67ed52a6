"""The settings of a configuration while it is read."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vmconv_proxmox.keys import boolean, properties

if TYPE_CHECKING:
    from vmconv.plugin import File

_FILE_VOLUME = re.compile(r"[^/:]+:(?:\d+/[^/]+/)?\d+/([^/]+)")


@dataclass
class Source:
    """The settings of a configuration. What nobody takes remains as `extra`."""

    file: File
    settings: dict[str, str]
    extra: dict[str, str] = field(default_factory=dict)

    def take(self, key: str, default: str | None = None) -> str | None:
        return self.settings.pop(key, None) or default

    def properties(self, key: str) -> dict[str, str]:
        return properties(self.file, key, self.take(key) or "")

    def keep(self, key: str, values: dict[str, str]) -> None:
        self.extra.update((f"{key}.{name}", value) for name, value in values.items())

    def boolean(self, key: str, text: str | None, default: bool | None = None) -> bool | None:
        return default if text is None else boolean(self.file, key, text)

    def numbered(self, kind: str) -> list[str]:
        """Returns the keys of devices of a kind, by their numbers."""
        found = [key for key in self.settings if re.fullmatch(rf"{kind}\d{{1,5}}", key)]
        return sorted(found, key=lambda key: int(key.removeprefix(kind)))


def file_of(volume: str | None) -> str | None:
    """Returns the file of a volume id or a path; None for devices and volumes of storages without files."""
    if volume is None or volume.startswith("/dev/"):
        return None
    if volume.startswith("/"):
        return volume
    match = _FILE_VOLUME.fullmatch(volume)
    if match is not None:
        return match[1]
    # An old form without a storage: a file of the storage "local".
    return volume if ":" not in volume and "/" not in volume else None
