"""The records in `ova.xml`: values of XML-RPC, as xapi exports its database."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from vmconv.machine import number, parse_xml, quoted, refused
from vmconv.plugin import MAX_SIZE

if TYPE_CHECKING:
    from collections.abc import Iterator
    from xml.etree.ElementTree import Element

    from vmconv.plugin import File, ImageError

NULL = ("OpaqueRef:NULL", "")


class Record(NamedTuple):
    """A record of xapi's database: its class, its reference, and its fields."""

    kind: str
    reference: str
    fields: dict[str, Any]


class Records(NamedTuple):
    """All records of an export, by their references."""

    file: File
    found: dict[str, Record]

    @classmethod
    def of(cls, file: File, data: bytes) -> Records:
        """Returns the records of an `ova.xml`; raises `ImageError` with the element that is damaged."""
        whole = _value(file, parse_xml(file, data))
        objects = whole.get("objects") if isinstance(whole, dict) else None
        if not isinstance(objects, list):
            raise refused(file, "ova.xml objects", "is no list of records")
        found: dict[str, Record] = {}
        for place, each in enumerate(objects):
            record = _record(file, place, each)
            if record.reference in found:
                raise refused(file, f"ova.xml objects[{place}]", f"{quoted(record.reference)} is there twice")
            found[record.reference] = record
        return cls(file, found)

    def of_kind(self, kind: str) -> list[Record]:
        return [record for record in self.found.values() if record.kind == kind]

    def related(self, record: Record, field: str, kind: str) -> Record | None:
        """Returns the record that a field refers to; None for none, raises `ImageError` for one that is not there."""
        reference = text(self.file, record, field)
        if reference in NULL:
            return None
        found = self.found.get(reference)
        if found is None or found.kind != kind:
            raise self.refused(record, field, f"{quoted(reference)} is no {kind} of the export")
        return found

    def refused(self, record: Record, field: str, problem: str) -> ImageError:
        return refused(self.file, f"ova.xml {record.kind} {record.reference[:40]} {field}", problem)


def text(file: File, record: Record, field: str) -> str:
    """Returns a field as text, empty if it is missing; raises `ImageError` if it is a list or a struct."""
    value = record.fields.get(field, "")
    if not isinstance(value, str):
        raise refused(file, f"ova.xml {record.kind} {record.reference[:40]} {field}", "is no text")
    return value


def texts(record: Record, field: str) -> dict[str, str]:
    """Returns the texts in a field that is a struct."""
    value = record.fields.get(field)
    return {key: each for key, each in value.items() if isinstance(each, str)} if isinstance(value, dict) else {}


def sizes(file: File, config: bytes) -> dict[str, int]:
    """Returns the bytes of each disk of a machine by the reference of its VDI; not of others, such as its memory."""
    records = Records.of(file, config)
    disks = (records.related(vbd, "VDI", "VDI") for vbd in records.of_kind("VBD"))
    return {vdi.reference: size_of(records, vdi) for vdi in disks if vdi}


def size_of(records: Records, vdi: Record) -> int:
    """Returns the bytes of a disk; raises `ImageError` if they are no number."""
    where = f"ova.xml VDI {vdi.reference[:40]} virtual_size"
    return number(records.file, where, text(records.file, vdi, "virtual_size"), 1, MAX_SIZE >> 1)


def _record(file: File, place: int, value: Any) -> Record:
    where = f"ova.xml objects[{place}]"
    if not isinstance(value, dict):
        raise refused(file, where, "is no record")
    kind, reference, fields = value.get("class"), value.get("id"), value.get("snapshot")
    if not (isinstance(kind, str) and isinstance(reference, str) and isinstance(fields, dict)):
        raise refused(file, where, "has no class, no id or no fields (snapshot)")
    return Record(kind, reference, fields)


def _value(file: File, element: Element) -> Any:
    """Returns the value of a `value` element: text, a list, or a dict."""
    if element.tag != "value":
        raise refused(file, "ova.xml", f"element {quoted(element.tag)} is no value")
    inner = next(iter(element), None)
    if inner is None:
        return element.text or ""
    if inner.tag == "struct":
        return dict(_members(file, inner))
    if inner.tag == "array":
        return [_value(file, each) for each in inner.iterfind("data/value")]
    return inner.text or ""


def _members(file: File, struct: Element) -> Iterator[tuple[str, Any]]:
    seen = set()
    for member in struct:
        name, value = member.findtext("name"), member.find("value")
        if member.tag != "member" or name is None or value is None:
            raise refused(file, "ova.xml", "a struct has a member without name or value")
        if name in seen:
            raise refused(file, "ova.xml", f"a struct has two members {quoted(name)}")
        seen.add(name)
        yield name, _value(file, value)
