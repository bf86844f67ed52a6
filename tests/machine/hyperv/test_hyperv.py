"""Machines of Hyper-V: configurations that are read, and scripts that another parser reads."""

from __future__ import annotations

import io
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any, ClassVar
from uuid import UUID

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.hyperv_machines import (
    BIOS,
    FIRST_GENERATION,
    NIC,
    SECOND_GENERATION,
)
from support.hyperv_storage import PAGE, Twice, header, resealed, sealed, storage
from support.powershell import Command, Name, statements, verbatim
from support.requirements import CORPUS, missing, oracle_module
from vmconv.errors import ImageError, PlanError, VmconvError
from vmconv.io.opener import Opener
from vmconv.io.registry import Registry
from vmconv.machine import (
    Controller,
    Cpu,
    Disk,
    Firmware,
    GuestOS,
    Identity,
    Machine,
    Memory,
    Nic,
    Nvram,
    Removable,
    Serial,
    Tpm,
)
from vmconv.model.options import parse_options
from vmconv.testing import MachineTests, image_file, machines
from vmconv.testing.malformed import memory_limit, time_limit
from vmconv_hyperv import HyperV
from vmconv_hyperv.cmdlets import CMDLETS, command, quote


class NoFiles(Opener):
    def __init__(self) -> None:
        super().__init__(Registry())

    def related(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("a file was opened")


def read(content: bytes) -> Machine:
    return HyperV().read(image_file(content, "web.vmcx"), NoFiles())


def configuration(tree: dict[str, Any]) -> bytes:
    return storage({"configuration": tree})


def changed(path: str, value: Any) -> dict[str, Any]:
    """Returns the second generation's tree with another value at a path."""

    def within(tree: dict[str, Any], names: list[str]) -> dict[str, Any]:
        new = within(tree.get(names[0], {}), names[1:]) if names[1:] else value
        return tree | {names[0]: new}

    return within(SECOND_GENERATION, path.split("/"))


def test_a_second_generation_machine_is_read() -> None:
    scsi = {"bus": "scsi", "controller": 0}
    assert read(configuration(SECOND_GENERATION)) == Machine.model_validate(
        {
            "name": "web & <co>",
            "description": "first\nsecond",
            "cpu": Cpu(count=4),
            "memory": Memory(size=2 << 30),
            "firmware": Firmware(
                kind="uefi", secure_boot=True, nvram=Nvram(file=r"C:\VMs\web\0AA394FA.vmgs", kind="vmgs")
            ),
            "tpm": Tpm(version="2.0"),
            "identity": Identity(
                uuid=UUID("7ffee066-9755-4950-9a16-4c94ac67ad00"),
                instance_uuid=UUID("0aa394fa-7c4a-4070-ba32-773d43b28a68"),
                # VMGENID.EXE prints fe6f6992be334a43:805a287a250989e4 in this guest: both words are little-endian.
                generation_id=UUID(bytes_le=bytes.fromhex("434a33be92696ffee48909257a285a80")),
                serial="1981-9952-3234-1295-3674-7651-98",
                board_serial="board",
                chassis_serial="chassis",
                asset_tag="tag",
            ),
            "board": {"hardware_version": "9.0"},
            "controllers": [Controller(bus="scsi", index=number, model="hyperv-scsi") for number in (0, 1)],
            "disks": [
                Disk(file=r"C:\VMs\web\web.vhdx", unit=0, **scsi),
                Disk(file=r"\\server\share\data.vhdx", unit=63, **scsi),
                Disk(device=r"\\.\PHYSICALDRIVE2", bus="scsi", controller=1, unit=5),
            ],
            "removables": [Removable(kind="cdrom", file=r"C:\iso\debian.iso", unit=1, **scsi)],
            "nics": [
                Nic(
                    mac="00:15:5d:01:07:dc",
                    mac_origin="static",
                    model="hyperv",
                    network="Virtual External Switch",
                    connected=True,
                )
            ],
            "extra": {
                "hyperv": {
                    "memory.minimum": "512",
                    "memory.maximum": "4096",
                    "Synthetic SCSI Controller/controller0/drive0/weight": "100",
                    "Synthetic SCSI Controller/controller0/drive1/weight": "100",
                    "Synthetic SCSI Controller/controller0/drive2/weight": "100",
                    "Synthetic SCSI Controller/controller0/drive63/weight": "100",
                    "Synthetic SCSI Controller 2/controller0/drive5/weight": "100",
                }
            },
        }
    )


def test_a_first_generation_machine_is_read() -> None:
    found = read(configuration(FIRST_GENERATION))
    assert found.firmware == Firmware(kind="bios", boot_order=("cdrom", "disk", "network", "floppy"))
    assert found.controllers == (
        Controller(bus="ide", index=0),
        Controller(bus="ide", index=1),
        Controller(bus="scsi", index=0, model="hyperv-scsi"),
    )
    assert found.disks == (Disk(file=r"D:\old.vhd", bus="ide", controller=0, unit=0),)
    assert found.removables == (
        Removable(kind="cdrom", bus="ide", controller=1, unit=0),
        Removable(kind="floppy", file=r"D:\boot.vfd", bus="floppy", controller=0, unit=0),
    )
    assert found.nics == (Nic(model="hyperv-legacy", connected=False),)
    assert found.serials == (Serial(index=0, kind="pipe", target=r"\\.\pipe\com1"),)
    assert found.tpm is None
    assert {key.rpartition("/")[2] for key in found.extra["hyperv"]} == {"weight"}


def _leaves(tree: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{path}{name}/")
        else:
            yield f"{path}{name}", value


PLACES = sorted({path.rpartition("/")[0] for path, _ in _leaves(SECOND_GENERATION) if "manifest" not in path})


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("value", ["x", 7, True, 1.5, b"bytes"], ids=lambda value: type(value).__name__)
def test_an_unknown_setting_is_named(place: str, value: Any) -> None:
    whole = read(configuration(SECOND_GENERATION)).extra["hyperv"]
    found = read(configuration(changed(f"{place}/unknown", value))).extra["hyperv"]
    ((key, shown),) = found.items() - whole.items()
    assert key.endswith("/unknown")
    assert shown == {str: "x", int: "7", bool: "true", float: "8 bytes", bytes: "5 bytes"}[type(value)]


def test_each_setting_has_an_effect() -> None:
    whole = read(configuration(SECOND_GENERATION))
    silent = set()
    for path, value in _leaves(SECOND_GENERATION):
        other = not value if isinstance(value, bool) else value + 1 if isinstance(value, int) else f"{value}7"
        try:
            found = read(configuration(changed(path, other)))
        except ImageError:
            continue
        if found == whole:
            silent.add(path.rpartition("/")[2])
    # Of the tree itself; names and instances in the manifest; the type and the path of an empty drive.
    assert silent == {"size", "version", "flags", "VDEVVersion", "name", "instance", "type", "pathname"}


def test_another_program_finds_the_same_values() -> None:
    hyperv = oracle_module("dissect.hypervisor.descriptor.hyperv")
    tree = changed("properties/notes", "n" * 3000) | {"many": {f"key{number}": "x" * 90 for number in range(40)}}
    content = configuration(tree)
    assert hyperv.HyperVFile(io.BytesIO(content)).as_dict()["configuration"] == {
        **tree,
        "settings": tree["settings"] | {"processors": {"count": 4}},
    }
    assert read(content).description == "n" * 3000


def test_a_saved_state_is_no_configuration() -> None:
    """Refused, but its storage is read as another program reads it."""
    path = CORPUS / "configs.tar.xz"
    if not path.exists():
        missing("corpus", f"{path} is not there")
    import tarfile

    with tarfile.open(path) as tar:
        file = tar.extractfile(next(name for name in tar.getnames() if name.endswith("/88D07DD7.VMRS")))
        assert file is not None
        content = file.read()
    assert HyperV().probe(image_file(content, "a.vmrs"))
    with pytest.raises(ImageError, match=r"configuration/settings: is not there: .* saved state \(.vmrs\)"):
        read(content)
    from vmconv_hyperv.storage import read as read_storage

    ours = list(read_storage(image_file(content, "a.vmrs")).texts())
    theirs = oracle_module("dissect.hypervisor.descriptor.hyperv").HyperVFile(io.BytesIO(content))
    entries = [entry for tables in theirs.key_tables.values() for entry in tables[0].entries]
    assert Counter(ours) == Counter(entry.value for entry in entries if entry.type.name == "String")
    assert len(ours) == 16


@pytest.mark.parametrize(
    ("path", "value", "problem"),
    [
        ("properties/subtype", 2, "configuration/properties/subtype: 2 is no generation"),
        ("properties/name", 5, "configuration/properties/name: is of type 3, not 6"),
        ("properties/name", Twice("a", "b"), "configuration/properties/name: is there twice"),
        ("properties/name", "a\x1bb", "configuration/properties name: 'a.*which configurations cannot hold"),
        ("properties/global_id", "x", "configuration/properties/global_id: 'x' is not a GUID"),
        ("settings/memory/bank/size", -1, "configuration/settings/memory/bank size: -1048576"),
        ("settings/memory/bank/size", "big", "configuration/settings/memory/bank/size: is of type 6, not 3 or 4"),
        ("settings/processors/count", 100000, "configuration count: 100000"),
        ("settings/processors", Twice({}, {}), "configuration/settings/processors: is there twice"),
        (f"_{NIC.lower()}_/MacAddress", "00-15", f"_{NIC.lower()}_/MacAddress: '00-15' is not a MAC address"),
        ("global_settings/devices/generation_id", "12", "generation_id: '12' is not 32 hexadecimal digits"),
        (f"_{BIOS}_/bios_guid", "{12}", "bios_guid: '.12.' is not a GUID"),
    ],
    ids=[
        *("subtype", "name-type", "name-twice", "name-control", "global-id", "memory-negative", "memory-type"),
        *("processors", "processors-twice", "mac", "generation-id", "bios-guid"),
    ],
)
def test_values_that_contradict_their_type_are_refused(path: str, value: Any, problem: str) -> None:
    with pytest.raises(ImageError, match=problem):
        read(configuration(changed(path, value)))


def test_an_unknown_boot_device_is_refused() -> None:
    tree = FIRST_GENERATION | {f"_{BIOS}_": {"boot": {"device0": "Tape"}}}
    with pytest.raises(ImageError, match="boot/device0: 'Tape' is no device to start from"):
        read(configuration(tree))


def patched(content: bytes, at: int, new: bytes, begin: int = 0, end: int = 0, seal: int = 0) -> bytes:
    """Returns the content with other bytes, and the structure from `begin` to `end` sealed again at `seal`."""
    data = content[:at] + new + content[at + len(new) :]
    return data[:begin] + sealed(data[begin:end], seal) + data[end:] if end else data


SOUND = configuration(SECOND_GENERATION)
ENTRY = 2 * PAGE + 8
TABLE = 4 * PAGE
KEY = TABLE + 10
KEY_END = KEY + 21 + len("configuration") + 1 + 12


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (storage({}, sequences=(1, 2))[:4000], "header at 0x1000: 46 bytes reach past the end"),
        (patched(patched(SOUND, 8, b"\x99"), PAGE + 8, b"\x99"), "header at 0x0: neither it nor its copy"),
        (header(9, 0x301) + SOUND[46:], "header at 0xa: version 0x301 is not supported, only 0x400"),
        (storage({}, changes=3), "replay log at 0x3000: has 3 changes to apply"),
        (patched(SOUND, 3 * PAGE, b"\0"), "replay log at 0x3000: its header has not the signature and checksum"),
        (patched(SOUND, 2 * PAGE, b"\0"), "object table at 0x2000: signature 0x1110000"),
        (patched(SOUND, 2 * PAGE + 4, b"\xff\xff\xff\xff"), "object table at 0x2000: signature 0x1110001 with"),
        (patched(SOUND, ENTRY + 5, b"\1"), "object at 0x2008: its checksum is wrong"),
        (patched(SOUND, ENTRY + 13, b"\xff\xff\xff", ENTRY, ENTRY + 18, 1), "key tables have more than"),
        (patched(SOUND, ENTRY + 13, b"\xff\xff\x0f", ENTRY, ENTRY + 18, 1), "key table at 0x4000: .* reach past"),
        (patched(SOUND, ENTRY + 13, b"\x05\x00", ENTRY, ENTRY + 18, 1), "key table at 0x4000: has 5 bytes"),
        (patched(SOUND, TABLE + 4, b"\x09"), "key table at 0x4000: its header has not the signature"),
        (patched(SOUND, TABLE + 2, b"\2", TABLE, TABLE + 10, 6), "key table at 0x5000: index 2 is there twice"),
        (patched(SOUND, KEY + 2, b"\1"), "key at 0x400a: size 1 is not possible"),
        (patched(SOUND, KEY + 22, b"x"), "key at 0x400a: its checksum is wrong"),
        (patched(SOUND, KEY, b"\x63"), "key at 0x400a: type 99 is not known"),
        (patched(SOUND, KEY, b"\6"), "key at 0x400a: its value of 4 bytes is longer"),
        (patched(SOUND, KEY + 6, b"\1\0\x0a\0", KEY, KEY_END, 12), "keys have no way to the root"),
        (patched(SOUND, KEY + 6, b"\x63", KEY, KEY_END, 12), "keys have no way to the root"),
    ],
    ids=[
        *("short", "headers", "version", "log", "log-header", "objects", "count", "object", "tables", "table-end"),
        *("table-size", "table", "index", "size", "key", "type", "value", "loop", "orphan"),
    ],
)
def test_damaged_storage_is_refused_with_the_offset(content: bytes, problem: str) -> None:
    if problem == "key at 0x400a: its value of 4 bytes is longer":
        content = patched(content, KEY + 20, b"\x1a")
    with time_limit(), memory_limit(), pytest.raises(ImageError, match=problem):
        read(content)


