"""The errors of a fleet; each is one line for the user."""

from __future__ import annotations

from vmconv.plugin import VmconvError


class FleetError(VmconvError):
    """Root of the fleet's errors."""


class MalformedError(FleetError):
    """A record, a message or a change is not valid."""

    kind = "malformed"


class NotOwnerError(FleetError):
    """A node was told to write a record of another owner."""


class NotReadyError(FleetError):
    """The node cannot write yet: it still recovers its own records after its start."""


class StoreError(FleetError):
    """The database failed: full, damaged, of another node or of a newer version."""


class ArchiveError(FleetError):
    """Old records cannot be archived, so they are not deleted."""


class ClosedError(FleetError):
    """The engine has ended or not started."""


class Refusal(FleetError):  # noqa: N818 - what a handler says, no failure
    """A handler refuses a request; the message becomes the response's `reason`."""
