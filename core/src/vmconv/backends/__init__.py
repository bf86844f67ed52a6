"""The backends of core, registered by an entry point as a plugin's are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from vmconv.interface.hooks import hookimpl

if TYPE_CHECKING:
    from vmconv.interface.backend import Backend


@hookimpl
def vmconv_register_backends() -> Iterable[Backend]:
    from vmconv.backends.copy import CopyBackend
    from vmconv.backends.juicefs import JuiceFSBackend
    from vmconv.backends.reflink import ReflinkBackend

    return [ReflinkBackend(), JuiceFSBackend(), CopyBackend()]