def test_a_chain_of_object_tables_without_end_is_refused() -> None:
    last = ENTRY + 18 * 6
    chained = patched(SOUND, last, b"\1" + bytes(4) + (2 * PAGE).to_bytes(8, "little"), last, last + 18, 1)
    with pytest.raises(ImageError, match="object table at 0x2000: the chain of object tables comes back to it"):
        read(chained)


def test_the_header_with_the_higher_sequence_number_counts() -> None:
    content = storage({"configuration": SECOND_GENERATION}, sequences=(5, 6))
    assert read(patched(content, 10, b"\0\0\0\0", 0, 46, 4)).name == "web & <co>"
    with pytest.raises(ImageError, match="version 0x0"):
        read(patched(content, PAGE + 10, b"\0\0\0\0", PAGE, PAGE + 46, 4))


def test_deep_trees_are_refused() -> None:
    tree: dict[str, Any] = {}
    for _ in range(40):
        tree = {"n": tree}
    with pytest.raises(ImageError, match="is nested deeper than 32"):
        read(storage(tree))


def parsed(**options: Any) -> Any:
    return parse_options(HyperV().options(), options, "hyperv")


def script(machine: Machine, **options: Any) -> bytes:
    adapted = HyperV().adapt(machine, parsed(**options)).machine
    (config,) = HyperV().write(adapted, parsed(**options))
    return config.content


