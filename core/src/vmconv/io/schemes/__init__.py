"""The schemes of core, registered by an entry point as a plugin's are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from vmconv.interface.hooks import hookimpl

if TYPE_CHECKING:
    from vmconv.interface.scheme import Scheme


@hookimpl
def vmconv_register_schemes() -> Iterable[Scheme]:
    from vmconv.io.schemes.registered import SCHEMES

    return SCHEMES
