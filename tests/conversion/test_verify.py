"""Verifying by metadata, in memory: what a result must state, and which disk it must be."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from support.sources import A, B
from vmconv.conversion import qemu, readback, verify
from vmconv.conversion.containers import Container
from vmconv.conversion.request import Request
from vmconv.conversion.results import Results
from vmconv.errors import AccessError, ImageError, UsageError, VerifyError
from vmconv.model.extents import Extents, Kind
from vmconv.model.image import Image
from vmconv.model.layout import Backing, Layout, OutFile, Reference
from vmconv.model.sources import File
from vmconv.testing.memory import MemoryFile

ANY: Any = SimpleNamespace()


class Reader:
    """A format that knows what its files hold."""

    name = "letters"

    def __init__(self) -> None:
        self.images: dict[str, Image] = {}

    def read(self, file: File, opener: Any) -> Image:
        if file.name not in self.images:
            raise ImageError(f"{file.name}: is no image")
        return self.images[file.name]


def image_of(
    table: Extents, file: File, parent: Image | None = None, reference: str | None = None, kind: str | None = None
) -> Image:
    load = (lambda: parent) if parent else None
    return Image(
        "letters", file, table.size, lambda: table, load_parent=load, parent_reference=reference, parent_format=kind
    )


def container_of(
    disk: Image,
    *tables: Extents,
    reader: Reader | None = None,
    name: str = "new",
    backing: Backing | None = None,
    references: tuple[Reference, ...] = (),
) -> Container:
    """Returns a container of files "name.0", "name.1", ... and the image itself."""
    outs = tuple(OutFile(table, f"{name}.{n}" if table is not tables[-1] else None) for n, table in enumerate(tables))
    format_: Any = reader or Reader()
    return Container(disk, disk, format_, name, backing, Layout(outs, (), references))


def memory(name: str, size: int) -> MemoryFile:
    """Returns a file that is data all over."""
    file = MemoryFile(name, size)
    file.on_storage = Extents.whole(file)
    return file


# -- what the reader of a result is given


def test_a_companion_of_a_file_of_the_result_has_its_final_name_with_another_suffix() -> None:
    state, payload, other = memory("1.tmp", 4), memory("2.tmp", 4), memory("3.tmp", 4)
    reader: Any = Reader()
    results = Results(ANY)
    for name, file in (("other.mem", other), ("web.1.mem", payload), ("web.1.state", state)):
        results.add(name, file, reader)
    assert results.companion(state, (".none", ".mem"), "memory") == ("web.1.mem", payload)
    assert results.companion(payload, (".state",), "state") == ("web.1.state", state)
    assert results.companion(state, (".none",), "memory") is None
    assert results.companion(memory("other.state", 4), (".mem",), "memory") == ("other.mem", other)


def test_a_reader_gets_the_files_of_the_result_by_any_path() -> None:
    kept, one, two = memory("kept", 4), memory("one.tmp", 4), memory("two.tmp", 4)
    reader: Any = Reader()
    reader.images["one.tmp"] = image_of(Extents.whole(one), one)
    results = Results(ANY, [Reference("/source/kept", kept, 4)])
    results.add("one", one, reader)
    results.add("two", two, reader)
    assert results.related(two, "/source/kept", "extent") is kept
    assert results.related(two, "one", "extent") is one
    assert results.related(two, "/elsewhere/one", "extent") is one
    assert results.parent(two, "below/one", None) is reader.images["one.tmp"]
    assert list(results.search(two, "vmdk")) == [("one", one)]
    assert list(results.search(kept, "vmdk")) == [("one", one), ("two", two)]
    with pytest.raises(AccessError, match=r"two.tmp: extent 'kept' is not a file of the result") as caught:
        results.related(two, "kept", "extent")
    # Some readers look for several names.
    assert isinstance(caught.value.__cause__, FileNotFoundError)
    with pytest.raises(AccessError, match="backing file 'three'"):
        results.parent(two, "three", None)


# -- what a result states


@pytest.mark.parametrize(
    ("backing", "reference", "kind", "said"),
    [
        (None, None, None, ""),
        (None, None, "raw", ""),
        (None, "base", None, "new: states the parent 'base', and has none"),
        (None, "", None, "new: states the parent '', and has none"),
        (Backing("base", "qcow2"), "base", "qcow2", ""),
        (Backing("base", "qcow2"), "base", None, ""),
        (Backing("base", "vhd"), "base", "vpc", ""),
        (Backing("base", "vpc"), "base", "vhd", ""),
        (Backing("base", "qcow2"), "base", "raw", "new: states the format 'raw' of its parent, which is 'qcow2'"),
        (Backing("base", "qcow2"), "base", "", "new: states the format '' of its parent"),
    ],
    ids=str,
)
def test_a_result_states_the_parent_that_it_was_to_have(
    backing: Backing | None, reference: str | None, kind: str | None, said: str
) -> None:
    table = Extents.filled(8)
    container = container_of(image_of(table, memory("source", 8)), table, backing=backing)
    found = image_of(table, memory("new", 8), reference=reference, kind=kind)
    if said:
        with pytest.raises(VerifyError, match=said):
            verify._check_parent(container, found)
    else:
        verify._check_parent(container, found)


@pytest.mark.parametrize(
    ("reference", "below", "right"),
    [("base", True, True), (None, True, True), ("other", True, False), ("gone", True, False), ("base", False, False)],
)
def test_a_result_names_the_parent_among_the_files_of_the_source(
    reference: str | None, below: bool, right: bool
) -> None:
    table, base, other = Extents.filled(8), memory("base", 8), memory("other", 8)
    disk = image_of(table, memory("source", 8), image_of(table, base) if below else None)
    references = (Reference("base", base, 8), Reference("other", other, 8))
    found = image_of(table, memory("new", 8), reference=reference)
    if right:
        verify._check_reference(container_of(disk, table, references=references), found)
    else:
        with pytest.raises(VerifyError, match=f"new: its parent is {reference}, the source was meant"):
            verify._check_reference(container_of(disk, table, references=references), found)
    # Without files of the source in it, the result has no other names for its parent.
    verify._check_reference(container_of(disk, table), found)


# -- which disk it is


def test_a_result_is_the_disk_of_the_source() -> None:
    rows = [(0, Kind.DATA, A, 5), (10, Kind.ZERO, None, 0)]
    disk = image_of(Extents.of(rows, 20), memory("source", 8))
    container = container_of(disk, disk.guest)
    verify._check_table(container, disk.guest)
    # A format may round the size up, with zeros.
    verify._check_table(container, Extents.of(rows, 21))
    verify._check_table(container, Extents.of([*rows[:1], (10, Kind.HOLE, None, 0)], 24))
    with pytest.raises(VerifyError, match="new: the result has 19 bytes for the guest, the source 20"):
        verify._check_table(container, Extents.of(rows, 19))
    with pytest.raises(VerifyError, match="new: the result differs from the source at guest address 0x14"):
        verify._check_table(container, Extents.of([*rows, (20, Kind.DATA, A, 1)], 21))
    with pytest.raises(VerifyError, match="at guest address 0x3"):
        verify._check_table(container, Extents.of([(0, Kind.DATA, A, 5), (3, Kind.DATA, B, 0), *rows[1:]], 20))
    # What was written is what is compared, whatever the filesystem made of it.
    blank = memory("blank", 20)
    written = image_of(Extents.whole(blank), memory("source", 8))
    verify._check_table(container_of(written, written.guest), Extents.filled(20))


def test_a_result_shows_its_parent_where_it_says_nothing() -> None:
    base = image_of(Extents.of([(0, Kind.DATA, B, 0)], 20), memory("base", 8))
    disk = image_of(Extents.of([(0, Kind.DATA, A, 5), (10, Kind.HOLE, None, 0)], 20), memory("source", 8), base)
    flat = Extents.of([(0, Kind.DATA, A, 5), (10, Kind.DATA, B, 10)], 20)
    kept = container_of(disk, disk.guest, backing=Backing("base", "letters"))
    for container, right, wrong in (
        (kept, disk.guest, Extents.of([(0, Kind.DATA, A, 5), (10, Kind.ZERO, None, 0)], 20)),
        (container_of(disk, flat), flat, disk.guest),
    ):
        verify._check_table(container, right)
        with pytest.raises(VerifyError, match="at guest address 0xa"):
            verify._check_table(container, wrong)


# -- reading back


def two_layers() -> tuple[list[Container], list[MemoryFile], Reader]:
    """Returns two containers, of two files and of one, that are made; the second is on top of the first."""
    reader = Reader()
    source = memory("source", 64)
    files = [memory(name, 48) for name in ("below.0", "below", "new")]
    base = image_of(Extents.of([(0, Kind.DATA, source, 8)], 32), source)
    top = image_of(Extents.of([(0, Kind.DATA, source, 40), (16, Kind.HOLE, None, 0)], 32), source, base)
    payload = Extents.of([(0, Kind.ZERO, None, 0), (16, Kind.DATA, source, 8)], 48)
    header = Extents.filled(48)
    below = container_of(base, payload, header, reader=reader, name="below")
    above = container_of(
        top,
        Extents.of([(0, Kind.DATA, source, 40), (16, Kind.ZERO, None, 0)], 48),
        reader=reader,
        backing=Backing("below", "letters"),
    )
    found = reader.images["below"] = image_of(Extents.of([(0, Kind.DATA, files[0], 16)], 32), files[1])
    reader.images["new"] = image_of(
        Extents.of([(0, Kind.DATA, files[2], 0), (16, Kind.HOLE, None, 0)], 32), files[2], found, "below", "letters"
    )
    return [below, above], files, reader


def test_the_result_is_read_back_with_its_lower_layers() -> None:
    containers, files, reader = two_layers()
    below, above = verify.read_back(containers, files, ANY)
    assert (below.container, above.container) == tuple(containers)
    assert (below.files, above.files) == ((files[0], files[1]), (files[2],))
    assert (below.image, above.image) == (reader.images["below"], reader.images["new"])
    assert below.below is None
    assert above.below is below
    assert above.sides.name == "new"
    assert list(above.sides.wanted) == [layer.guest for layer in containers[1].source.chain()]
    assert list(above.sides.found) == [above.image.guest, below.image.guest]
    assert list(below.sides.found) == [below.image.guest]
    outs = [out for container in containers for out in container.layout.files]
    assert dict(above.sides.layouts) == {id(file): out.table for file, out in zip(files, outs, strict=True)}
    verify.verify(containers, files, ANY)


def test_kept_layers_of_the_source_are_lower_layers_too() -> None:
    containers, files, reader = two_layers()
    parent = containers[1].disk.parent
    kept = containers[1]._replace(backing=Backing("/source/base", "letters"))
    reader.images["new"] = image_of(reader.images["new"].guest, files[2], parent, "/source/base", "letters")
    (made,) = verify.read_back([kept], files[2:], ANY)
    assert parent is not None
    assert list(made.sides.found) == [made.image.guest, parent.guest]
    assert made.below is None
    verify.verify([kept], files[2:], ANY)


def test_a_result_on_top_of_another_parent_is_wrong() -> None:
    containers, files, reader = two_layers()
    right = reader.images["new"]
    for parent in (None, image_of(Extents.filled(32), files[0])):
        reader.images["new"] = image_of(right.guest, files[2], parent, "below", "letters")
        with pytest.raises(VerifyError, match="new: its parent is not below"):
            verify.verify(containers, files, ANY)
    del reader.images["new"]
    with pytest.raises(VerifyError, match="the result cannot be read back: new: is no image"):
        verify.verify(containers, files, ANY)


def test_payload_that_stays_in_the_source_is_followed_to_storage(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hole of the source's file reads as zero in the source's table, and so it must in the result's."""
    source, new = memory("source", 32), memory("new", 16)
    source.on_storage = Extents.of([(0, Kind.DATA, source, 0), (16, Kind.ZERO, None, 0)], 32)
    reader = Reader()
    table = Extents.whole(source)
    disk = image_of(table, source)
    reader.images["new"] = image_of(table, new)
    references = (Reference("source", source, 32),)
    container = container_of(disk, Extents.filled(16), reader=reader, references=references)
    # Nothing has to be read to know that.
    monkeypatch.delattr(MemoryFile, "read")
    verify.verify([container], [new], ANY)