def commands(content: bytes) -> list[Command]:
    return [each for pipeline in statements(content) for each in pipeline]


def made_by(content: bytes) -> Machine:
    """Returns the machine that a script makes, by what the documentation of its cmdlets says."""
    made = _Made()
    for each in commands(content):
        made.run(each)
    return made.machine()


class _Made:
    """What the cmdlets of a script do, one method each."""

    def __init__(self) -> None:
        self.paths: dict[str, str] = {}
        self.fields: dict[str, Any] = {"cpu": {}, "memory": {}, "firmware": {}}
        self.scsi = 0
        self.devices: dict[str, list[dict[str, Any]]] = {"disk": [], "dvd": [], "nic": []}
        self.bound: dict[str, tuple[str, int]] = {}

    def run(self, each: Command) -> None:
        for value in each.parameters.values():
            assert not isinstance(value, Name) or value in ("$PSScriptRoot", "$vm", *self.paths, *self.bound), value
        method = getattr(self, "do_" + each.name.replace("-", "_").replace("=", "set").lower(), None)
        if method is not None:
            method(each.target, **each.parameters)

    def do_set(self, target: str, value: str) -> None:
        assert (target, value) == ("$ErrorActionPreference", "Stop")

    def do_join_path(self, target: str, Path: str, ChildPath: str) -> None:  # noqa: N803
        self.paths[target] = ChildPath

    def do_new_vm(self, target: str, **p: Any) -> None:
        assert target == "$vm" and p["NoVHD"] is True
        self.fields |= {"name": p["Name"], "memory": {"size": p["MemoryStartupBytes"]}}
        self.fields["firmware"]["kind"] = {1: "bios", 2: "uefi"}[p["Generation"]]

    def do_set_vm(self, _: None, **p: Any) -> None:
        self.fields["description"] = p["Notes"]

    def do_set_vmprocessor(self, _: None, **p: Any) -> None:
        self.fields["cpu"]["count"] = p["Count"]

    def do_set_vmmemory(self, _: None, **p: Any) -> None:
        assert p["StartupBytes"] == self.fields["memory"]["size"]
        if p["DynamicMemoryEnabled"]:
            limits = {"memory.minimum": p["MinimumBytes"], "memory.maximum": p["MaximumBytes"]}
            self.fields["extra"] = {"hyperv": {name: str(value >> 20) for name, value in limits.items()}}

    def do_set_vmfirmware(self, _: None, **p: Any) -> None:
        if "EnableSecureBoot" in p:
            self.fields["firmware"]["secure_boot"] = {"On": True, "Off": False}[p["EnableSecureBoot"]]
        else:
            order = p["BootOrder"] if isinstance(p["BootOrder"], list) else [p["BootOrder"]]
            words = {"disk": "disk", "dvd": "cdrom", "nic": "network"}
            classes = dict.fromkeys(words[self.bound[name][0]] for name in order)
            self.fields["firmware"]["boot_order"] = tuple(classes)

    def do_set_vmbios(self, _: None, **p: Any) -> None:
        words = {"IDE": "disk", "CD": "cdrom", "LegacyNetworkAdapter": "network", "Floppy": "floppy"}
        assert sorted(p["StartupOrder"]) == sorted(words)
        self.fields["firmware"]["boot_order"] = tuple(words[name] for name in p["StartupOrder"])

    def do_enable_vmtpm(self, _: None, **p: Any) -> None:
        self.fields["tpm"] = {"version": "2.0"}

    def do_add_vmscsicontroller(self, _: None, **p: Any) -> None:
        self.scsi += 1

    def do_add_vmharddiskdrive(self, target: str, **p: Any) -> None:
        self._add("disk", target, {"bus": p["ControllerType"].lower(), "file": self.paths[p["Path"]], **_place(p)})

    def do_add_vmdvddrive(self, target: str, **p: Any) -> None:
        bus = "ide" if self.fields["firmware"]["kind"] == "bios" else "scsi"
        self._add("dvd", target, {"kind": "cdrom", "bus": bus, **_place(p)})

    def do_add_vmnetworkadapter(self, target: str, **p: Any) -> None:
        mac = p.get("StaticMacAddress")
        octets = mac and ":".join(mac[at : at + 2] for at in range(0, 12, 2)).lower()
        model = "hyperv-legacy" if p.get("IsLegacy") else "hyperv"
        origin = "static" if mac else None
        network = p.get("SwitchName")
        linked = {"network": network, "connected": network is not None}
        self._add("nic", target, {"mac": octets, "mac_origin": origin, "model": model, **linked})

    def _add(self, kind: str, target: str, device: dict[str, Any]) -> None:
        self.bound[target] = kind, len(self.devices[kind])
        self.devices[kind].append(device)

    def machine(self) -> Machine:
        drives = [*self.devices["disk"], *self.devices["dvd"]]
        assert all(drive["controller"] < self.scsi for drive in drives if drive["bus"] == "scsi")
        places = [(drive["bus"], drive["controller"], drive["unit"]) for drive in drives]
        assert len(set(places)) == len(places)
        ide = sorted({controller for bus, controller, _ in places if bus == "ide"})
        scsi = [Controller(bus="scsi", index=index, model="hyperv-scsi") for index in range(self.scsi)]
        controllers = [*(Controller(bus="ide", index=index) for index in ide), *scsi]
        disks, dvds, nics = self.devices.values()
        more = {"controllers": controllers, "disks": disks, "removables": dvds, "nics": nics}
        return Machine.model_validate(self.fields | more)


