"""OpenStack Swift for vmconv: objects as sources, and disks published as large objects that refer to one payload."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from vmconv.plugin import Scheme, hookimpl

if TYPE_CHECKING:
    from vmconv.plugin import Command, ObjectContainer, Remote, Url

VMCONV_INTERFACE = 1


class Swift(Scheme):
    """Objects of OpenStack Swift, in a cloud that the configuration of OpenStack's client names."""

    name = "swift"
    title = "object of OpenStack Swift"

    def open(self, url: Url) -> Remote:
        from vmconv_swift.remote import opened

        return opened(url)

    def container(self, url: Url) -> ObjectContainer:
        from vmconv_swift.container import SwiftContainer

        return SwiftContainer.at(url)


@hookimpl
def vmconv_register_schemes() -> Iterable[Scheme]:
    return [Swift()]


@hookimpl
def vmconv_register_commands() -> Iterable[Command]:
    from vmconv_swift import publishing, unpublishing

    return [publishing.COMMAND, unpublishing.COMMAND]
