"""The conformance tests of machine formats, and a generator of machines.

A plugin's test file is mostly one class::

    from vmconv.testing import MachineTests

    class TestVmx(MachineTests):
        format = Vmx()
"""

from __future__ import annotations

import random
import subprocess
import sys
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from vmconv.errors import PlanError, VmconvError
from vmconv.interface.machines import MachineFormat
from vmconv.io.opener import Opener
from vmconv.io.registry import Registry
from vmconv.machine import model
from vmconv.machine.paths import carried, plain, restricted, stated, still_states
from vmconv.model.options import parse_options
from vmconv.model.sources import File
from vmconv.testing.disks import image_file
from vmconv.testing.malformed import memory_limit, time_limit

HOSTILE = (
    '"; rm -rf / #',
    "$(reboot) `reboot` ${HOME} %x%",
    "'; Remove-VM * -Force; '",
    "</name><disk/>&amp;<!--",
    "a: b\n- c: {d: [e]}\n---\n...",
    "\\\\server\\share\\x|22|0A",
    "=cmd|' /C calc'!A0",
    "ünïcödé 名前 \U0001f600",
    "|22 |0a",
    "null",
    "yes",
    "0x10",
    "1e3",
)
"""Strings that mean something in the language of some format."""

_ALPHABET = st.characters(min_codepoint=32, max_codepoint=0x2FFF, exclude_categories=("Cc", "Cs", "Cn"))


def words(*, lines: bool = False) -> st.SearchStrategy[str]:
    """Returns text as the model holds it, with `lines` of several lines."""
    hostile = st.sampled_from([text if lines else text.replace("\n", " ") for text in HOSTILE])
    text = hostile | st.text(_ALPHABET, min_size=1, max_size=20)
    return text.map(str.strip).filter(bool)


