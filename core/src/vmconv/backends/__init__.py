"""The backends that come with vmconv. They are registered by the same hook as third parties' ones."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from vmconv.hooks import hookimpl

if TYPE_CHECKING:
    from vmconv.storage import Backend


@hookimpl
def vmconv_register_backends() -> Iterable[Backend]:
    from vmconv.backends.copy import CopyBackend
    from vmconv.backends.memory import MemoryBackend
    from vmconv.backends.reflink import ReflinkBackend

    return [ReflinkBackend(), CopyBackend(), MemoryBackend()]
