"""Disks as objects of S3, with payload of the same store copied by the store."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from vmconv.plugin import hookimpl

if TYPE_CHECKING:
    from vmconv.plugin import Command

VMCONV_INTERFACE = 1


@hookimpl
def vmconv_register_commands() -> Iterable[Command]:
    from vmconv_s3 import uploading

    return [uploading.COMMAND]
