"""What readers make of memory images by hand: sound ones of each layout, and hostile ones."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import pytest

import vmconv
from support import memory_images as images
from support.memory_images import PAGE, block, elf_core, groups, lime, regions, saved_state, tag
from vmconv.errors import AccessError, ImageError, VmconvError
from vmconv.io.opener import Opener
from vmconv.io.registry import installed
from vmconv.model.extents import Kind
from vmconv.model.image import Image
from vmconv.testing import random_bytes

A, B = random_bytes(2 * PAGE, 1), random_bytes(3 * PAGE, 2)
TWO = [(0, A), (0x100000, B)]


def opened(path: Path, use: Callable[[Image], object]) -> object:
    with Opener(installed()) as opener:
        return use(opener.image(str(path)))


def memory(path: Path) -> list[tuple[int, bytes]]:
    """Returns address and bytes of each range of RAM."""

    def look(image: Image) -> list[tuple[int, bytes]]:
        found: list[tuple[int, bytes]] = []
        for row in image.guest:
            if row.kind == Kind.HOLE:
                continue
            data = image.guest.read(row.start, row.length)
            if found and found[-1][0] + len(found[-1][1]) == row.start:
                found[-1] = found[-1][0], found[-1][1] + data
            else:
                found.append((row.start, data))
        return found

    return opened(path, look)  # type: ignore[return-value]


def put(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


# -- sound


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("order", ["<", ">"])
def test_cores_of_all_classes_are_read(tmp_path: Path, bits: int, order: str) -> None:
    path = put(tmp_path, "web.elf", elf_core(TWO, bits=bits, order=order))
    assert memory(path) == TWO
    data = vmconv.info(str(path))["format-specific"]["data"]
    assert data["class"] == f"{bits}-bit {'little' if order == '<' else 'big'}-endian"
    assert data["ranges"] == 2


def test_long_names_of_notes_are_shortened(tmp_path: Path) -> None:
    owners = [f"{number}-".encode() + b"x" * 100_000 for number in range(20)]
    notes = b"".join(
        struct.pack("<3I", len(name) + 1, 0, 1) + name.ljust(-(-(len(name) + 1) // 4) * 4, b"\0") for name in owners
    )
    path = put(tmp_path, "web.elf", elf_core(TWO, notes=notes))
    shown = vmconv.info(str(path))["format-specific"]["data"]["notes"]
    assert len(shown) < 400
    assert shown.endswith(", ...")
    vmconv.convert(str(path), str(tmp_path / "new.elf"))
    assert notes in (tmp_path / "new.elf").read_bytes()


def test_the_registers_of_other_classes_are_named_as_lost(tmp_path: Path) -> None:
    note = struct.pack(">3I", 5, 4, 1) + b"CORE\0\0\0\0abcd"
    path = put(tmp_path, "web.elf", elf_core(TWO, order=">", notes=note))
    assert vmconv.info(str(path))["losses"] == ["1 ELF note of a 64-bit big-endian core, such as registers"]
    assert vmconv.info(str(path))["format-specific"]["data"]["processors-with-registers"] == 1


def test_more_headers_than_their_field_can_count(tmp_path: Path) -> None:
    loads = [(number * 2 * PAGE, bytes([number & 255, number >> 8 & 255])) for number in range(70_000)]
    many = elf_core([]) + b"".join(
        struct.pack("<IIQQQQQQ", 1, 0, 64 + 56 * len(loads) + 64 + 2 * n, 0, at, 2, 2, 0)
        for n, (at, _) in enumerate(loads)
    )
    # The first section header has the number in sh_info.
    section = bytes(44) + struct.pack("<I", len(loads)) + bytes(16)
    data = bytearray(many + section + b"".join(payload for _, payload in loads))
    data[40:48] = (64 + 56 * len(loads)).to_bytes(8, "little")
    data[56:58] = b"\xff\xff"
    path = put(tmp_path, "web.elf", bytes(data))
    found = memory(path)
    assert len(found) == len(loads)
    assert found[-1] == loads[-1]


def test_a_core_that_lists_memory_twice_by_virtual_address_is_read(tmp_path: Path) -> None:
    data = bytearray(elf_core([*TWO, (0, A)]))
    # The third header repeats the first, at another virtual address.
    data[64 + 112 + 8 : 64 + 112 + 16] = data[64 + 8 : 64 + 16]
    data[64 + 112 + 16 : 64 + 112 + 24] = (0xFFFF8000 << 32).to_bytes(8, "little")
    assert memory(put(tmp_path, "web.elf", bytes(data))) == TWO


def test_a_range_without_bytes_is_no_ram_and_one_with_less_ends_with_zeros(tmp_path: Path) -> None:
    data = bytearray(elf_core([(0, A), (0x10000, b""), (0x100000, B)]))
    data[64 + 56 + 40 : 64 + 56 + 48] = (0x5000).to_bytes(8, "little")
    data[64 + 112 + 40 : 64 + 112 + 48] = (4 * PAGE).to_bytes(8, "little")
    path = put(tmp_path, "web.elf", bytes(data))
    assert memory(path) == [(0, A), (0x100000, B + bytes(PAGE))]
    said = vmconv.info(str(path))["warnings"]
    assert "1 range without bytes in the file" in said[0]
    assert "1 range with less bytes in the file than in memory" in said[1]


@pytest.mark.parametrize(("suffix", "shares"), [("lime", True), ("elf", True), ("ram", False)])
def test_ordinary_lime_is_read_and_shared_where_the_target_can_have_its_phase(
    xfs_dir: Path, suffix: str, shares: bool
) -> None:
    path = put(xfs_dir, "web.lime", lime(TWO))
    assert memory(path) == TWO
    target = xfs_dir / f"new.{suffix}"
    assert (vmconv.convert(str(path), str(target)).totals.shared > 0) is shares
    assert opened(target, lambda image: image.guest.read(0x100000, len(B))) == B


@pytest.mark.parametrize("more", [bytes(32), bytes(70_000), b"\1\2\3", b"\1" * 31], ids=len)
def test_bytes_behind_the_last_range_are_named(tmp_path: Path, more: bytes) -> None:
    path = put(tmp_path, "web.lime", lime(TWO) + more)
    assert memory(path) == TWO
    report = vmconv.check(str(path))
    assert report
    assert report.doubts == (f"web.lime: {len(more)} bytes at 0x5040 are behind the last range, and are not memory",)


@pytest.mark.parametrize("magic", [0xBED2BED0, 0xBAD1BAD1, 0xBED2BED2, 0xBED3BED3])
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("suffix", [".vmss", ".vmsn"])
def test_saved_states_of_all_versions_are_read(tmp_path: Path, magic: int, inside: bool, suffix: str) -> None:
    where = [(0, 0, 2), (0x100, 2, 3)]
    state, start = saved_state(where, A + B if inside else None, magic)
    path = put(tmp_path, f"web{suffix}", state)
    assert not inside or start % PAGE == 0
    if not inside:
        put(tmp_path, "web.vmem", A + B)
        assert memory(tmp_path / "web.vmem") == TWO
    assert memory(path) == TWO
    said = vmconv.info(str(path))
    assert said["losses"] == ["state of the machine in 1 group, such as cpu"]
    assert said["format-specific"]["data"]["memory-inside"] is inside


@pytest.mark.parametrize("name", ["web.vmss", "web.vmem"])
def test_memory_behind_the_last_region_is_named(tmp_path: Path, name: str) -> None:
    put(tmp_path, "web.vmem", A + B + bytes(PAGE + 7))
    put(tmp_path, "web.vmss", saved_state([(0, 0, 2), (0x100, 2, 3)])[0])
    said = f"not carried over: {PAGE + 7} bytes of web.vmem behind the last region"
    assert vmconv.info(str(tmp_path / name))["warnings"] == [said]
    report = vmconv.check(str(tmp_path / name))
    assert report
    assert report.doubts == (said,)
    assert said in vmconv.convert(str(tmp_path / name), str(tmp_path / "new.lime")).warnings
    put(tmp_path, "web.vmem", A + B)
    assert vmconv.info(str(tmp_path / name))["warnings"] == []
    report = vmconv.check(str(tmp_path / name))
    assert report
    assert report.doubts == ()


def test_a_saved_state_without_regions_is_flat(tmp_path: Path) -> None:
    put(tmp_path, "web.vmem", A)
    assert memory(put(tmp_path, "web.vmss", saved_state([])[0])) == [(0, A)]


def test_the_pair_is_found_in_capitals(tmp_path: Path) -> None:
    put(tmp_path, "WEB.VMEM", A)
    assert memory(put(tmp_path, "WEB.VMSS", saved_state([])[0])) == [(0, A)]


@pytest.mark.parametrize("other", ["web.vmsn", "web.VMSS"])
def test_a_memory_with_two_states_is_refused_unless_one_is_named(tmp_path: Path, other: str) -> None:
    path = put(tmp_path, "web.vmem", A + B)
    first = put(tmp_path, "web.vmss", saved_state([(0, 0, 2), (0x100, 2, 3)])[0])
    second = put(tmp_path, other, saved_state([(0, 3, 2), (0x100, 0, 3)])[0])
    for verb in (vmconv.info, lambda source: vmconv.convert(source, str(tmp_path / "new.lime"))):
        with pytest.raises(AccessError, match=rf"^web.vmem: both web.vmss and {other} may be its state") as caught:
            verb(str(path))
        assert "name the right one as the source" in (caught.value.hint or "")
    assert memory(first) == TWO
    assert memory(second) == [(0, (A + B)[3 * PAGE :]), (0x100000, (A + B)[: 3 * PAGE])]


def test_one_state_with_two_names_is_not_ambiguous(tmp_path: Path) -> None:
    path = put(tmp_path, "web.vmem", A)
    put(tmp_path, "web.vmss", saved_state([])[0])
    (tmp_path / "web.vmsn").symlink_to("web.vmss")
    assert memory(path) == [(0, A)]


def test_a_state_with_two_memories_is_refused(tmp_path: Path) -> None:
    path = put(tmp_path, "web.vmss", saved_state([])[0])
    put(tmp_path, "web.vmem", A)
    put(tmp_path, "web.VMEM", B)
    with pytest.raises(AccessError, match=r"^web.vmss: both web.vmem and web.VMEM may be its memory"):
        memory(path)


def test_a_memory_beside_a_state_with_its_own_is_refused(tmp_path: Path) -> None:
    path = put(tmp_path, "web.vmem", B)
    state = put(tmp_path, "web.vmss", saved_state([(0, 0, 2)], A)[0])
    with pytest.raises(ImageError, match=r"^web.vmem: is not the memory of web.vmss, which has its own inside"):
        memory(path)
    assert memory(state) == [(0, A)]


def test_a_vmem_alone_is_read_up_to_where_a_gap_must_be(tmp_path: Path) -> None:
    path = put(tmp_path, "web.vmem", A)
    assert memory(path) == [(0, A)]
    assert "offsets are taken for addresses" in vmconv.info(str(path))["warnings"][0]
    with path.open("r+b") as file:
        file.truncate((3 << 30) + PAGE)
    with pytest.raises(ImageError, match=r"neither a \.vmss nor a \.vmsn beside it, and 3221229568 bytes") as caught:
        memory(path)
    assert "beside it" in (caught.value.hint or "")


@pytest.mark.parametrize("size", [0, 1, PAGE + 1])
def test_a_vmem_alone_that_is_no_whole_pages_is_refused(tmp_path: Path, size: int) -> None:
    path = put(tmp_path, "web.vmem", bytes(size))
    with pytest.raises(ImageError, match=rf"^web\.vmem: .*its {size} bytes are not whole pages of 4096") as caught:
        vmconv.info(str(path))
    assert caught.value.hint == "if it is raw memory, use -f ram"


def test_a_saved_state_without_its_memory_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(AccessError, match=r"web\.vmss: its memory is not inside, and no \.vmem"):
        memory(put(tmp_path, "web.vmss", saved_state([])[0]))


def test_memory_inside_counts_more_than_a_file_beside(tmp_path: Path) -> None:
    put(tmp_path, "web.vmem", bytes(5 * PAGE))
    state, _ = saved_state([(0, 0, 2), (0x100, 2, 3)], A + B)
    assert memory(put(tmp_path, "web.vmss", state)) == TWO


def test_memory_elsewhere_needs_permission(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    put(other, "web.vmem", A)
    own = tmp_path / "own"
    own.mkdir()
    (own / "web.vmem").symlink_to(other / "web.vmem")
    with pytest.raises(AccessError, match="lies outside the image's directory"):
        memory(put(own, "web.vmss", saved_state([])[0]))


@pytest.mark.parametrize("name", ["new.vmss", "new.vmsn", "new.vmem", "new"])
def test_the_pair_is_named_after_the_target(xfs_dir: Path, name: str) -> None:
    source = put(xfs_dir, "web.elf", elf_core(TWO))
    made = xfs_dir / "made"
    made.mkdir()
    vmconv.convert(str(source), str(made / name), target_format="vmem")
    other = {"new.vmem": "new.vmss"}.get(name, "new.vmem")
    assert {path.name for path in made.iterdir()} == {name, other}
    if name != "new":
        assert memory(made / name) == TWO


@pytest.mark.parametrize(
    ("target", "other"),
    [("web.vmss", "web.vmsn"), ("web.vmsn", "web.vmss"), ("web.vmem", "web.VMSS"), ("web.vmss", "web.VMEM")],
)
@pytest.mark.parametrize("force", [False, True])
def test_a_file_that_would_become_a_part_of_a_new_pair_is_named(
    tmp_path: Path, target: str, other: str, force: bool
) -> None:
    source = put(tmp_path, "source.elf", elf_core(TWO))
    made = tmp_path / "made"
    made.mkdir()
    put(made, other, saved_state([])[0])
    for make in (vmconv.plan, vmconv.convert):
        with pytest.raises(VmconvError, match=rf"{other}: would be read as a part of .*{target}"):
            make(str(source), str(made / target), force=force)
    assert {path.name for path in made.iterdir()} == {other}
    vmconv.convert(str(source), str(made / f"new{target[3:]}"))
    assert memory(made / f"new{target[3:]}") == TWO
    # Its own files are replaced.
    (made / other).unlink()
    for _ in range(2):
        vmconv.convert(str(source), str(made / target), force=True)
    assert memory(made / target) == TWO


def test_a_new_core_begins_with_a_note_segment_as_crash_asks_for(tmp_path: Path) -> None:
    vmconv.convert(str(put(tmp_path, "web.lime", lime(TWO))), str(tmp_path / "new.elf"))
    core = (tmp_path / "new.elf").read_bytes()
    assert struct.unpack_from("<H", core, 56) == (3,)
    assert [struct.unpack_from("<I", core, 64 + 56 * number)[0] for number in range(3)] == [4, 1, 1]
    assert vmconv.info(str(tmp_path / "new.elf"))["format-specific"]["data"]["notes"] == "none"
    assert memory(tmp_path / "new.elf") == TWO


def test_a_new_state_has_what_crash_asks_for(tmp_path: Path) -> None:
    vmconv.convert(str(put(tmp_path, "web.elf", elf_core(TWO))), str(tmp_path / "new.vmss"))
    state = (tmp_path / "new.vmss").read_bytes()
    count = int.from_bytes(state[8:12], "little")
    # It multiplies the 80 bytes of an entry by their number, and by 80 again.
    assert len(state) >= 12 + 80 * 80 * count
    assert tag("cpu:numVCPUs", 1) in state
    said = vmconv.info(str(tmp_path / "new.vmss"))
    assert said["losses"] == []
    assert said["format-specific"]["data"]["machine-state"] == "none"


@pytest.mark.parametrize("more", [b"", tag("rip", 7, 0, width=8)], ids=["a number", "registers"])
def test_the_state_of_processors_is_lost_unless_it_is_a_number(tmp_path: Path, more: bytes) -> None:
    body = tag("align_mask", 0xFFFF) + regions([])
    put(tmp_path, "web.vmem", A)
    path = put(tmp_path, "web.vmss", groups([("cpu", tag("cpu:numVCPUs", 1) + more), ("memory", body)]))
    lost = ["state of the machine in 1 group, such as cpu"] if more else []
    assert vmconv.info(str(path))["losses"] == lost


def test_ram_that_is_no_whole_pages_has_no_regions(tmp_path: Path) -> None:
    source = put(tmp_path, "web.lime", lime([(0, A), (0x100000, B[:100])]))
    with pytest.raises(VmconvError, match="RAM at 0x100000 is not whole pages") as caught:
        vmconv.convert(str(source), str(tmp_path / "new.vmss"))
    assert "elfcore and lime" in (caught.value.hint or "")
    assert not (tmp_path / "new.vmss").exists()


@pytest.mark.parametrize(("size", "warns"), [(1 << 30, False), (3 << 30, True), (5 << 30, True)])
def test_raw_memory_that_may_have_lost_its_gap_has_a_warning(xfs_dir: Path, size: int, warns: bool) -> None:
    path = xfs_dir / "web.ram"
    with path.open("wb") as file:
        file.truncate(size)
        file.seek(min(size, 0xFEC01000) - PAGE)
        file.write(A[:PAGE])
    said = vmconv.info(str(path))["warnings"]
    assert any("without the gap below 4 GiB" in text for text in said) is warns


# -- hostile


def core(at: int, value: int, width: int = 8) -> bytes:
    """Returns a core with another value in one field."""
    data = bytearray(elf_core(TWO))
    data[at : at + width] = value.to_bytes(width, "little")
    return bytes(data)


FIRST, SECOND = 64, 64 + 56
CORES = [
    pytest.param(core(54, 57, 2), r"e_phentsize at 0x36: 57 is not 56", id="e_phentsize"),
    pytest.param(core(56, 0, 2), r"e_phnum at 0x38: 0 program headers", id="no headers"),
    pytest.param(
        core(56, 0xFFFE, 2), r"program headers at 0x40: \d+ bytes reach past the end", id="headers past the end"
    ),
    pytest.param(core(56, 0xFFFF, 2), r"sh_info at 0x2c: 0 program headers", id="PN_XNUM without its section"),
    pytest.param(core(32, 1 << 63), r"program headers at 0x8000000000000000", id="e_phoff"),
    pytest.param(core(16, 2, 2), r"e_type at 0x10: 2 is not 4, a core", id="a program"),
    pytest.param(core(4, 3, 1), r"EI_CLASS at 0x4: 3 is not", id="class"),
    pytest.param(
        core(FIRST + 8, 1 << 40), r"program header 0 at 0x40: 0x2000 bytes at 0x10000000000 end past", id="offset"
    ),
    pytest.param(
        core(FIRST + 8, (1 << 64) - 1), r"program header 0 at 0x40: 0x2000 bytes at 0xf+ end past", id="offset wraps"
    ),
    pytest.param(
        core(FIRST + 24, (1 << 64) - PAGE), r"0x2000 bytes at 0xfffffffffffff000 ends past", id="address wraps"
    ),
    pytest.param(
        core(FIRST + 32, 1 << 20), r"program header 0 at 0x40: 0x100000 bytes are stored of 0x2000", id="filesz"
    ),
    pytest.param(core(SECOND + 24, PAGE), r"begins before 0x2000, the end of another one", id="overlap in memory"),
    pytest.param(core(SECOND + 8, 64 + 112), r"its bytes at 0xb0 are those of another range", id="overlap in the file"),
    pytest.param(elf_core([]).replace(b"\0\0\0", b"\0\0\0"), r"e_phnum at 0x38: 0 program headers", id="empty"),
]


@pytest.mark.malformed
@pytest.mark.parametrize(("data", "message"), CORES)
def test_a_malformed_core_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    refused(put(tmp_path, "web.elf", data), message)


@pytest.mark.parametrize("suffix", ["elf", "x"])
@pytest.mark.parametrize(
    ("length", "message"),
    [
        pytest.param(18, r"ELF header at 0x10: 48 bytes reach past the end of the file \(0x12\)", id="behind the type"),
        pytest.param(51, r"ELF header at 0x10: 48 bytes reach past the end of the file \(0x33\)", id="header"),
        pytest.param(70, r"program headers at 0x40: 112 bytes reach past the end", id="program headers"),
    ],
)
def test_a_core_that_is_cut_is_named_as_a_core(tmp_path: Path, length: int, message: str, suffix: str) -> None:
    with pytest.raises(ImageError, match=message):
        vmconv.info(str(put(tmp_path, f"web.{suffix}", elf_core(TWO)[:length])))


@pytest.mark.parametrize("length", [4, 17])
def test_a_core_that_is_cut_before_its_type_is_known_by_its_name(tmp_path: Path, length: int) -> None:
    with pytest.raises(ImageError, match=rf"ELF header at 0x\w+: \d+ bytes reach past the end .*\({length:#x}\)"):
        vmconv.info(str(put(tmp_path, "web.vmcore", elf_core(TWO)[:length])))
    with pytest.raises(ImageError, match="signature of ELF file, which is not a disk"):
        vmconv.info(str(put(tmp_path, "web.x", elf_core(TWO)[:length])))


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("web.vmss", saved_state([])[0][:8], r"header at 0x0: 12 bytes reach past the end"),
        ("web.save", b"LibvirtQemudSave".ljust(30, b"\0"), r"header at 0x0: 36 bytes reach past the end"),
        ("web.kdump", b"KDUMP   \6\0\0\0", r"header at 0x0: is cut off after 12 of 4096 bytes"),
    ],
)
def test_an_image_that_is_cut_in_its_header_says_so(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        vmconv.info(str(put(tmp_path, name, data)))


def test_a_core_of_a_process_is_named_as_such(tmp_path: Path) -> None:
    data = bytearray(elf_core(TWO))
    data[SECOND + 24 : SECOND + 32] = bytes(8)
    with pytest.raises(ImageError, match="begins before") as caught:
        vmconv.convert(str(put(tmp_path, "web.core", bytes(data))), str(tmp_path / "new.ram"), source_format="elfcore")
    assert "core of a process" in (caught.value.hint or "")


LIMES = [
    pytest.param(lime(TWO)[:-1], r"range 1 at 0x2020: 0x3000 bytes at 0x2040 end past 0x503f", id="past the end"),
    pytest.param(lime(TWO)[: 0x2020 + 16], r"range header at 0x2020: 32 bytes reach past the end", id="half a header"),
    pytest.param(lime(TWO) + b"\1" * 32, r"range 2 at 0x5040: 0x1010101 is not the magic number", id="bytes behind"),
    pytest.param(lime([(0, A), (PAGE, B)]), r"range at 0x2020: range at 0x1000 begins before 0x2000", id="overlap"),
    pytest.param(lime(TWO[:1]) + lime(TWO[1:], 2), r"version at 0x2024: 2 is not 1", id="version"),
    pytest.param(struct.pack("<IIQQQ", 0x4C694D45, 1, 9, 8, 0), r"range 0 at 0x0: last address 0x8 is less", id="last"),
    pytest.param(
        struct.pack("<IIQQQ", 0x4C694D45, 1, 1, (1 << 64) - 1, 0) + A,
        r"range 0 at 0x0: range of 0xf+ bytes at 0x1 ends past",
        id="sum overflows",
    ),
]


@pytest.mark.malformed
@pytest.mark.parametrize(("data", "message"), LIMES)
def test_malformed_lime_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    refused(put(tmp_path, "web.lime", data), message)


def of_memory(body: bytes) -> bytes:
    return groups([("memory", body)])


def region(page: int, at: int, pages: int, number: int = 0) -> bytes:
    names = zip(("regionPPN", "regionPageNum", "regionSize"), (page, at, pages), strict=True)
    return b"".join(tag(name, value, number) for name, value in names)


STATES = [
    pytest.param(
        struct.pack("<III", 0xBED2BED2, 8, 1 << 31), r"group count at 0x8: 2147483648 is more than", id="count"
    ),
    pytest.param(
        struct.pack("<III", 0xBED2BED2, 8, 9), r"groups at 0xc: 720 bytes reach past the end", id="groups past"
    ),
    pytest.param(groups([("cpu", b"")]), r"groups at 0xc: none of 1 is the memory", id="no memory"),
    pytest.param(
        struct.pack("<III64sQQ", 0xBED2BED2, 8, 1, b"memory", 1 << 63, 9),
        r"offset of group 0 at 0x4c: 0x8",
        id="offset",
    ),
    pytest.param(of_memory(b"")[:-2], r"tag at 0x5c: 2 bytes reach past the end", id="no end"),
    pytest.param(
        of_memory(tag("regionsCount", 2) + region(0, 0, 1)), r"region 1 at 0x5c: has no tag regionPPN", id="region"
    ),
    pytest.param(of_memory(tag("regionsCount", 1 << 31)), r"region 0 at 0x5c: has no tag regionPPN", id="regionsCount"),
    pytest.param(
        of_memory(regions([(0, 0, 6)])), r"region 0 at 0x\w+: pages 0x0 to 0x6 end past the memory", id="pages"
    ),
    pytest.param(of_memory(regions([(0, 1 << 31, 1 << 31)])), r"end past the memory, which has 0x5", id="sum"),
    pytest.param(of_memory(regions([(0, 0, 2), (1, 2, 3)])), r"begins before 0x2000", id="overlap"),
    pytest.param(of_memory(regions([(0, 0, 3), (9, 2, 3)])), r"are those of another range", id="shared pages"),
    pytest.param(
        of_memory(block("regionsCount", b"x")), r"tag regionsCount at 0x5c: is a block, a number is", id="block"
    ),
    pytest.param(of_memory(block("Memory", A)[:-PAGE]), r"size of a block at 0x\w+: 0x2000 bytes at", id="block past"),
    pytest.param(of_memory(tag("a", 1) * 70_000), r"more than 65536 tags", id="tags"),
]


@pytest.mark.malformed
@pytest.mark.parametrize(("data", "message"), STATES)
def test_a_malformed_saved_state_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    put(tmp_path, "web.vmem", A + B)
    refused(put(tmp_path, "web.vmss", data), message)
    refused(tmp_path / "web.vmem", message)


def refused(path: Path, message: str) -> None:
    target = path.with_name("new.ram")
    name = {".elf": "elfcore", ".lime": "lime"}.get(path.suffix, "vmem")
    with pytest.raises(ImageError, match=message) as caught:
        vmconv.convert(str(path), str(target), source_format=name)
    assert str(caught.value).startswith(("web.elf: ", "web.lime: ", "web.vmss: "))
    assert "\n" not in str(caught.value)
    assert not target.exists()
    assert images.LOW
