"""The target of a machine's conversion: its format, the machine in the format's terms, and the names of its files."""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import uuid4

from vmconv.errors import PluginError, UsageError, VmconvError
from vmconv.interface.machines import Adapted, Substitution
from vmconv.io.foreign import foreign_suffix
from vmconv.io.opener import Opener
from vmconv.io.registry import Registry
from vmconv.machine.formats import format_by_suffix, machine_format, refuse_result
from vmconv.machine.model import Identity, Machine
from vmconv.machine.places import file_name
from vmconv.model.options import parse_options
from vmconv.model.sources import File

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmconv.interface.machines import MachineFormat
    from vmconv.io.directory import Directory
    from vmconv.machine.request import MachineRequest
    from vmconv.model.plan import Plan


class Target(NamedTuple):
    """A format with its options, the adapted machine, and the directory and the name of its configuration.

    `stem` is the name that the user gave the configuration, without its suffix. The other files are named after it, and
    else after the machine.
    """

    format: MachineFormat
    options: Any
    adapted: Adapted
    directory: str
    name: str
    stem: str | None = None

    @property
    def compression(self) -> str | None:
        """The compression that the name of the new package asks for, `Zstandard` or `gzip`."""
        name = self.name.lower()
        kind = foreign_suffix(os.path.splitext(name)[1]) if name.endswith(self.format.compressed_suffixes) else None
        return kind.title if kind else None

    def disk_name(self, number: int, suffix: str) -> str:
        """Returns the file name of a disk; disks are counted from 0."""
        return file_name(self.format.disk_name(self._named(), number, suffix, self.options))

    def nvram_name(self) -> str:
        """Returns the file name of the firmware's variables."""
        return file_name(self.format.nvram_name(self._named(), self.options))

    def tpm_name(self, machine: Machine) -> str:
        """Returns the file name of the TPM's state, for a machine whose other files have their names."""
        return file_name(self.format.tpm_name(self._named(machine), self.options))

    def _named(self, machine: Machine | None = None) -> Machine:
        machine = machine or self.adapted.machine
        return machine if self.stem is None else machine.model_copy(update={"name": self.stem})

    def hint_if_taken(self, directory: Directory, plan: Plan) -> str:
        """Returns what to do if a file of the new machine exists: to replace files of another one would destroy it."""
        taken = [file.name for file in plan.files if directory.has(file.name)]
        same = self.format.is_package or bool(taken and self._is_there(directory, taken))
        if same and self.adapted.machine.identity.uuid:
            return "--force replaces it"
        if self.format.directory(self.adapted.machine, self.options):
            options = ", ".join(sorted(f"-o {name}" for name in _fields(self.options)))
            other = f"choose another directory, or another id ({options})"
        else:
            suffix = _suffix_of(self.name, self.format)
            name = f"{self.stem or self.name.removesuffix(suffix)}-2{suffix}"
            other = f"name the new configuration, such as {directory.join(name)}"
        # Machines without a UUID are told apart by their names alone.
        return f"{'--force replaces it; if it is' if same else 'it may be'} another machine's: {other}"

    def _is_there(self, directory: Directory, taken: Sequence[str]) -> bool:
        """True if the directory has this machine, and all files that are `taken` are this machine's.

        A machine without a UUID may be another one of the same name.
        """
        try:
            there = File(directory.join(self.name), directory.open(self.name))
        except (OSError, VmconvError):
            return False
        try:
            if not (self.format.can_read and self.format.probe(there)):
                return False
            found = self.format.read(there, Opener(Registry()))
        except VmconvError:
            return False
        finally:
            there.close()
        nvram = found.firmware.nvram
        files = [self.name, *(disk.file for disk in found.disks), nvram and nvram.file]
        own = {os.path.basename(name) for name in files if name}
        uuid = self.adapted.machine.identity.uuid
        same = found.identity.uuid == uuid if uuid else found.name == self.adapted.machine.name
        return same and own.issuperset(taken)


def target_of(request: MachineRequest, machine: Machine) -> Target:
    """Returns the target of a request. Raises `PlanError` if the machine cannot exist on the platform."""
    found, options, both = _adapted(request, machine)
    directory, name, stem = _place(request, found, both.machine, options)
    if "directory" in _fields(options) and not options.directory:
        # Some platforms need absolute paths in their configurations.
        options = dataclasses.replace(options, directory=os.path.realpath(directory))
    return Target(found, options, both, directory, name, stem)


def adapted_to(request: MachineRequest, machine: Machine) -> Machine:
    """Returns the machine in the terms of the request's target format."""
    return _adapted(request, machine)[2].machine


