"""What a scan finds in datastores, and what becomes of it in the catalogue."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import vmconv
from fleet.in_memory import Node, nodes
from support import domains, parallels_images
from support.disks import MIB, QemuImg, make_disk
from vmconv_fleet.catalogue import inspection, kinds, machines, scanning
from vmconv_fleet.catalogue.places import disk_id
from vmconv_fleet.catalogue.scanning import Scanner
from vmconv_fleet.replication.clock import OFFSET_FILE, wall_ms
from vmconv_fleet.replication.records import Change, Record


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with nodes(1, tmp_path) as (one,):
        yield one


@pytest.fixture
def datastore(tmp_path: Path) -> Path:
    directory = tmp_path / "images"
    directory.mkdir()
    return directory


def scan(node: Node, **datastores: Path) -> None:
    """Scans once; the records are written when this returns."""
    scanner = Scanner(node.service, {name: str(path) for name, path in datastores.items()})
    scanner.start()
    try:
        for name in datastores:
            node.body_when(node.id, "datastore", name, lambda one: one.body.get("scanned_ms", 0) > 0)
    finally:
        scanner.stop()


def disks(node: Node) -> dict[str, Record]:
    return {one.body["name"]: one for one in node.service.view().find("disk", node.id)}


def test_the_id_of_a_disk_is_that_of_earlier_versions() -> None:
    """Jobs, histories and scripts name disks by their ids."""
    assert (disk_id("ds", "a.raw"), disk_id("ds", "sub/b.vmdk")) == ("c86f72532e044987", "422dba6bc8029312")


def test_a_disk_is_described(node: Node, datastore: Path) -> None:
    make_disk(datastore / "a.raw", 8 * MIB)
    scan(node, ds=datastore)
    (record,) = disks(node).values()
    assert record.id == disk_id("ds", "a.raw")
    assert (record.body["format"], record.body["virtual_size"], record.body["in_use"]) == ("raw", 8 * MIB, False)
    assert record.body["actual_size"] == (datastore / "a.raw").stat().st_blocks * 512
    store = node.service.view().get(node.id, "datastore", "ds")
    assert store
    assert (store.body["disks"], store.body["path"]) == (1, str(datastore))
    assert store.body["backends"]["copy"]["usable"]
    able = node.service.view().get(node.id, "capabilities", "installed")
    assert able
    assert able.body["formats"]["raw"]["writes"]


def test_a_chain_is_followed_by_ids(node: Node, datastore: Path, qemu_img: QemuImg) -> None:
    make_disk(datastore / "base.raw", MIB)
    (datastore / "snapshots").mkdir()
    qemu_img("create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", datastore / "one.qcow2")
    qemu_img("create", "-q", "-f", "qcow2", "-b", "../one.qcow2", "-F", "qcow2", datastore / "snapshots/two.qcow2")
    scan(node, ds=datastore)
    chain = disks(node)["snapshots/two.qcow2"].body["chain"]
    assert [layer["name"] for layer in chain] == ["one.qcow2", "base.raw"]
    assert [layer["disk"] for layer in chain] == [disk_id("ds", "one.qcow2"), disk_id("ds", "base.raw")]


def test_hostile_images_are_listed_with_their_problem(node: Node, datastore: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.raw").write_bytes(b"secret")
    (datastore / "link.raw").symlink_to(tmp_path / "secret.raw")
    (datastore / "garbage.qcow2").write_bytes(os.urandom(4096))
    (datastore / "short.qcow2").write_bytes(b"QFI\xfb\0\0\0\3")
    os.mkfifo(datastore / "pipe.raw")
    (datastore / os.fsdecode(b"caf\xe9.raw")).write_bytes(bytes(512))
    (datastore / "<script>\n\x1b[31m.raw").write_bytes(bytes(512))
    scan(node, ds=datastore)
    found = disks(node)
    assert found.keys() == {"link.raw", "garbage.qcow2", "short.qcow2", "<script>\n\x1b[31m.raw"}
    assert "lies outside the datastores" in found["link.raw"].body["problem"]
    assert "actual_size" not in found["link.raw"].body
    assert "no signature of qcow2" in found["garbage.qcow2"].body["problem"]
    assert found["short.qcow2"].body["problem"]
    assert "problem" not in found["<script>\n\x1b[31m.raw"].body
    store = node.service.view().get(node.id, "datastore", "ds")
    assert store
    assert "not UTF-8" in store.body["problem"]


def test_a_parent_outside_of_all_datastores_is_not_read(
    node: Node, datastore: Path, tmp_path: Path, qemu_img: QemuImg
) -> None:
    make_disk(tmp_path / "outside.raw", MIB)
    qemu_img("create", "-q", "-f", "qcow2", "-b", tmp_path / "outside.raw", "-F", "raw", datastore / "top.qcow2")
    scan(node, ds=datastore)
    body = disks(node)["top.qcow2"].body
    assert "lies outside" in body["problem"]
    assert not body.get("chain")


def test_extents_of_an_image_are_no_images(node: Node, datastore: Path, qemu_img: QemuImg) -> None:
    make_disk(datastore / "a.raw", MIB)
    qemu_img("convert", "-O", "vmdk", "-o", "subformat=monolithicFlat", datastore / "a.raw", datastore / "flat.vmdk")
    assert (datastore / "flat-flat.vmdk").exists()
    scan(node, ds=datastore)
    assert disks(node).keys() == {"a.raw", "flat.vmdk"}


@pytest.fixture
def victims_child(datastore: Path, qemu_img: QemuImg) -> bytes:
    """Returns a sparse VMDK that names another tenant's disk as its parent: what a guest writes into its own disk."""
    make_disk(datastore / "a.raw", MIB)
    qemu_img("convert", "-O", "vmdk", datastore / "a.raw", datastore / "victim.vmdk")
    qemu_img("create", "-q", "-f", "vmdk", "-b", "victim.vmdk", "-F", "vmdk", datastore / "child.vmdk")
    content = (datastore / "child.vmdk").read_bytes()
    (datastore / "child.vmdk").unlink()
    return content