def _place(p: dict[str, Any]) -> dict[str, int]:
    return {"controller": p["ControllerNumber"], "unit": p["ControllerLocation"]}


class TestHyperV(MachineTests):
    """The kit with scripts read by tree-sitter's parser, because the format itself reads no scripts."""

    format: ClassVar[Any] = HyperV()
    _last: Machine

    def config(self, machine: Machine) -> bytes:
        self._last = machine
        return super().config(machine)

    def read(self, content: bytes) -> Machine:
        made = made_by(content)
        # The format and the sizes of a disk are in its file.
        stated = [disk.model_dump(include={"format", "capacity", "file_size"}) for disk in self._last.disks]
        disks = [disk.model_copy(update=facts) for disk, facts in zip(made.disks, stated, strict=True)]
        return made.model_copy(update={"disks": tuple(disks)})

    @pytest.mark.parametrize("tree", [FIRST_GENERATION, SECOND_GENERATION], ids=["first", "second"])
    @settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
    @given(seed=st.integers(0, 1 << 32))
    def test_damaged_configurations_are_read_or_refused(self, tree: dict[str, Any], seed: int) -> None:
        rng = random.Random(seed)
        data = bytearray(configuration(tree))
        for _ in range(rng.randint(1, 4)):
            at = rng.choice((rng.randrange(len(data)), TABLE + rng.randrange(2048)))
            data[at : at + 4] = rng.choice((bytes(4), b"\xff" * 4, rng.randbytes(4)))
        # Half of the damage has checksums that are right.
        if rng.random() < 0.5:
            data = bytearray(resealed(bytes(data)))
        with time_limit(), memory_limit():
            try:
                read(bytes(data))
            except VmconvError as exc:
                assert "\n" not in str(exc)


