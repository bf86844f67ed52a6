"""The neutral model of a machine: paths, restriction, and the conformance kit on a toy format."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from pydantic import ValidationError

from machine.toy import Toy
from vmconv.errors import ImageError
from vmconv.machine import Cpu, Disk, Display, Machine, Nic, Removable, carried, parse_xml, plain, restricted, stated
from vmconv.testing import MachineTests, image_file, machines


class TestToy(MachineTests):
    format = Toy()

    @pytest.fixture(autouse=True)
    def _importable(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))


WEB = Machine(
    name="web",
    cpu=Cpu(count=2),
    disks=(Disk(file="a.vmdk", bus="scsi", controller=0, unit=0),),
    nics=(Nic(model="e1000"), Nic(mac="00:50:56:01:02:03")),
    extra={"vmx": {"answer.msg": "no"}},
)


def test_stated_fields_have_paths_with_indexes() -> None:
    assert dict(stated(WEB)) == {
        "name": "web",
        "cpu.count": 2,
        "disks[0].file": "a.vmdk",
        "disks[0].bus": "scsi",
        "disks[0].controller": 0,
        "disks[0].unit": 0,
        "nics[0].model": "e1000",
        "nics[1].mac": "00:50:56:01:02:03",
        "extra.vmx": {"answer.msg": "no"},
    }
    assert dict(stated(Machine())) == {}


def test_a_path_is_carried_by_itself_or_a_part_above() -> None:
    assert plain("nics[1].mac") == "nics.mac"
    assert carried("nics[1].mac", {"nics.mac"})
    assert carried("nics[1].mac", {"nics"})
    assert not carried("nics[1].mac", {"nics.model"})
    assert not carried("nics[1].mac", {"nic"})


def test_restriction_keeps_carried_fields_only() -> None:
    found = restricted(WEB, {"name", "disks.file", "nics.mac"})
    assert found == Machine(name="web", disks=(Disk(file="a.vmdk"),), nics=(Nic(), Nic(mac="00:50:56:01:02:03")))
    removable = Machine(removables=(Removable(kind="cdrom", file="a.iso"),))
    assert restricted(removable, {"removables.file"}) == removable
    assert restricted(removable, {"removables.bus"}) == Machine(removables=(Removable(kind="cdrom"),))
    assert restricted(removable, {"disks"}) == Machine()


def test_a_device_without_details_is_a_device() -> None:
    bare = Machine(nics=(Nic(),), display=Display())
    assert dict(stated(bare)) == {"nics[0]": "present", "display": "present"}
    assert carried("nics[0]", {"nics.mac"})
    assert not carried("nics[0]", {"nicsx.mac"})
    assert restricted(bare, {"nics.mac", "display"}) == bare


@given(machine=machines())
def test_a_restriction_to_everything_changes_nothing(machine: Machine) -> None:
    assert restricted(machine, set(Machine.model_fields)) == machine


@pytest.mark.parametrize("name", ["a\0b", "a\x1bb", "a\nb", "a\ud800", "\ufffe"], ids=ascii)
def test_names_that_configurations_cannot_hold_are_refused(name: str) -> None:
    with pytest.raises(ValidationError):
        Machine(name=name)


DOCTYPE = b'<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;">]><x>&b;</x>'


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (DOCTYPE, "line 1: has a DOCTYPE"),
        (b"<x>" * 200, "line 1: elements nested deeper than 100"),
        (b"<x>" + b"<y/>" * 100_001 + b"</x>", "more than 100000 elements"),
        (b"<x>\n<y></x>", "line 2: is not well-formed XML: mismatched tag"),
        (b"<x>&nbsp;</x>", "undefined entity"),
        (b" " * (8 << 20) + b"<x/>", "a configuration has at most"),
        (b"", "no element found"),
        (b"<?xml version='1.0' encoding='UTF-6'?><x/>", "line 1: its encoding cannot be read: unknown encoding"),
        (b"<?xml version='1.0' encoding='shift_jis'?><x/>", "multi-byte encodings are not supported"),
    ],
    ids=["doctype", "depth", "count", "mismatch", "entity", "size", "empty", "unknown encoding", "multi-byte"],
)
def test_dangerous_xml_is_refused_with_its_line(content: bytes, problem: str) -> None:
    with pytest.raises(ImageError, match=problem):
        parse_xml(image_file(content, "a.xml"))


def test_xml_has_names_with_their_namespace() -> None:
    root = parse_xml(image_file(b'<a xmlns="urn:x" b="1" xmlns:q="urn:q" q:c="2"><d/></a>', "a.xml"))
    assert root.tag == "{urn:x}a"
    assert root.attrib == {"b": "1", "{urn:q}c": "2"}
    assert [child.tag for child in root] == ["{urn:x}d"]
