"""What goes wrong in a fleet and is said to a user in one line."""

from __future__ import annotations

from vmconv.plugin import VmconvError


class FleetError(VmconvError):
    """Root of the fleet's errors."""


class MalformedError(FleetError):
    """A record, a message or a change is not as it has to be."""

    kind = "malformed"


class NotOwnerError(FleetError):
    """A node was asked to write what another one owns."""


class NotReadyError(FleetError):
    """The node has just started and still recovers its own records: it does not write yet."""


class StoreError(FleetError):
    """The database failed: full, damaged, of another node or of a newer version."""


class ClosedError(FleetError):
    """The engine has ended, or has not begun."""


class Refusal(FleetError):  # noqa: N818 - what a handler says, no failure
    """A handler's no: the phrase becomes the response's `reason`."""