HOSTILE = [
    "'; Remove-VM * -Force; '",
    "\u2019; Remove-VM *; \u2019",
    "\u2018\u201a\u201b'\u2019",
    "'",
    "''",
    "\u2019'",
    '$(Restart-Computer) `n "@',
    "@'\n'@",
    "#>\n<#",
    "a\nStop-VM *",
    "\u2013Force \u2014WhatIf",
]


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_hostile_strings_stay_strings(text: str) -> None:
    line = text.replace("\n", " ").strip()
    machine = Machine(
        name=line,
        description=text,
        disks=(Disk(file=line, bus="scsi", controller=0, unit=0),),
        nics=(Nic(network=line, connected=True),),
    )
    found = commands(script(machine))
    assert {each.name for each in found} - {"="} <= CMDLETS.keys()
    again = made_by(script(machine))
    assert (again.name, again.description) == (line, text)
    assert (again.disks[0].file, again.nics[0].network) == (line, line)


@given(text=st.text())
def test_a_quoted_string_ends_where_its_quote_ends(text: str) -> None:
    assert verbatim(quote(text)) == text


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(machine=machines())
def test_a_script_uses_listed_cmdlets_and_parameters_only(machine: Machine) -> None:
    try:
        content = script(machine)
    except PlanError:
        return
    for each in commands(content):
        if each.name != "=":
            assert each.parameters.keys() <= CMDLETS[each.name], each
    assert b"Force" not in b"".join(line for line in content.splitlines() if not line.count(b"'"))


