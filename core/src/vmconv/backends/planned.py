"""An output that the execution does not write: it is read back from its planned table."""

from __future__ import annotations

from vmconv.interface.backend import Output
from vmconv.model.plan import FilePlan, ShareSteps
from vmconv.model.planned import PlannedFile
from vmconv.model.sources import File


class PlannedOutput(Output):
    """Accepts no bytes; its file is read from the plan."""

    takes_bytes = False

    def __init__(self, file: FilePlan) -> None:
        self.file = file

    def share(self, steps: ShareSteps) -> None:
        """Does nothing."""

    def write(self, offset: int, data: bytes) -> None:
        """Does nothing."""

    def finish(self) -> File:
        return PlannedFile(self.file.name, self.file.table)
