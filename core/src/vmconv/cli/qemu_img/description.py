"""`info` as qemu-img's: its keys, in its order, for people and as JSON."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vmconv.cli.qemu_img.arguments import QEMU_NAMES, Given
from vmconv.cli.qemu_img.handing import NotAnsweredError
from vmconv.cli.qemu_img.images import ANYWHERE, format_of

if TYPE_CHECKING:
    from vmconv.model.image import Image

# QEMU's dictionaries are hash tables, so the order of keys is fixed, and by no rule.
_ORDER = (
    "snapshots",
    "backing-filename-format",
    "virtual-size",
    "filename",
    "cluster-size",
    "format",
    "actual-size",
    "format-specific",
    "full-backing-filename",
    "backing-filename",
    "dirty-flag",
)
_SNAPSHOT = ("icount", "vm-clock-nsec", "name", "date-sec", "date-nsec", "vm-clock-sec", "id", "vm-state-size")
_BITMAP = ("flags", "name", "granularity")
_DATA: dict[str, tuple[str, ...]] = {
    "qcow2": ("compat", "compression-type", "lazy-refcounts", "bitmaps", "refcount-bits", "corrupt", "extended-l2"),
    "vmdk": ("cid", "parent-cid", "create-type", "extents"),
}
_EXTENT = ("compressed", "virtual-size", "filename", "cluster-size", "format")

_NO_CLUSTERS = ("raw", "parallels")
_NO_FLAGS = ("parallels",)


def info(asked: Given) -> int:
    """Describes an image, or each layer of a chain. Raises `NotAnsweredError` for what vmconv states in another way."""
    from vmconv.inspect.description import describe
    from vmconv.inspect.images import opened
    from vmconv.interface.arguments import Reading, checked

    path, json = asked.one_file(), asked.is_json()
    reading = checked(
        Reading,
        path=path,
        format_name=format_of(path, asked.format("-f")),
        allow_external=ANYWHERE,
        force_share=asked.has("-U"),
    )
    with opened(reading) as (image, opener):
        layers = image.chain() if asked.has("--backing-chain") else (image,)
        found = [
            _as_qemu(describe(layer, opener), name)
            for layer, name in zip(layers, shown_names(image, path), strict=False)
        ]
    if json:
        from vmconv.cli.output import print_json

        print_json(found if asked.has("--backing-chain") else found[0], indent=4)
        return 0
    print("\n\n".join("\n".join(_lines(facts)) for facts in found))
    return 0


def shown_names(image: Image, path: str) -> Iterator[str]:
    """Yields the names of a chain's layers as QEMU prints them: relative ones from the directory of the name above."""
    for layer in image.chain():
        yield path
        path = os.path.join(os.path.dirname(path), layer.parent_reference or "")


def _as_qemu(facts: Mapping[str, Any], shown: str) -> dict[str, Any]:
    """Returns the description with QEMU's keys only, in its order; `shown` is the file's name."""
    name = QEMU_NAMES.get(facts["format"])
    if name is None or facts["dirty-flag"] or facts["warnings"]:
        raise NotAnsweredError(f"{facts['filename']}: {facts['format']}{', '.join(('', *facts['warnings']))}")
    found = {key: facts[key] for key in _ORDER if facts.get(key) not in (None, [], {})}
    found |= {"dirty-flag": False, "format": name, "filename": shown}
    if "backing-filename" in found:
        found["full-backing-filename"] = os.path.join(os.path.dirname(shown), found["backing-filename"])
    for key in (*(["cluster-size"] if name in _NO_CLUSTERS else []), *(["dirty-flag"] if name in _NO_FLAGS else [])):
        found.pop(key, None)
    if "snapshots" in found:
        found["snapshots"] = [_ordered(_named(one), _SNAPSHOT) for one in found["snapshots"]]
    found.pop("format-specific", None)
    if name in _DATA:
        found["format-specific"] = {"type": name, "data": _specific(name, facts["format-specific"]["data"])}
    if name == "qed" and found.get("backing-filename-format") not in (None, "raw"):
        del found["backing-filename-format"]
    return _ordered(found, _ORDER)