def test_the_list_has_nothing_that_starts_or_forces() -> None:
    assert not any(name.split("-")[0] in ("Start", "Stop", "Invoke", "Restart") for name in CMDLETS)
    assert not any(name == "Remove-VM" for name in CMDLETS)
    assert not any({"Force", "Confirm"} & parameters for parameters in CMDLETS.values())


def test_what_is_not_listed_cannot_be_written() -> None:
    with pytest.raises(ValueError, match="Start-VM with"):
        command("Start-VM")
    with pytest.raises(ValueError, match=r"New-VM with \['Force'\] is not in the list"):
        command("New-VM", Force=True)


def test_a_script_checks_before_it_makes_anything() -> None:
    machine = Machine(
        disks=(Disk(file="a.vhdx"), Disk(file="b.vhdx"), Disk(device="/dev/sdb"), Disk(capacity=1 << 30)),
        nics=(Nic(network="LAN"), Nic(network="LAN")),
    )
    names = [each.name for each in commands(script(machine))]
    before = names[: names.index("New-VM")]
    assert Counter(before) == {"=": 1, "Join-Path": 3, "Get-Item": 2, "Get-VMSwitch": 1}
    assert names.count("New-VHD") == 1
    assert names.count("Add-VMHardDiskDrive") == 3


def words_of(machine: Machine, **options: Any) -> list[tuple[str, str, str]]:
    return [(each.path, each.before, each.after) for each in HyperV().adapt(machine, parsed(**options)).substitutions]


