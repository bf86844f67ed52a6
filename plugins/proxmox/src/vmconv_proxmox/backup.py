"""Configurations in Proxmox's backups, for the plugin that reads and writes those.

Other distributions may import this module and `vmconv_proxmox` itself, and nothing else of this plugin.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmconv_proxmox.keys import joined, parse, properties
from vmconv_proxmox.reader import machine_of
from vmconv_proxmox.writer import drive_key

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vmconv.machine import Machine
    from vmconv.plugin import File

__all__ = ["drive_key", "read_backup"]


def read_backup(file: File, data: bytes, volumes: Mapping[str, str]) -> Machine:
    """Returns the machine of a configuration whose bytes are `data`, in the file of a backup.

    `volumes` are the names of the backup's disks by the keys of drives, such as `scsi0` and `efidisk0`; they take the
    place of the volumes on the source's host. Raises `ImageError` with the setting that is damaged.
    """
    conf = parse(file, data)
    for key in conf.settings.keys() & volumes.keys():
        values = properties(file, key, conf.settings[key])
        values.pop("volume", None)
        conf.settings[key] = joined(key, {**values, "file": volumes[key]})
    return machine_of(file, conf)