def _specific(name: str, data: Mapping[str, Any]) -> dict[str, Any]:
    if "data-file" in data:
        raise NotAnsweredError("a data file's size is counted in another way")
    if name == "vmdk":
        return _ordered({**data, "extents": [_extent(one, data) for one in data["extents"]]}, _DATA[name])
    data = {key: value for key, value in data.items() if value not in ([], None)}
    if "bitmaps" in data:
        data = {**data, "bitmaps": [_bitmap(one) for one in data["bitmaps"]]}
    return _ordered(data, _DATA[name])


def _bitmap(one: Mapping[str, Any]) -> dict[str, Any]:
    if not one["flags"]:
        raise NotAnsweredError("a bitmap without flags")
    return _ordered(one, _BITMAP)


def _extent(one: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
    if "cluster-size" not in one or data["create-type"] != "monolithicSparse":
        raise NotAnsweredError("VMDK of several files, or compressed")
    return {key: one[key] for key in ("virtual-size", "filename", "cluster-size")} | {"format": ""}


def _ordered(facts: Mapping[str, Any], order: Sequence[str]) -> dict[str, Any]:
    return {key: facts[key] for key in order if key in facts}


def _lines(facts: Mapping[str, Any]) -> Iterator[str]:
    from vmconv.cli.output import size_text

    yield f"image: {facts['filename']}"
    yield f"file format: {facts['format']}"
    yield f"virtual size: {size_text(facts['virtual-size'])} ({facts['virtual-size']} bytes)"
    yield f"disk size: {size_text(facts['actual-size'])}"
    if facts.get("cluster-size"):
        yield f"cluster_size: {facts['cluster-size']}"
    backing, full = facts.get("backing-filename"), facts.get("full-backing-filename")
    if backing is not None:
        yield f"backing file: {backing}{f' (actual path: {full})' if full != backing else ''}"
    if facts.get("backing-filename-format"):
        yield f"backing file format: {facts['backing-filename-format']}"
    if facts.get("snapshots"):
        yield "Snapshot list:"
        yield from snapshot_lines(facts["snapshots"])
    if "format-specific" in facts:
        yield "Format specific information:"
        yield from _specific_lines(facts["format-specific"]["data"], 1)


def _specific_lines(facts: Mapping[str, Any] | Sequence[Any], depth: int) -> Iterator[str]:
    indent = "    " * depth
    named = isinstance(facts, Mapping)
    pairs = facts.items() if isinstance(facts, Mapping) else ((f"[{n}]", fact) for n, fact in enumerate(facts))
    for key, value in pairs:
        title = key.replace("-", " ") if named else key
        if isinstance(value, (Mapping, list)):
            yield f"{indent}{title}:"
            yield from _specific_lines(value, depth + 1)
        else:
            yield f"{indent}{title}: {str(value).lower() if isinstance(value, bool) else value}"


def _named(snapshot: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the snapshot. Raises `NotAnsweredError` if it has a zero byte in its names, where QEMU ends them."""
    for key in ("id", "name"):
        if "\0" in snapshot[key]:
            raise NotAnsweredError(f"a snapshot whose {key} has a zero byte")
    return snapshot


def snapshot_lines(snapshots: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yields qemu-img's list of snapshots."""
    import time

    from vmconv.cli.output import size_text

    yield _ROW.format("ID", "TAG", "VM SIZE", "DATE", "VM CLOCK", "ICOUNT")
    for one in map(_named, snapshots):
        seconds, milliseconds = one["vm-clock-sec"], one["vm-clock-nsec"] // 10**6
        clock = f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}.{milliseconds:03}"
        date = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(one["date-sec"]))
        yield _ROW.format(one["id"], one["name"], size_text(one["vm-state-size"]), date, clock, one.get("icount", ""))


_ROW = "{:<9} {:<16} {:>8} {:>19} {:>12} {:>10}"