def test_generation_2_has_scsi_only() -> None:
    machine = Machine(
        firmware=Firmware(kind="uefi"),
        controllers=(Controller(bus="nvme"),),
        disks=(Disk(file="a", bus="nvme", controller=0, unit=0), Disk(file="b", bus="scsi", controller=0, unit=0)),
        removables=(Removable(kind="cdrom", bus="sata", controller=0, unit=1),),
    )
    assert words_of(machine) == [
        ("disks[0].bus", "nvme", "scsi"),
        ("disks[0].unit", "0", "1"),
        ("removables[0].bus", "sata", "scsi"),
        ("removables[0].unit", "1", "2"),
        ("controllers", "nvme 0", "scsi 0 hyperv-scsi"),
    ]


def test_generation_2_takes_no_vhd() -> None:
    disks = (Disk(file="a.vhd", format="vhd", bus="ide", controller=0, unit=0),)
    assert b"a.vhd" in script(Machine(name="web", firmware=Firmware(kind="bios"), disks=disks))
    with pytest.raises(PlanError, match=r"a\.vhd: Hyper-V's generation 2, which has UEFI, takes no VHD"):
        script(Machine(name="web", firmware=Firmware(kind="uefi"), disks=disks))


def test_generation_1_starts_from_ide() -> None:
    scsi = tuple(Disk(file=f"{number}", bus="scsi", controller=0, unit=number) for number in range(3))
    machine = Machine(firmware=Firmware(kind="bios"), disks=scsi, removables=(Removable(kind="cdrom"),))
    assert [(disk.bus, disk.controller, disk.unit) for disk in made_by(script(machine)).disks] == [
        ("ide", 0, 0),
        ("scsi", 0, 1),
        ("scsi", 0, 2),
    ]
    started = machine.model_copy(update={"disks": (*scsi[:2], scsi[2].model_copy(update={"boot_index": 1}))})
    found = made_by(script(started))
    assert [(disk.bus, disk.controller, disk.unit) for disk in found.disks] == [
        ("scsi", 0, 0),
        ("scsi", 0, 1),
        ("ide", 0, 0),
    ]
    assert (found.removables[0].bus, found.removables[0].unit) == ("ide", 1)


