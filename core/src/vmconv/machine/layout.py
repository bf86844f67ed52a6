"""The files of a new machine: its disks, its configuration and its firmware's variables, laid out before any exists."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from vmconv.conversion.containers import Container, Part, lay_out, parts_of
from vmconv.conversion.containers import Target as DiskTarget
from vmconv.conversion.planner import merge_plans, plan_layout
from vmconv.errors import PlanError, PluginError, UsageError
from vmconv.interface.machines import ConfigFile, Member
from vmconv.machine.model import Layer, Machine, Nvram
from vmconv.machine.places import file_name
from vmconv.model import references
from vmconv.model.extents import Extents
from vmconv.model.layout import Layout, OutFile
from vmconv.model.options import parse_options
from vmconv.model.sources import Blob

if TYPE_CHECKING:
    from vmconv.interface.backend import Proposal
    from vmconv.interface.format import Format
    from vmconv.interface.machines import Digest
    from vmconv.io.registry import Registry
    from vmconv.machine.firmware import Variables
    from vmconv.machine.request import MachineRequest
    from vmconv.machine.target import Target
    from vmconv.model.image import Image
    from vmconv.model.plan import Plan


class NewDisk(NamedTuple):
    """A disk of the new machine: its number in the machine, its layers from the base up, and the plan of its files."""

    number: int
    containers: tuple[Container, ...]
    plan: Plan
    digest: Digest | None = None
    is_kept: bool = False
    """True if the image goes into a package with all its bytes; `digest` is the one that its old package states."""

    @property
    def container(self) -> Container:
        """The image that the guest writes to."""
        return self.containers[-1]


class NewMachine(NamedTuple):
    """A machine that is laid out: `configs` are its small files, the configuration last, with its name.

    `package` is the table of the only file, if the format is one; `digested` are bytes of payload that are read for it.
    """

    machine: Machine
    disks: tuple[NewDisk, ...]
    configs: tuple[ConfigFile, ...]
    package: Extents | None
    plan: Plan
    digested: int = 0


def lay_out_machine(
    target: Target,
    images: Sequence[Image | None],
    firmware: Variables,
    request: MachineRequest,
    way: Proposal,
    registry: Registry,
    kept: Mapping[int, Member],
) -> NewMachine:
    """Returns the new machine with all its files.

    `images` has one entry for each disk of the machine, None for a physical device. `firmware` are its
    variables and the state of its TPM, `kept` the disks that may stay as they are, by their numbers.
    """
    disks = tuple(
        _disk(number, image, target, request, way, registry, kept.get(number))
        for number, image in enumerate(images)
        if image is not None
    )
    machine = with_files(target.adapted.machine, disks, firmware, target)
    configs = named(target.format.write(machine, target.options), machine, firmware, target)
    if target.format.is_package:
        members = [_member(disk) for disk in disks]
        table = target.format.pack(configs, members, max(way.survey.unit, 1), target.options)
        if not isinstance(table, Extents):
            raise PluginError(f"its pack returns {type(table).__name__}, not Extents", format_name=target.format.name)
        losses = tuple(loss for disk in disks for loss in disk.plan.losses)
        files = (OutFile(table),)
        plan = plan_layout(Layout(files, losses), target.name, target.directory, way.backend.name, way.survey)
        return NewMachine(machine, disks, configs, table, plan, target.format.digested(members, target.options))
    small = plan_of_configs(configs, target, way)
    return NewMachine(machine, disks, configs, None, merge_plans([*(disk.plan for disk in disks), small]))


def plan_of_configs(configs: Sequence[ConfigFile], target: Target, way: Proposal) -> Plan:
    """Returns the plan that writes the small files of a machine."""
    layouts = (OutFile(Extents.whole(Blob(config.name, config.content)), config.name) for config in configs)
    return plan_layout(Layout(tuple(layouts)), target.name, target.directory, way.backend.name, way.survey)


def _disk(
    number: int,
    image: Image,
    target: Target,
    request: MachineRequest,
    way: Proposal,
    registry: Registry,
    kept: Member | None,
) -> NewDisk:
    wanted = disk_format(target, request, registry)
    usual = target.format.disk_options(target.options) if wanted.name == target.format.disk_format else {}
    _refuse_other_options(request.disk_options, usual, target)
    options = parse_options(wanted.options(), {**usual, **request.disk_options}, wanted.name)
    if wanted.keeps_source(options):
        raise UsageError(f"{wanted.name}: a machine's disk cannot have its source as its backing file")
    place = DiskTarget.of(wanted, options, target.directory, target.disk_name(number, suffix_of(wanted)))
    parts = _parts(image, place, request, target, registry)
    kind = adapter(target.adapted.machine, number, wanted)
    if kept is not None and image.format_name == wanted.name and kind in (None, image.facts.adapter_type):
        return _kept(number, image, kept, place, way)
    stating = [part._replace(image=part.image.stating(adapter_type=kind)) for part in parts]
    containers = lay_out(stating, place, way.survey, registry, None)
    plans = []
    for made in containers:
        within = request.allow_external if request.confined else None
        references.confirm(made.layout.references, target.directory, within=within)
        if target.format.is_package and len(made.layout.files) > 1:
            raise PlanError(f"{made.name}: is {len(made.layout.files)} files, and a package takes one for each disk")
        losses = tuple(f"{made.name}: {loss}" for loss in made.losses())
        plans.append(plan_layout(made.layout, made.name, target.directory, way.backend.name, way.survey, losses))
    return NewDisk(number, tuple(containers), merge_plans(plans))


def _kept(number: int, image: Image, kept: Member, place: DiskTarget, way: Proposal) -> NewDisk:
    """Returns a disk of which all bytes stay, in a package of its own."""
    identity = None if image.facts.identity is None else image.facts.identity.bytes
    layout = Layout((OutFile(kept.table),))
    made = Container(image, image, place.format, place.name, None, layout, identity)
    plan = plan_layout(layout, made.name, place.directory, way.backend.name, way.survey)
    return NewDisk(number, (made,), plan, kept.digest, is_kept=True)


def _parts(image: Image, place: DiskTarget, request: MachineRequest, target: Target, registry: Registry) -> list[Part]:
    """Returns the images of a disk, the base first. Layers are named after the disk, counted from the top."""
    chain = request.chain and image.parent is not None
    if chain and target.format.no_chains is not None:
        raise PlanError(
            f"{image.file.name}: has layers below it, which {target.name} cannot have: {target.format.no_chains}",
            hint="without --chain, each disk becomes one image",
        )
    parts = parts_of(image, place, registry, None, chain=chain)
    suffix = suffix_of(place.format)
    stem = place.name.removesuffix(suffix)
    names = [f"{stem}-layer{depth}{suffix}" for depth in range(len(parts) - 1, 0, -1)]
    return [part._replace(name=name) for part, name in zip(parts, [*names, place.name], strict=True)]


def _refuse_other_options(asked: Mapping[str, Any], usual: Mapping[str, Any], target: Target) -> None:
    for name, value in usual.items():
        if str(asked.get(name, value)) != str(value):
            raise UsageError(
                f"--disk-options {name}={asked[name]}: {target.format.name} states that its disks have {name}={value}",
                hint=f"vmconv machine formats lists the options of {target.format.name}",
            )


def adapter(machine: Machine, number: int, wanted: Format) -> str | None:
    """Returns the adapter type for disk formats that state one: the family of the controller in the new machine."""
    disk = machine.disks[number]
    if "adapter_type" not in wanted.carries or disk.bus is None:
        return None
    if disk.bus != "scsi":
        return "ide"
    model = machine.controller_model(disk.bus, disk.controller)
    return "buslogic" if model == "buslogic" else "lsilogic"


def disk_format(target: Target, request: MachineRequest, registry: Registry) -> Format:
    """Returns the format of the new disks; raises `UsageError` if the platform does not have it."""
    wanted = registry.writer(request.disk_format or target.format.disk_format)
    accepted = target.format.disk_formats
    if accepted and wanted.name not in accepted:
        hint = f"--disk-format may be {', '.join(sorted(accepted))}"
        raise UsageError(f"{target.format.name}: machines have no {wanted.name} disks", hint=hint)
    if wanted.kind != "disk":
        raise UsageError(f"--disk-format {wanted.name}: is a format of memory, not of disks")
    return wanted


def suffix_of(wanted: Format) -> str:
    """Returns the suffix of new files of a format."""
    return next(iter(wanted.suffixes), f".{wanted.name}")


def _member(disk: NewDisk) -> Member:
    return Member(disk.container.name, disk.container.layout.files[-1].table, disk.digest)


def with_files(machine: Machine, disks: Sequence[NewDisk], firmware: Variables, target: Target) -> Machine:
    """Returns the machine with the names, formats and sizes of the new files."""
    devices = list(machine.disks)
    for disk in disks:
        layers = tuple(Layer.model_validate(_known(made)) for made in disk.containers[-2::-1])
        changes = {**_facts(disk.container), "layers": layers}
        devices[disk.number] = devices[disk.number].model_copy(update=changes)
    nvram = Nvram(file=firmware.store.name, kind=target.format.nvram_kind or "vmware") if firmware.store else None
    own = machine.firmware.model_copy(update={"nvram": nvram})
    machine = machine.model_copy(update={"disks": tuple(devices), "firmware": own})
    if machine.tpm is None or firmware.tpm is None:
        return machine
    tpm = machine.tpm.model_copy(update={"state": target.tpm_name(machine)})
    return machine.model_copy(update={"tpm": tpm})


def _facts(made: Container) -> dict[str, object]:
    """Returns what a configuration may say of a disk's new file."""
    sizes = {"capacity": made.disk.size, "file_size": made.layout.files[-1].table.size}
    return {**_known(made), **sizes}


def _known(made: Container) -> dict[str, object]:
    """Returns what a configuration may say of an image to tell it from others."""
    known: dict[str, object] = {"file": made.name, "format": made.format.name}
    if made.identity is not None:
        known["image_uuid"] = uuid.UUID(bytes=made.identity)
    return known


def named(
    written: Sequence[ConfigFile], machine: Machine, firmware: Variables, target: Target
) -> tuple[ConfigFile, ...]:
    """Returns all small files of the machine with their names, the configuration last."""
    if not written or written[-1].name:
        raise PluginError("its writer returns no configuration", format_name=target.format.name)
    extra = [config._replace(name=file_name(config.name)) for config in written[:-1]]
    if firmware.store:
        extra.append(firmware.store)
    if firmware.tpm is not None and machine.tpm is not None and machine.tpm.state is not None:
        extra.append(ConfigFile(machine.tpm.state, firmware.tpm))
    return (*extra, written[-1]._replace(name=target.name))
