"""Exports of XenServer and XCP-ng: the conformance kit, disks by reference, and damaged exports."""

from __future__ import annotations

import io
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import vmconv
from support.disks import QemuImg
from support.requirements import oracle_module
from support.xva_archives import MIB, archive, config, export, piece_of, pieces, record, records, summed
from vmconv.errors import ImageError, VmconvError
from vmconv.io.opener import Opener
from vmconv.io.registry import Registry, installed_machines
from vmconv.machine import Machine
from vmconv.testing import MachineTests, image_file, random_bytes
from vmconv.testing.malformed import memory_limit, time_limit
from vmconv_xva import Xva

XVA = Xva()


class TestXva(MachineTests):
    format = Xva()


def read(data: bytes, name: str = "web.xva") -> Machine:
    return XVA.read(image_file(data, name), Opener(Registry()))


def members(data: bytes) -> dict[str, bytes]:
    found = XVA.members(image_file(data, "web.xva"))
    return {each.name: each.table.read(0, each.table.size) for each in found}


def disk(size: int, seed: int) -> bytes:
    """Returns a disk, about half of whose pieces are zero."""
    rng = random.Random(seed)
    data = b"".join(rng.randbytes(MIB) if rng.random() < 0.5 else bytes(MIB) for _ in range(-(-size // MIB)))
    return data[:size]


# -- what xapi writes


def test_the_machine_is_that_of_the_records() -> None:
    found = read(export({"Ref:12": disk(3 * MIB, 1), "Ref:15": disk(MIB, 2)}))
    assert (found.name, found.description, found.os.source_id) == ("web", "from the shop", "debian-bookworm")
    assert (found.cpu.count, found.cpu.sockets, found.cpu.cores) == (4, 2, 2)
    assert (found.memory.size, found.memory.max) == (1 << 30, 2 << 30)
    assert (found.firmware.kind, found.firmware.secure_boot) == ("uefi", False)
    assert found.firmware.boot_order == ("disk", "cdrom", "network")
    assert str(found.identity.uuid) == "421f245c-7fa8-60fa-1122-334455667788"
    # Xen tells each guest its own product name.
    assert (found.identity.manufacturer, found.identity.product) == ("Acme", None)
    assert [(one.file, one.format, one.capacity) for one in found.disks] == [
        ("Ref:12", "raw", 3 * MIB),
        ("Ref:15", "raw", MIB),
    ]
    assert [(one.kind, one.file, one.connected) for one in found.removables] == [("cdrom", None, False)]
    (nic,) = found.nics
    assert (nic.mac, nic.mac_origin, nic.network) == ("aa:bb:cc:00:11:22", "static", "Pool network")
    assert found.extra == {"xva": {"platform.viridian": "true"}}


def test_what_the_model_has_no_place_for_is_stated() -> None:
    found = read(export({"Ref:12": bytes(MIB)}, HVM_boot_policy="", NVRAM={"EFI-variables": "VkFS"}))
    assert found.extra["xva"] == {
        "domain_type": "pv",
        "NVRAM": "4 characters of EFI variables",
        "platform.viridian": "true",
    }


def test_unknown_fields_of_the_machine_are_named() -> None:
    more: dict[str, Any] = {
        "ha_restart_priority": "restart",
        "other_config": {"a": "b", "c": ""},
        "bios_strings": {"bios-vendor": "x"},
    }
    found = read(export({"Ref:12": bytes(MIB)}, **more)).extra["xva"]
    named = {"ha_restart_priority": "restart", "other_config.a": "b", "bios_strings.bios-vendor": "x"}
    assert found.items() >= named.items()
    assert "other_config.c" not in found


def test_snapshots_are_not_the_machine() -> None:
    objects = [*records({"Ref:12": bytes(MIB)}), record("VM", "Ref:50", name_label="old", is_a_snapshot=True)]
    assert read(archive([("ova.xml", config(objects))])).name == "web"


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    sizes=st.lists(st.integers(1, 5 * 2048).map(lambda count: 512 * count), min_size=1, max_size=3),
    keep_alive=st.integers(0, 3),
    seed=st.integers(0, 99),
)
def test_any_export_has_its_disks(sizes: list[int], keep_alive: int, seed: int) -> None:
    disks = {f"Ref:{12 + number}": disk(size, seed + number) for number, size in enumerate(sizes)}
    found = members(export(disks, keep_alive=keep_alive))
    assert found.pop("ova.xml").startswith(b"<?xml")
    assert found == disks


def test_a_second_reader_finds_the_same() -> None:
    other = oracle_module("dissect.archive.xva").XVA
    disks = {"Ref:12": disk(9 * MIB, 3), "Ref:15": disk(4 * MIB, 4)}
    for keep_alive in (0, 2):
        data = export(disks, keep_alive=keep_alive)
        found = other(io.BytesIO(data))
        assert sorted(found.disks()) == ["Ref:12", "Ref:15"]
        for reference, content in disks.items():
            # dissect.archive 1.8 leaves out the last piece of a disk.
            known = (len(content) - 1) // MIB * MIB
            assert found.open(reference).read(known) == members(data)[reference][:known] == content[:known]


# -- conversions


@pytest.fixture
def backup(xfs_dir: Path) -> Path:
    (xfs_dir / "disk.raw").write_bytes(disk(8 * MIB, 5))
    (xfs_dir / "web.xva").write_bytes(export({"Ref:12": disk(8 * MIB, 5)}))
    return xfs_dir / "web.xva"


@pytest.mark.parametrize("target", sorted(name for name, one in installed_machines().machines.items() if one.can_write))
def test_an_export_becomes_a_machine_of_any_platform(target: str, backup: Path, qemu_img: QemuImg) -> None:
    result = vmconv.machine_convert(backup, backup.parent / "new", target_format=target)
    assert len(result.plan.disks) == 1
    made = Path(result.target).parent / result.plan.disks[0].target
    if made.exists():
        assert vmconv.compare(made, backup.parent / "disk.raw")
        qemu_img("compare", backup.parent / "disk.raw", made)


def test_pieces_are_shared_with_a_vmdk(backup: Path) -> None:
    result = vmconv.machine_convert(backup, backup.parent / "new", target_format="vmx", zero_copy="require")
    payload = 8 * MIB - (backup.parent / "disk.raw").read_bytes().count(bytes(MIB)) * MIB
    assert payload - MIB <= result.plan.totals.shared <= payload + 2 * MIB


def test_a_reference_leaves_all_payload_in_the_export(backup: Path, qemu_img: QemuImg) -> None:
    result = vmconv.machine_convert(backup, backup.parent, target_format="vmx", disk_options={"subformat": "reference"})
    assert result.plan.totals.copied == 0
    qemu_img("compare", backup.parent / "disk.raw", backup.parent / result.plan.disks[0].target)


def test_an_export_is_no_disk(backup: Path) -> None:
    with pytest.raises(ImageError, match="not a disk") as error:
        vmconv.info(backup)
    assert "vmconv machine convert" in str(error.value.hint)


# -- exports that are not as they should be

ONE = {"Ref:12": bytes(MIB) + b"x" * MIB + bytes(MIB)}
XML = ("ova.xml", config(records(ONE)))
FULL = pieces(ONE)


def _archive(*files: tuple[str, bytes]) -> bytes:
    return archive([XML, *files])


def _damaged(at: int, new: bytes, *, sum_up: bool = True) -> bytes:
    """Returns an export with other bytes in the header of its first piece."""
    data = bytearray(_archive(*FULL))
    start = 512 + -(-len(XML[1]) // 512) * 512
    data[start + at : start + at + len(new)] = new
    if sum_up:
        data[start : start + 512] = summed(bytes(data[start : start + 512]))
    return bytes(data)


HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "no records": (lambda: archive(FULL), "an export begins with ova.xml"),
    "no files": (lambda: bytes(10240), "an export begins with ova.xml"),
    "records twice": (lambda: _archive(XML, *FULL), "'ova.xml' is no piece of a disk"),
    "a path outside": (lambda: _archive(("../../etc/passwd", b"x")), "'../../etc/passwd' is no piece of a disk"),
    "an absolute path": (lambda: _archive(("/etc/passwd", b"x")), "'/etc/passwd' is no piece of a disk"),
    "checksum": (lambda: _damaged(0, b"X", sum_up=False), "checksum is"),
    "a link": (lambda: _damaged(156, b"2"), "type b'2' is neither a file nor a directory"),
    "a pax header": (lambda: _damaged(156, b"x"), "type b'x' is neither"),
    "size is no number": (lambda: _damaged(124, b"x" * 12), "is no number"),
    "size in base 256": (lambda: _damaged(124, b"\x80" + b"\xff" * 11), "is no number"),
    "size past the end": (lambda: _damaged(124, b"77777777777\0"), "reach past the end of the file"),
    "a prefix": (lambda: _damaged(345, b"dir"), "has a prefix for a long name"),
    "a large piece": (lambda: _archive(("Ref:12/00000000", bytes(MIB + 1))), "piece has 1048577 bytes, the limit is"),
    "a large digest": (lambda: _archive(("Ref:12/00000000.checksum", bytes(129))), "digest has 129 bytes"),
    "a digest without a piece": (lambda: _archive(*FULL[1:]), "does not follow the piece that it is the digest of"),
    "a digest of another piece": (lambda: _archive(FULL[0], FULL[3]), "does not follow the piece that it is"),
    "a digest twice": (lambda: _archive(*FULL[:2], *FULL[1:]), "does not follow the piece that it is the digest of"),
    "pieces twice": (lambda: _archive(*FULL, *FULL[:2]), "piece 0 of Ref:12 comes behind 2"),
    "pieces backwards": (lambda: _archive(*FULL[:2], *FULL[4:], *FULL[2:4]), "piece 1 of Ref:12 comes behind 2"),
    "no first piece": (lambda: _archive(*FULL[2:]), "Ref:12 begins with piece 1"),
    "a short piece": (
        lambda: _archive(*piece_of("Ref:12", 0, bytes(512)), *FULL[2:]),
        "piece 0 of Ref:12 has 512 bytes",
    ),
    "past the end": (lambda: _archive(*FULL, *piece_of("Ref:12", 3, bytes(512))), "piece 3 of Ref:12 has 512 bytes at"),
    "far past the end": (
        lambda: _archive(*FULL, *piece_of("Ref:12", 9_999_999_999, bytes(512))),
        "piece 9999999999 of Ref:12 has 512 bytes at",
    ),
    "cut off": (
        lambda: archive([XML, *FULL[:4]], end=False),
        "ends at 0x200000 of 0x300000, and the archive has no end",
    ),
    "cut in a header": (lambda: _archive(*FULL)[: 512 + 100], "reach past the end of the file"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_damaged_archive_is_refused_in_one_line(name: str) -> None:
    make, wanted = HOSTILE[name]
    data = make()
    with time_limit(), memory_limit(), pytest.raises(ImageError) as error:
        read(data)
        members(data)
    assert wanted in str(error.value)
    assert str(error.value).startswith("web.xva: ")
    assert "\n" not in str(error.value)
    found = re.search(r"tar header at (0x[0-9a-f]+): .*piece (\d+)", str(error.value))
    if found:
        assert data[int(found[1], 16) :].startswith(b"Ref:12/%08d" % int(found[2]))


def _objects(*changes: tuple[int, str, object]) -> bytes:
    """Returns an `ova.xml` with other fields: index of the record, field, value."""
    objects = records(ONE)
    for index, field, content in changes:
        objects[index]["snapshot"][field] = content
    return config(objects)


RECORDS: dict[str, tuple[Callable[[], bytes], str]] = {
    "a DOCTYPE": (lambda: b"<!DOCTYPE x [<!ENTITY a 'b'>]><value>&a;</value>", "DOCTYPE"),
    "an external entity": (lambda: b"<!DOCTYPE x SYSTEM 'file:///etc/passwd'><value/>", "DOCTYPE"),
    "a million elements": (
        lambda: b"<value><array>" + b"<data/>" * 1_000_000 + b"</array></value>",
        "more than 100000",
    ),
    "nested": (lambda: b"<value><array><data>" * 500, "nested deeper than 100"),
    "no XML": (lambda: b"\0" * 100, "is not well-formed XML"),
    "another root": (lambda: b"<struct/>", "'struct' is no value"),
    "no objects": (lambda: b"<value><struct/></value>", "objects: is no list of records"),
    "a record without class": (lambda: config([{"id": "Ref:0", "snapshot": {}}]), "objects[0]: has no class"),
    "a reference twice": (lambda: config([record("VM", "Ref:0"), record("VM", "Ref:0")]), "'Ref:0' is there twice"),
    "no machine": (lambda: config([]), "an export has one machine, this one has none"),
    "two machines": (
        lambda: config([record("VM", "Ref:0", name_label="a"), record("VM", "Ref:1", name_label="b")]),
        "this one has 'a', 'b'",
    ),
    "a member twice": (
        lambda: b"<value><struct>" + b"<member><name>a</name><value/></member>" * 2 + b"</struct></value>",
        "two members 'a'",
    ),
    "a member without value": (
        lambda: b"<value><struct><member><name>a</name></member></struct></value>",
        "a member without name or value",
    ),
    "a member without name": (
        lambda: b"<value><struct><member><value/></member></struct></value>",
        "a member without name or value",
    ),
    "processors": (lambda: _objects((0, "VCPUs_max", "99999999999")), "VCPUs_max: '99999999999' is not a number"),
    "memory": (lambda: _objects((0, "memory_static_max", "-1")), "memory_static_max: '-1' is not a number"),
    "uuid": (lambda: _objects((0, "uuid", "../x")), "uuid: '../x' is not a UUID"),
    "size": (lambda: _objects((5, "virtual_size", str(1 << 63))), "virtual_size: '9223372036854775808' is not"),
    "no size": (lambda: _objects((5, "virtual_size", "")), "virtual_size: '' is not a number from 1"),
    "a VDI that is none": (lambda: _objects((4, "VDI", "Ref:9")), "VDI: 'Ref:9' is no VDI of the export"),
    "a VDI that is missing": (lambda: _objects((4, "VDI", "../../etc/passwd")), "is no VDI of the export"),
    "a place twice": (lambda: _objects((3, "userdevice", "10")), "userdevice: 10 is there twice"),
    "a place": (lambda: _objects((4, "userdevice", "1000000")), "userdevice: '1000000' is not a number"),
    "MAC": (lambda: _objects((2, "MAC", "zz")), "'zz' is not a MAC address"),
    "a list for a text": (lambda: _objects((0, "name_label", ["a"])), "name_label: is no text"),
}


@pytest.mark.parametrize("name", RECORDS)
def test_damaged_records_are_refused_in_one_line(name: str) -> None:
    make, wanted = RECORDS[name]
    data = archive([("ova.xml", make()), *FULL])
    with time_limit(), memory_limit(), pytest.raises(ImageError) as error:
        read(data)
    assert wanted in str(error.value)
    assert "\n" not in str(error.value)


def test_names_of_strangers_become_plain_ones(tmp_path: Path) -> None:
    data = export(ONE, name_label="../../etc/\x85\npasswd", name_description="a\x7fb")
    (tmp_path / "web.xva").write_bytes(data)
    result = vmconv.machine_convert(tmp_path / "web.xva", tmp_path / "new", target_format="libvirt")
    assert Path(result.target).parent == tmp_path / "new"
    assert result.plan.opened == (str(tmp_path / "web.xva"),)


def test_a_disk_without_pieces_is_refused(tmp_path: Path) -> None:
    (tmp_path / "web.xva").write_bytes(_archive())
    with pytest.raises(VmconvError, match="has no member 'Ref:12'"):
        vmconv.machine_convert(tmp_path / "web.xva", tmp_path / "new", target_format="libvirt")


def test_changed_bytes_make_no_error_of_python() -> None:
    data = _archive(*FULL)
    rng = random.Random(1)
    for _ in range(300):
        changed = bytearray(data)
        changed[rng.randrange(20_000)] = rng.randrange(256)
        with time_limit():
            try:
                read(bytes(changed))
                members(bytes(changed))
            except ImageError as error:
                assert "\n" not in str(error)


def test_random_payload_is_not_looked_at() -> None:
    content = random_bytes(2 * MIB, 9)
    assert members(export({"Ref:12": content}))["Ref:12"] == content