def overwrite(path: Path, content: bytes) -> None:
    with path.open("r+b") as file:
        file.write(content)


def test_a_header_in_a_flat_extent_makes_no_disk(
    node: Node, datastore: Path, qemu_img: QemuImg, victims_child: bytes
) -> None:
    create = ("create", "-q", "-f", "vmdk", "-o")
    qemu_img(*create, "subformat=monolithicFlat", datastore / "tenant.vmdk", "8M")
    qemu_img(*create, "subformat=twoGbMaxExtentFlat", datastore / "split.vmdk", "8M")
    parts = [datastore / name for name in ("tenant-flat.vmdk", "split-f001.vmdk")]
    # A flat extent of another name, and one whose descriptor is gone. The first claims another disk too.
    (datastore / "own.vmdk").write_text((datastore / "tenant.vmdk").read_text().replace("tenant-flat", "payload"))
    make_disk(datastore / "payload.vmdk", 8 * MIB)
    make_disk(datastore / "lost-flat.vmdk", 8 * MIB)
    for path in (*parts, datastore / "payload.vmdk", datastore / "lost-flat.vmdk"):
        overwrite(path, victims_child)
    scan(node, ds=datastore)
    found = disks(node)
    assert found.keys() == {
        "a.raw",
        "victim.vmdk",
        "tenant.vmdk",
        "split.vmdk",
        "own.vmdk",
        "payload.vmdk",
        "lost-flat.vmdk",
    }
    assert "is a part of own.vmdk: a guest writes its content" in found["payload.vmdk"].body["problem"]
    assert "flat extent, whose content is a guest's" in found["lost-flat.vmdk"].body["problem"]
    for name in ("payload.vmdk", "lost-flat.vmdk"):
        assert not found[name].body.keys() & {"format", "virtual_size", "chain", "identity"}
    for name in ("tenant.vmdk", "split.vmdk", "own.vmdk"):
        assert "problem" not in found[name].body