# -- modes


def test_each_mode_begins_with_the_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[tuple[str, Any]] = []
    for mode, (module, name) in {
        "bytes": (readback, "check_bytes"),
        "sample": (readback, "check_sample"),
        "qemu": (qemu, "compare"),
    }.items():
        monkeypatch.setattr(module, name, lambda *given, mode=mode: called.append((mode, given)))

    def progress(_done: int, _to_do: int) -> None:
        pass

    modes: tuple[Any, ...] = ("metadata", "sample", "bytes", "qemu")
    for mode in modes:
        containers, files, reader = two_layers()
        verify.verify(containers, files, ANY, mode, progress)
        if mode == "metadata":
            assert called == []
        elif mode == "qemu":
            (((_, (made,)),)) = called
            assert [one.container for one in made] == containers
        else:
            assert [(name, given[0].name, given[1]) for name, given in called] == [
                (mode, "below", progress),
                (mode, "new", progress),
            ]
        called.clear()
        reader.images["below"] = image_of(Extents.filled(32), files[1])
        containers[0].disk.guest.sources[0].write(8, b"x")  # type: ignore[attr-defined]
        with pytest.raises(VerifyError):
            verify.verify(containers, files, ANY, mode, progress)
        assert called == []


@pytest.mark.parametrize(
    ("asked", "mode"), [(True, "metadata"), (False, None), ("metadata", "metadata"), ("bytes", "bytes")]
)
def test_verifying_is_by_metadata_by_default(asked: Any, mode: str | None) -> None:
    assert verify.verify_mode(asked) == mode


@pytest.mark.parametrize("way", ["in place", "stream", "files"])
@pytest.mark.parametrize("mode", [None, "metadata", "sample", "bytes", "qemu"])
def test_a_mode_is_refused_where_it_has_nothing_to_compare(
    monkeypatch: pytest.MonkeyPatch, mode: Any, way: str
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(qemu, "refuse_impossible", lambda made, _registry: asked.extend(made))
    containers, _, _ = two_layers()
    words = {
        ("in place", "sample"): "exclude each other",
        ("in place", "bytes"): "exclude each other",
        ("in place", "qemu"): "exclude each other",
        ("stream", "qemu"): "QEMU cannot read a stream",
    }.get((way, mode))
    request = Request("source", "target", in_place=way == "in place", descriptor=1 if way == "stream" else None)
    if words:
        with pytest.raises(UsageError, match=words):
            verify.refuse_impossible(mode, containers[:1], ANY, request)
    else:
        verify.refuse_impossible(mode, containers[:1], ANY, request)
    assert [one.container for one in asked] == (containers[:1] if mode == "qemu" and not words else [])
    if asked:
        assert [file.name for file in asked[0].files] == ["below.0", "below"]