def test_the_starting_disk_finds_a_place_beside_four_dvd_drives() -> None:
    dvds = tuple(Removable(kind="cdrom", bus="ide", controller=number // 2, unit=number % 2) for number in range(4))
    machine = Machine(disks=(Disk(file="a", bus="scsi", controller=0, unit=0),), removables=dvds)
    assert ("removables", "cdrom, cdrom, cdrom, cdrom", "cdrom, cdrom, cdrom") in words_of(machine)
    assert len(made_by(script(machine)).removables) == 3


def test_devices_with_an_index_come_first_in_generation_2() -> None:
    machine = Machine(
        firmware=Firmware(kind="uefi", boot_order=("network", "disk")),
        disks=(Disk(file="a"), Disk(file="b", boot_index=2)),
        removables=(Removable(kind="cdrom", boot_index=1),),
        nics=(Nic(),),
    )
    orders = [each.parameters["BootOrder"] for each in commands(script(machine)) if "BootOrder" in each.parameters]
    assert orders == [["$dvd0", "$disk1", "$nic0", "$disk0"]]


@pytest.mark.parametrize(
    ("os", "template"),
    [
        ("win2k22", "MicrosoftWindows"),
        ("debian12", "MicrosoftUEFICertificateAuthority"),
        (None, "MicrosoftUEFICertificateAuthority"),
    ],
    ids=["windows", "linux", "unknown"],
)
def test_secure_boot_has_the_keys_of_the_system(os: str | None, template: str) -> None:
    machine = Machine(os=GuestOS(id=os), firmware=Firmware(kind="uefi", secure_boot=True))
    (found,) = (each for each in commands(script(machine)) if each.name == "Set-VMFirmware")
    assert found.parameters == {"VM": "$vm", "EnableSecureBoot": "On", "SecureBootTemplate": template}


def test_secure_boot_is_off_unless_the_machine_states_it() -> None:
    machine = Machine(firmware=Firmware(kind="uefi"))
    (found,) = (each for each in commands(script(machine)) if each.name == "Set-VMFirmware")
    assert found.parameters == {"VM": "$vm", "EnableSecureBoot": "Off"}


def test_addresses_and_networks_become_static_ones_and_switches() -> None:
    nic = Nic(mac="52:54:00:01:02:03", mac_origin="generated", model="virtio", network="br0", connected=True)
    assert words_of(Machine(nics=(nic,)), switch="External") == [
        ("nics[0].model", "virtio", "hyperv"),
        ("nics[0].mac_origin", "generated", "static"),
        ("nics[0].network", "br0", "External"),
    ]
    found = made_by(script(Machine(nics=(nic, Nic(network="br1", connected=False))), switch="External"))
    assert [(each.mac, each.network) for each in found.nics] == [("52:54:00:01:02:03", "External"), (None, None)]


def test_limits_of_dynamic_memory_survive() -> None:
    limits = {"memory.minimum": "512", "memory.maximum": "4096"}
    machine = Machine(memory=Memory(size=1 << 30), extra={"hyperv": limits})
    assert made_by(script(machine)).extra == {"hyperv": limits}
    for bad in ({"memory.minimum": "-1", "memory.maximum": "4096"}, {"memory.minimum": "2048"}, {"x": "1"}):
        hostile = machine.model_copy(update={"extra": {"hyperv": bad, "vmx": {"a": "b"}}})
        adapted = HyperV().adapt(hostile, parsed())
        assert adapted.machine.extra == {"vmx": {"a": "b"}}
        assert [(each.path, each.before, each.after) for each in adapted.substitutions] == [
            ("extra.hyperv", key, "") for key in bad
        ]


@pytest.mark.parametrize(
    ("machine", "problem"),
    [
        (Machine(os=GuestOS(architecture="i686"), firmware=Firmware(kind="uefi")), "runs 64-bit guests only"),
        (Machine(disks=(Disk(bus="scsi"),)), r"disks\[0\]: has no file, no device and no size"),
        (
            Machine(firmware=Firmware(kind="uefi"), disks=tuple(Disk(file=f"{n}") for n in range(257))),
            r"disks\[256\]: a machine of Hyper-V has at most 256 SCSI drives",
        ),
    ],
    ids=["32-bit", "nothing", "many"],
)
def test_machines_that_cannot_exist_are_refused(machine: Machine, problem: str) -> None:
    with pytest.raises(PlanError, match=problem):
        HyperV().adapt(machine, parsed())


@pytest.mark.parametrize(
    ("name", "stem"), [("web", "web"), ("a/b:c?", "a_b_c_"), ("...", "machine"), (None, "machine")], ids=str
)
def test_files_have_names_that_windows_allows(name: str | None, stem: str) -> None:
    machine = Machine(name=name)
    assert HyperV().config_name(machine, parsed()) == f"{stem}.ps1"
    assert HyperV().disk_name(machine, 1, ".vhdx", parsed()) == f"{stem}-disk2.vhdx"


def test_a_long_name_is_cut() -> None:
    assert words_of(Machine(name="x" * 101))[0] == ("name", "x" * 101, "x" * 100)


def test_scripts_are_not_taken_for_configurations() -> None:
    assert not HyperV().probe(image_file(script(Machine()), "a.ps1"))
    assert HyperV().probe(image_file(SOUND, "a.vmcx"))