def _adapted(request: MachineRequest, machine: Machine) -> tuple[MachineFormat, Any, Adapted]:
    """Returns the target's format, its options, and the adapted machine."""
    found = machine_format(request.target_format or _named(request.target))
    if not found.can_write:
        raise UsageError(f"{found.name}: machines of this format cannot be written, only read")
    options = parse_options(found.options(), request.options, found.name)
    left = _without_what_stays(_identified(machine, request))
    adapted: Any = found.adapt(left.machine, options)
    refuse_result(adapted, Adapted, found.name, "adapt")
    _refuse_other_disks(left.machine, adapted.machine, found.name)
    both = Adapted(adapted.machine, left.substitutions + tuple(adapted.substitutions))
    return found, options, both


def _named(path: str) -> str:
    name = format_by_suffix(path)
    if name is None:
        raise UsageError(f"{path}: its name has no machine format's suffix", hint="name the format with -O")
    return name


def _fields(options: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(options)}


def _place(
    request: MachineRequest, found: MachineFormat, machine: Machine, options: Any
) -> tuple[str, str, str | None]:
    """Returns the directory and the name of the configuration, and the stem of that if the user named it."""
    path = request.target
    is_directory = path.endswith("/") or os.path.isdir(path)
    if not is_directory and path.lower().endswith(found.suffixes):
        name = os.path.basename(path)
        suffix = _suffix_of(name, found)
        # The members of a package are in no other machine's way.
        stem = None if found.is_package else name[: -len(suffix)] or None
        return os.path.dirname(path) or ".", name, stem
    named = format_by_suffix(path)
    if not is_directory and named not in (None, found.name):
        hint = f"with -O {found.name}, name the directory of the new machine; end it with / if that is its name"
        raise UsageError(f"{path}: has the suffix of {named}, not of {found.name}", hint=hint)
    below = found.directory(machine, options)
    return os.path.normpath(os.path.join(path, below)), file_name(found.config_name(machine, options)), None


def _suffix_of(name: str, found: MachineFormat) -> str:
    """Returns the longest of the format's suffixes that a name has, by default the first of all."""
    own = [each for each in found.suffixes if name.lower().endswith(each)]
    return max(own, key=len, default=found.suffixes[0])


def _refuse_other_disks(before: Machine, after: Machine, format_name: str) -> None:
    """Raises `PluginError` if adapting changed which disks the machine has."""
    if [(disk.file, disk.device) for disk in before.disks] != [(disk.file, disk.device) for disk in after.disks]:
        raise PluginError("its adapt changes which disks the machine has", format_name=format_name)


def _identified(machine: Machine, request: MachineRequest) -> Adapted:
    """Returns the machine with the identity that the request asks for."""
    identity = machine.identity
    if request.uuid == "text" and identity.uuid_text:
        identity = identity.model_copy(update={"uuid": identity.uuid_text})
    identity = identity.model_copy(update={"uuid_text": None})
    if not request.new_identity:
        return Adapted(machine.model_copy(update={"identity": identity}))
    return _cloned(machine, identity)


def _cloned(machine: Machine, identity: Identity) -> Adapted:
    """Returns the machine with new ids, and without its MAC addresses: the platform generates others."""
    reason = "a clone has an identity of its own"
    found = []
    fresh = {"uuid": uuid4(), "generation_id": uuid4() if identity.generation_id else None}
    for name in ("uuid", "generation_id", "instance_uuid", "serial"):
        before, after = getattr(identity, name), fresh.get(name)
        if before is not None:
            found.append(Substitution(f"identity.{name}", str(before), str(after or "none"), reason))
    nics = []
    for number, nic in enumerate(machine.nics):
        if nic.mac is not None:
            found.append(Substitution(f"nics[{number}].mac", nic.mac, "generated", reason))
        nics.append(nic.model_copy(update={"mac": None, "mac_origin": None}))
    identity = identity.model_copy(update={**fresh, "instance_uuid": None, "serial": None})
    return Adapted(machine.model_copy(update={"identity": identity, "nics": tuple(nics)}), tuple(found))


def _without_what_stays(identified: Adapted) -> Adapted:
    """Returns the machine without files that belong to the source's host: media, memory, and the TPM's state."""
    machine, found = identified.machine, list(identified.substitutions)
    removables = []
    for number, drive in enumerate(machine.removables):
        for field in ("file", "device"):
            if value := getattr(drive, field):
                reason = "media stay on the source's host; insert it again"
                found.append(Substitution(f"removables[{number}].{field}", value, "", reason))
        removables.append(drive.model_copy(update={"file": None, "device": None}))
    changes: dict[str, Any] = {"removables": tuple(removables)}
    if machine.memory_state:
        reason = "the machine starts from its disks; resume and shut it down first"
        found.append(Substitution("memory_state", machine.memory_state, "", reason))
        changes["memory_state"] = None
    if machine.tpm and machine.tpm.state:
        # `vmconv.machine.firmware` carries it, or reports its loss.
        changes["tpm"] = machine.tpm.model_copy(update={"state": None})
    if machine.snapshots:
        reason = "a conversion takes the current state"
        found.append(Substitution("snapshots", ", ".join(machine.snapshots), "", reason))
        changes["snapshots"] = ()
    return Adapted(machine.model_copy(update=changes), tuple(found))
