"""Copies payload, for storage that cannot share. Sparse and parallel; always announced."""

from __future__ import annotations

import os
from collections.abc import Sequence

from vmconv.backends.files import FileTransaction
from vmconv.backends.reflink import ReflinkBackend
from vmconv.interface.backend import DEFAULT_ACCESS, Access, Backend, Capabilities, Survey, Transaction
from vmconv.io.directory import Directory
from vmconv.model.sources import File
from vmconv.system import linux

_COPIED_BY_THE_SERVER = frozenset({"ceph", "cifs", "nfs", "nfs4", "smb3"})


class CopyBackend(Backend):
    name = "copy"
    title = "copies every payload byte"

    def capabilities(self, directory: str) -> Capabilities:
        usable = os.access(directory, os.W_OK)
        return Capabilities(usable=usable, shares=False, reason=None if usable else f"{directory} is not writable")

    def survey(self, directory: str, sources: Sequence[File]) -> Survey:
        return Survey(1, {id(source): "the copy backend was asked for" for source in sources})

    def begin(
        self, directory: Directory, *, force: bool = False, durable: bool = True, access: Access = DEFAULT_ACCESS
    ) -> Transaction:
        # The user asked for copies, but copy_file_range may share blocks. Then bytes are read and written instead.
        place = directory.real()
        remote = linux.mount_of(place).type in _COPIED_BY_THE_SERVER
        kernel_copies = remote and not ReflinkBackend().capabilities(place).shares
        return FileTransaction(directory, force=force, durable=durable, access=access, kernel_copies=kernel_copies)