def _maybe(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | strategy


_BUS = st.sampled_from(["ide", "sata", "scsi", "nvme", "virtio", "usb"])
_INDEX = st.integers(0, 3)
_SIZE = st.integers(1, 4096).map(lambda count: count << 20)
_MAC = st.binary(min_size=6, max_size=6).map(lambda octets: octets.hex(":"))
_COUNT = st.integers(1, 16)


def _attached(bus: st.SearchStrategy[str], number: int) -> dict[str, st.SearchStrategy[Any]]:
    # No two devices at one place.
    return {"bus": bus, "controller": st.just(0), "unit": st.just(number), "boot_index": st.none()}


@st.composite
def _disks(draw: st.DrawFn) -> tuple[model.Disk, ...]:
    found = []
    for number in range(draw(st.integers(0, 3))):
        file = draw(st.sampled_from(["disk", "a b & <c>", "ünï"]))
        found.append(
            draw(
                st.builds(
                    model.Disk,
                    **_attached(_BUS, number),
                    file=st.just(f"{file}-{number}.img"),
                    format=st.sampled_from(["raw", "qcow2", "vmdk"]),
                    capacity=_SIZE,
                    file_size=_SIZE,
                    mode=_maybe(st.sampled_from(["persistent", "independent-persistent"])),
                    shared=_maybe(st.booleans()),
                    discard=_maybe(st.booleans()),
                    serial=_maybe(words()),
                )
            )
        )
    return tuple(found)


@st.composite
def _removables(draw: st.DrawFn) -> tuple[model.Removable, ...]:
    found = []
    for number in range(draw(st.integers(0, 2))):
        kind = draw(st.sampled_from(["cdrom", "floppy"]))
        bus = st.just("floppy") if kind == "floppy" else st.sampled_from(["ide", "sata", "scsi"])
        file = st.just(None) if number else _maybe(st.just("media.iso"))
        place = _attached(bus, number if kind == "floppy" else 4 + number)
        made = st.builds(model.Removable, **place, kind=st.just(kind), file=file, connected=_maybe(st.booleans()))
        found.append(draw(made))
    return tuple(found)


@st.composite
def machines(draw: st.DrawFn) -> model.Machine:
    """Generates machines of any kind: each field may be silent, and names may be hostile."""
    disks, removables = draw(_disks()), draw(_removables())
    buses = sorted({device.bus for device in (*disks, *removables) if device.bus})
    controllers = tuple(
        model.Controller(bus=bus, index=0, model=draw(_maybe(st.sampled_from(_MODELS.get(bus, ["ahci"])))))
        for bus in buses
    )
    nic = st.builds(
        model.Nic,
        mac=_maybe(_MAC),
        mac_origin=_maybe(st.sampled_from(["static", "generated"])),
        model=_maybe(st.sampled_from(model.NIC_MODELS)),
        network=_maybe(words()),
        network_kind=_maybe(st.sampled_from(["bridged", "nat", "internal"])),
        connected=_maybe(st.booleans()),
    )
    identity = {name: _maybe(st.uuids()) for name in ("uuid", "instance_uuid", "generation_id")}
    names = ("serial", "board_serial", "chassis_serial", "manufacturer", "product", "asset_tag")
    return draw(
        st.builds(
            model.Machine,
            name=_maybe(words()),
            description=_maybe(words(lines=True)),
            os=st.builds(
                model.GuestOS,
                id=_maybe(st.sampled_from(["debian12", "win2k22", "rhel9.2", "win10", "ubuntu22.04"])),
                architecture=_maybe(st.sampled_from(["x86_64", "i686"])),
            ),
            cpu=_cpus(),
            memory=st.builds(model.Memory, size=_maybe(_SIZE), max=st.none(), hot_add=_maybe(st.booleans())),
            firmware=st.builds(
                model.Firmware,
                kind=_maybe(st.sampled_from(["bios", "uefi"])),
                secure_boot=_maybe(st.booleans()),
                boot_order=st.permutations(["disk", "cdrom", "network"]).map(lambda order: tuple(order[:2]))
                | st.just(()),
            ),
            tpm=_maybe(st.builds(model.Tpm, version=_maybe(st.sampled_from(["1.2", "2.0"])))),
            identity=st.builds(model.Identity, **identity, **{name: _maybe(words()) for name in names}),
            board=st.builds(
                model.Board,
                chipset=_maybe(st.sampled_from(["i440fx", "q35"])),
                clock=_maybe(st.sampled_from(["utc", "localtime"])),
            ),
            controllers=st.just(controllers),
            disks=st.just(disks),
            removables=st.just(removables),
            nics=st.lists(nic, max_size=3).map(tuple),
            display=_maybe(st.builds(model.Display, model=_maybe(st.sampled_from(["vga", "vmware", "qxl"])))),
            sound=_maybe(st.sampled_from(["ac97", "hda", "sb16"])),
            usb=_maybe(st.sampled_from(["uhci", "ehci", "xhci"])),
            rng=_maybe(st.booleans()),
        )
    )


_MODELS = {
    "ide": ["piix3", "piix4", "ich6"],
    "scsi": ["buslogic", "lsilogic", "lsisas1068", "pvscsi", "virtio-scsi", "hyperv-scsi"],
    "nvme": ["nvme"],
    "virtio": ["virtio-blk"],
}


@st.composite
def _cpus(draw: st.DrawFn) -> model.Cpu:
    if draw(st.booleans()):
        return model.Cpu(count=draw(_maybe(_COUNT)), hot_add=draw(_maybe(st.booleans())))
    sockets, cores, threads = draw(_COUNT), draw(_COUNT), draw(st.sampled_from([1, 2]))
    return model.Cpu(count=sockets * cores * threads, sockets=sockets, cores=cores, threads=threads)


class _NoFiles(Opener):
    """An opener that opens nothing."""

    def __init__(self) -> None:
        super().__init__(Registry())

    def related(self, origin: File, reference: str, role: str, *, moved: bool = False) -> File:
        raise AssertionError(f"{role} {reference!r} was opened")


class MachineTests:
    """The tests that each machine format passes; subclasses set `format`."""

    format: ClassVar[MachineFormat]
    options: ClassVar[dict[str, Any]] = {}

    def config(self, machine: model.Machine) -> bytes:
        """Returns the configuration of an adapted machine; packages override this."""
        return self.format.write(machine, self.parsed())[-1].content

    def parsed(self) -> Any:
        return parse_options(self.format.options(), self.options, self.format.name)

    def adapted(self, machine: model.Machine) -> model.Machine:
        """Returns the machine in the terms of the format, if it can exist there."""
        try:
            return self.format.adapt(machine, self.parsed()).machine
        except PlanError:
            assume(False)
            raise

    def read(self, content: bytes) -> model.Machine:
        return self.format.read(image_file(content, f"test{self.format.suffixes[0]}"), _NoFiles())

    def test_carries_names_fields_of_the_model(self) -> None:
        for path in (path for path in self.format.carries if not path.startswith("extra.")):
            at: Any = model.Machine
            for name in path.split("."):
                assert name in _fields_of(at), path
                at = _fields_of(at)[name].annotation

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(machine=machines())
    def test_a_written_machine_is_read_again(self, machine: model.Machine) -> None:
        if not (self.format.can_read and self.format.can_write):
            pytest.skip(f"{self.format.name} does not both read and write")
        adapted = self.adapted(machine)
        found = restricted(self.read(self.config(adapted)), self.format.carries)
        assert found == restricted(adapted, self.format.carries)

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(machine=machines())
    def test_each_change_to_a_machine_has_a_reason(self, machine: model.Machine) -> None:
        if not self.format.can_write:
            pytest.skip(f"{self.format.name} has no writer")
        adapted = self.adapted(machine)
        substitutions = self.format.adapt(machine, self.parsed()).substitutions
        reasons = {substitution.path for substitution in substitutions}
        after = dict(stated(adapted))
        for path, value in stated(machine):
            if carried(path, self.format.carries) and not still_states(after, path, value):
                assert _covers(reasons, path), f"{path}: {value!r} became {after.get(path)!r} without a reason"
        assert all(each.reason and "\n" not in each.reason for each in substitutions)

    @settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
    @given(machine=machines())
    def test_an_adapted_machine_needs_no_other_change(self, machine: model.Machine) -> None:
        if not self.format.can_write:
            pytest.skip(f"{self.format.name} has no writer")
        adapted = self.adapted(machine)
        assert self.format.adapt(adapted, self.parsed()) == (adapted, ())
        assert self.config(adapted) == self.config(adapted)

    @settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
    @given(machine=machines(), seed=st.integers(0, 1 << 32))
    def test_damaged_configurations_are_read_or_refused(self, machine: model.Machine, seed: int) -> None:
        if not (self.format.can_read and self.format.can_write):
            pytest.skip(f"{self.format.name} does not both read and write")
        content = _damaged(self.config(self.adapted(machine)), random.Random(seed))
        with time_limit(), memory_limit():
            try:
                self.read(content)
            except VmconvError as exc:
                assert "\n" not in str(exc)

    def test_the_plugin_imports_no_model_at_start(self) -> None:
        module, heavy = type(self.format).__module__, {"pydantic", "numpy", "xml"}
        code = f"import {module}, sys; print(*sorted({heavy} & set(sys.modules)))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.split() == []

    def test_empty_and_random_files_are_not_claimed(self) -> None:
        noise = (b"", b"\0" * 512, random.Random(1).randbytes(4096), b"\x7fELF" + bytes(60))
        repeated = (b" " * 8192, b"<!--" * 2048, b"<?xml " * 1024, b"#\n" * 4096, b'"' * 4096, b"---\n" * 1024)
        for content in (*noise, *repeated):
            with time_limit():
                assert not self.format.probe(image_file(content, "x"))


def _fields_of(kind: Any) -> dict[str, Any]:
    """Returns the fields of a part of the model, whatever its annotation wraps it in."""
    from typing import get_args

    from pydantic import BaseModel

    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return dict(kind.model_fields)
    return next((fields for inner in get_args(kind) if (fields := _fields_of(inner))), {})


def _covers(reasons: set[str], path: str) -> bool:
    return any(
        path == reason or path.startswith((f"{reason}.", f"{reason}[")) for reason in reasons | {plain(path)} & reasons
    )


def _damaged(content: bytes, rng: random.Random) -> bytes:
    """Returns the content cut off, or with some bytes changed, repeated or removed."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data)) if data else 0
        kind = rng.randrange(4)
        if kind == 0:
            del data[at:]
        elif kind == 1 and data:
            data[at] = rng.randrange(256)
        elif kind == 2:
            data[at:at] = data[at : at + rng.randrange(1, 200)] * rng.randrange(1, 5)
        else:
            del data[at : at + rng.randrange(1, 50)]
    return bytes(data)