def test_a_header_in_a_data_file_or_a_bundles_plain_image_makes_no_disk(
    node: Node, datastore: Path, qemu_img: QemuImg, victims_child: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    # QEMU makes a relative data file in its own directory.
    monkeypatch.chdir(datastore)
    data = "data_file=payload.vmdk,data_file_raw=on"
    make_disk(datastore / "payload.vmdk", MIB)
    qemu_img("create", "-q", "-f", "qcow2", "-o", data, datastore / "outside.qcow2", "1M")
    parallels_images.bundle(datastore / "disk.hdd")
    vmconv.convert(datastore / "a.raw", datastore / "real.hds")
    overwrite(datastore / "payload.vmdk", victims_child)
    overwrite(datastore / "disk.hdd/base.hds", (datastore / "real.hds").read_bytes()[:4096])
    scan(node, ds=datastore)
    found = disks(node)
    assert "is a part of outside.qcow2" in found["payload.vmdk"].body["problem"]
    assert "is a part of DiskDescriptor.xml" in found["disk.hdd/base.hds"].body["problem"]
    assert found["disk.hdd/top.hds"].body["format"] == "parallels"
    assert "problem" not in found["real.hds"].body


def test_a_guest_does_not_claim_other_disks(node: Node, datastore: Path, qemu_img: QemuImg) -> None:
    qemu_img("create", "-q", "-f", "vmdk", "-o", "subformat=monolithicFlat", datastore / "own.vmdk", "16K")
    make_disk(datastore / "a.raw", MIB)
    qemu_img("convert", "-O", "vmdk", datastore / "a.raw", datastore / "victim.vmdk")
    text = (datastore / "own.vmdk").read_text()
    (datastore / "own.vmdk").write_text(text.replace("own-flat", "payload"))
    size = (datastore / "victim.vmdk").stat().st_size // 512
    said = text.replace("own-flat", "victim").replace("RW 32", f"RW {size}").encode()
    (datastore / "payload.vmdk").write_bytes(said.ljust(16 << 10, b"\0"))
    scan(node, ds=datastore)
    found = disks(node)
    assert "is a part of own.vmdk" in found["payload.vmdk"].body["problem"]
    assert "problem" not in found["victim.vmdk"].body


def test_very_many_files_of_a_tenant_hide_no_others(
    datastore: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(inspection, "MAX_IMAGES", 20)
    monkeypatch.setattr(inspection, "MAX_FILES", 60)
    for directory, number in (("a-tenant/deep", 100), ("b-other", 3), ("c-another", 3)):
        (datastore / directory).mkdir(parents=True)
        for each in range(number):
            make_disk(datastore / directory / f"{each:03}.raw", 4096)
    make_disk(datastore / "own.raw", 4096)
    (datastore / "b-other/zzz.vmx").write_text('displayName = "z"')
    found = list(inspection._Inspection({"ds": str(datastore)}, {}).records("ds"))
    names = {body["name"] for kind, _, body in found if kind == "disk"}
    assert len(names) == 20
    assert {f"{other}/{each:03}.raw" for other in ("b-other", "c-another") for each in range(3)} | {"own.raw"} < names
    assert [body["file"] for kind, _, body in found if kind == "vm"] == ["b-other/zzz.vmx"]
    assert "more than 60 files" in found[-1][2]["problem"]
    monkeypatch.setattr(inspection, "MAX_FILES", 1000)
    *_, (_, _, store) = inspection._Inspection({"ds": str(datastore)}, {}).records("ds")
    assert store["problem"] == "more than 20 images: the rest is not listed"


class _Looked(set[str]):
    """Files that count how often somebody goes through them."""

    times = 0

    def __iter__(self) -> Iterator[str]:
        _Looked.times += 1
        return super().__iter__()


@pytest.mark.parametrize("is_ring", [False, True])
def test_files_that_claim_each_the_next_one_take_no_time(is_ring: bool) -> None:
    """A tenant's ten thousand small descriptors must not keep the disks of others from being listed."""
    number, parts = 500, inspection._Parts()
    for each in range(number):
        following = {f"/ds/{(each + 1) % number}"} if is_ring or each + 1 < number else set()
        parts._claims[f"/ds/{each}"] = inspection._Claim(str(each), following, _Looked(following))
    _Looked.times = 0
    _, payloads = parts.belonging()
    assert _Looked.times <= 5 * number
    # Each second one is a payload, and says nothing; in a ring all are.
    assert sorted(payloads) == sorted(f"/ds/{each}" for each in range(0 if is_ring else 1, number, 1 if is_ring else 2))


def test_a_disk_that_another_refers_to_stays_a_disk(node: Node, datastore: Path, qemu_img: QemuImg) -> None:
    """A header of its own, which no guest writes: the referring disk has only ranges behind it."""
    make_disk(datastore / "a.raw", 8 * MIB)
    qemu_img("convert", "-O", "qcow2", datastore / "a.raw", datastore / "b.qcow2")
    for name in ("a.raw", "b.qcow2"):
        vmconv.convert(datastore / name, datastore / f"{name}.vmdk", options={"subformat": "reference"})
    scan(node, ds=datastore)
    found = disks(node)
    assert found.keys() == {"a.raw", "b.qcow2", "a.raw.vmdk", "b.qcow2.vmdk"}
    assert not [name for name, record in found.items() if "problem" in record.body]


def test_an_image_that_is_written_to_is_in_use(node: Node, datastore: Path) -> None:
    import fcntl
    import struct

    make_disk(datastore / "a.raw", MIB)
    with (datastore / "a.raw").open("r+b") as file:
        # As QEMU does for writing: it locks byte 101.
        fcntl.fcntl(file, fcntl.F_OFD_SETLK, struct.pack("@hhqqi", fcntl.F_RDLCK, os.SEEK_SET, 101, 1, 0))
        scan(node, ds=datastore)
    assert disks(node)["a.raw"].body["in_use"] is True


def test_only_differences_are_written(node: Node, datastore: Path) -> None:
    for name in ("a", "b", "c"):
        make_disk(datastore / f"{name}.raw", MIB)
    scan(node, ds=datastore)
    before = disks(node)
    (datastore / "b.raw").unlink()
    make_disk(datastore / "d.raw", MIB)
    node.write(Change("datastore", "ds", {"path": str(datastore)}))
    scan(node, ds=datastore)
    after = disks(node)
    assert after.keys() == {"a.raw", "c.raw", "d.raw"}
    assert [after[name].position for name in ("a.raw", "c.raw")] == [
        before[name].position for name in ("a.raw", "c.raw")
    ]


def test_only_requested_scans_run(node: Node, datastore: Path) -> None:
    scanner = Scanner(node.service, {"ds": str(datastore)})
    scanner.start()
    try:
        first = node.body_when(node.id, "datastore", "ds", lambda one: one.body.get("scanned_ms", 0) > 0)
        make_disk(datastore / "new.raw", MIB)
        node.write(Change("datastore", "ds", {**first.body, "scan_asked_ms": 7}))
        done = node.body_when(node.id, "datastore", "ds", lambda one: one.body.get("scan_answered_ms") == 7)
        assert done.body["disks"] == 1
        assert disks(node).keys() == {"new.raw"}
    finally:
        scanner.stop()


def test_disks_of_a_datastore_that_is_removed_leave_the_catalogue(node: Node, datastore: Path) -> None:
    make_disk(datastore / "a.raw", MIB)
    scanner = Scanner(node.service, {"ds": str(datastore)})
    scanner.start()
    try:
        node.body_when(node.id, "datastore", "ds", lambda one: one.body.get("scanned_ms", 0) > 0)
        node.write(Change("datastore", "ds", None))
        node.until(lambda: not disks(node))
    finally:
        scanner.stop()
    # What was removed does not come back with the configuration that named it once.
    scanner = Scanner(node.service, {"ds": str(datastore)})
    scanner.start()
    scanner.stop()
    assert not node.service.view().find("datastore", node.id)


def test_a_datastore_that_is_away_keeps_its_disks(node: Node, datastore: Path) -> None:
    make_disk(datastore / "a.raw", MIB)
    scan(node, ds=datastore)
    datastore.rename(datastore.with_name("away"))
    before = node.service.view().get(node.id, "datastore", "ds")
    assert before
    node.write(Change("datastore", "ds", {**before.body, "scanned_ms": 0}))
    scan(node, ds=datastore)
    store = node.service.view().get(node.id, "datastore", "ds")
    assert store
    assert store.body["problem"] == "is not a directory"
    assert disks(node).keys() == {"a.raw"}


def test_an_inspection_that_fails_is_a_problem_of_the_datastore(node: Node, datastore: Path) -> None:
    scanner = Scanner(node.service, {"ds": str(datastore)}, command=["false"])
    scanner.start()
    try:
        record = node.body_when(node.id, "datastore", "ds", lambda one: "problem" in one.body)
        assert record.body["problem"] == "the scan did not end"
    finally:
        scanner.stop()


def test_a_scanner_stops_at_once_while_an_inspection_takes_its_time(
    node: Node, datastore: Path, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "pipe")
    slow = ["sh", "-c", f"echo here > {tmp_path / 'pipe'}; exec sleep 1000"]
    scanner = Scanner(node.service, {"ds": str(datastore)}, command=slow)
    scanner.start()
    assert (tmp_path / "pipe").read_text() == "here\n"
    scanner.stop()
    store = node.service.view().get(node.id, "datastore", "ds")
    assert store
    assert "problem" not in store.body


VMX = b"""
.encoding = "UTF-8"
config.version = "8"
virtualHW.version = "19"
displayName = "web <b>1</b>"
guestOS = "debian12-64"
firmware = "efi"
memsize = "2048"
numvcpus = "4"
scsi0.present = "TRUE"
scsi0:0.present = "TRUE"
scsi0:0.fileName = "a.raw.vmdk"
scsi0:1.present = "TRUE"
scsi0:1.fileName = "../../../etc/passwd.vmdk"
ethernet0.present = "TRUE"
ethernet0.addressType = "static"
ethernet0.address = "00:50:56:00:00:01"
ethernet0.networkName = "shop"
"""

DOMAIN = b"""<domain type='kvm'><name>db</name><memory unit='GiB'>4</memory><vcpu>2</vcpu>
<os><type arch='x86_64'>hvm</type></os><devices>
<disk type='file' device='disk'><source file='a.raw'/><target dev='vda' bus='virtio'/></disk>
<disk type='file' device='cdrom'><source file='cd.iso'/><target dev='sda' bus='sata'/></disk></devices></domain>"""


def vms(node: Node) -> dict[str, dict[str, Any]]:
    """Returns the bodies of the machines by file, each as its model accepts it."""
    records = node.service.view().find("vm", node.id)
    return {one.body["file"]: kinds.VmBody.model_validate(one.body).plain() for one in records}


def test_virtual_machines_are_found_with_a_summary(node: Node, datastore: Path) -> None:
    make_disk(datastore / "a.raw", MIB)
    (datastore / "web.vmx").write_bytes(VMX)
    (datastore / "db.xml").write_bytes(DOMAIN)
    (datastore / "other.xml").write_bytes(b"<html/>")
    scan(node, ds=datastore)
    found = vms(node)
    assert found.keys() == {"web.vmx", "db.xml"}
    web, db = found["web.vmx"], found["db.xml"]
    assert (web["name"], web["format"], web["os"]) == ("web <b>1</b>", "vmx", "debian12")
    assert (web["firmware"], web["memory"], web["processors"]) == ("uefi", 2 << 30, 4)
    assert web["nics"] == [{"mac": "00:50:56:00:00:01", "network": "shop"}]
    assert [disk["name"] for disk in web["disks"]] == ["a.raw.vmdk", "../../../etc/passwd.vmdk"]
    assert not any("disk" in disk for disk in web["disks"])
    assert (db["name"], db["format"], db["memory"], db["processors"]) == ("db", "libvirt", 4 << 30, 2)
    assert db["disks"] == [{"name": "a.raw", "disk": disk_id("ds", "a.raw")}]


def test_disks_in_a_package_are_listed_without_ids(node: Node, datastore: Path) -> None:
    source = domains.shop(datastore)
    vmconv.machine_convert(source, datastore / "shop.ova")
    scan(node, ds=datastore)
    body = vms(node)["shop.ova"]
    assert (body["format"], body["packaged"]) == ("ova", True)
    assert [(disk["name"], disk["capacity"], "disk" in disk) for disk in body["disks"]] == [
        ("shop-disk1.vmdk", 4 * MIB, False)
    ]


BOMB = b'<!DOCTYPE d [<!ENTITY a "xxxxxxxxxx"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">]><domain><name>&b;</name></domain>'


def test_a_broken_configuration_is_listed_with_its_problem(node: Node, datastore: Path, tmp_path: Path) -> None:
    (datastore / "good.vmx").write_bytes(VMX)
    (datastore / "garbage.vmx").write_bytes(os.urandom(512))
    (datastore / "many.vmx").write_bytes(VMX + b"#" * (64 << 20))
    (datastore / "unfinished.xml").write_bytes(b"<domain type='kvm'><name>")
    (datastore / "text.ovf").write_bytes(b"")
    (tmp_path / "secret.vmx").write_bytes(VMX)
    (datastore / "link.vmx").symlink_to(tmp_path / "secret.vmx")
    scan(node, ds=datastore)
    found = vms(node)
    assert found.keys() == {"good.vmx", "garbage.vmx", "many.vmx", "unfinished.xml", "text.ovf"}
    assert "problem" not in found["good.vmx"]
    for name in found.keys() - {"good.vmx"}:
        assert found[name]["name"] == name.partition(".")[0]
        assert "\n" not in found[name]["problem"]
    assert "is not a configuration of a known machine format" in found["garbage.vmx"]["problem"]


@pytest.mark.parametrize("content", [BOMB, b'<!DOCTYPE d SYSTEM "file:///etc/passwd"><domain/>'], ids=["bomb", "file"])
def test_entities_are_not_expanded(node: Node, datastore: Path, content: bytes) -> None:
    (datastore / "vm.xml").write_bytes(content)
    scan(node, ds=datastore)
    # A DOCTYPE comes before the first element, so no machine format claims the file.
    assert vms(node) == {}


def test_a_summary_has_a_size(node: Node, datastore: Path) -> None:
    disk = "<disk type='file' device='disk'><source file='{0}'/><target dev='sd{1}' bus='scsi'/></disk>"
    names = ("".join(letters) for letters in itertools.product("abcdefghijklm", repeat=2))
    disks = "".join(disk.format("\N{PILE OF POO}" * 300, name) for name in itertools.islice(names, 150))
    nics = "<interface type='network'><source network='{}'/></interface>".format("\N{PILE OF POO}" * 300) * 100
    head = f"<name>{'n' * 1000}</name><memory>4096</memory><os><type arch='x86_64'>hvm</type></os>"
    content = f"<domain type='kvm'>{head}<devices>{disks}{nics}</devices></domain>"
    (datastore / "vm.xml").write_text(content, encoding="utf-8")
    scan(node, ds=datastore)
    body = vms(node)["vm.xml"]
    assert body.get("problem") is None
    assert (len(body["name"]), len(body["disks"]), len(body["nics"])) == (255, machines.MAX_DISKS, machines.MAX_NICS)


DIES = """
import os, sys
from vmconv.plugin import Opener
before = Opener.image
def image(self, path, *more):
    if path.endswith("hostile.raw"):
        os.kill(os.getpid(), 9)
    return before(self, path, *more)
Opener.image = image
from vmconv_fleet.catalogue.inspection import main
os._exit(main())
"""
"""An inspection that one file kills, as a fault in a library would."""


def test_a_file_that_kills_the_inspection_does_not_hide_the_others(node: Node, datastore: Path) -> None:
    for name in ("a.raw", "hostile.raw", "z.raw"):
        make_disk(datastore / name, MIB)
    scanner = Scanner(node.service, {"ds": str(datastore)}, command=[sys.executable, "-c", DIES])
    scanner.start()
    try:
        node.body_when(node.id, "datastore", "ds", lambda one: one.body.get("scanned_ms", 0) > 0)
    finally:
        scanner.stop()
    found = {name: one.body.get("problem") for name, one in disks(node).items()}
    assert found == {
        "a.raw": None,
        "hostile.raw": "cannot be read: its inspection crashed, or did not end",
        "z.raw": None,
    }


def test_slow_images_use_up_their_own_time_only(datastore: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(40):
        make_disk(datastore / f"{number:02}-slow.raw", MIB)
        make_disk(datastore / f"{number:02}.raw", MIB)
    now, limit = 0.0, 0.0

    def set_timer(_which: int, seconds: float) -> None:
        nonlocal limit
        limit = seconds or limit

    def slow(_self: object, found: Any, _parts: object) -> dict[str, str]:
        nonlocal now
        takes = 1000.0 if "slow" in found.name else 0.1
        now += min(takes, limit)
        if takes > limit:
            raise inspection._TooLong
        return {"format": "raw"}

    monkeypatch.setattr("signal.setitimer", set_timer)
    monkeypatch.setattr("time.monotonic", lambda: now)
    monkeypatch.setattr(inspection._Inspection, "_image", slow)
    found = inspection._Inspection({"ds": str(datastore)}, {}).records("ds")
    problems = {body["name"]: body.get("problem") for kind, _, body in found if kind == "disk"}
    assert {name for name, problem in problems.items() if problem is None} == {f"{n:02}.raw" for n in range(40)}
    assert problems["00-slow.raw"] == "reading it took longer than 20 s"
    assert "other slow images have used up the time" in str(problems["39-slow.raw"])
    # All of them together: the time for slow ones, and the least for each.
    assert now < inspection.SECONDS_FOR_ALL + 80 * inspection.SECONDS_AT_LEAST


@pytest.mark.parametrize("jump", [-1, 1], ids=["back", "ahead"])
def test_scans_run_after_a_clock_has_jumped(
    node: Node, datastore: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jump: int
) -> None:
    """The time of a scan says nothing about the requests that follow: the clock may have been wrong then."""
    year_ms = 365 * 86_400_000
    offset = tmp_path / "offset"
    offset.write_text(str(jump * year_ms))
    monkeypatch.setenv(OFFSET_FILE, str(offset))
    scanner = Scanner(node.service, {"ds": str(datastore)})
    scanner.start()
    try:
        now = wall_ms()
        first = node.body_when(node.id, "datastore", "ds", lambda one: one.body.get("scanned_ms", 0) > 0)
        assert abs(first.body["scanned_ms"] - now) > year_ms // 2
        offset.write_text("0")
        for number in range(2):
            make_disk(datastore / f"{number}.raw", MIB)
            known = node.service.view().get(node.id, "datastore", "ds")
            assert known is not None
            node.write(Change("datastore", "ds", {**known.body, "scan_asked_ms": now + number}))
            node.until(lambda number=number: len(disks(node)) > number)  # type: ignore[misc]
            answered = lambda record, at=now + number: record.body.get("scan_answered_ms") == at  # noqa: E731
            node.body_when(node.id, "datastore", "ds", answered)
    finally:
        scanner.stop()


def test_an_old_scan_does_not_end_what_was_asked_for_since() -> None:
    before = {"path": "/a", "scan_asked_ms": 7, "take": True}
    assert scanning._datastore(before, {"scan_answered_ms": 6})["take"]
    assert "take" not in scanning._datastore(before, {"scan_answered_ms": 7})
