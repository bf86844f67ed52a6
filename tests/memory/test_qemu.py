"""What QEMU and libvirt write of a machine, and volatility3's opinion of it."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path

import pytest

import vmconv
from support.disks import MIB
from support.libvirt_host import LibvirtHost, short_directory
from support.qemu_monitor import LOADED, PLACE, qemu
from support.requirements import oracle_program
from support.volatility import volatility
from vmconv.io.opener import Opener
from vmconv.io.registry import installed
from vmconv.model.extents import Kind

GIB = 1 << 30


def ram(path: Path) -> list[tuple[int, int]]:
    """Returns start and end of each range of RAM."""
    with Opener(installed()) as opener:
        found: list[tuple[int, int]] = []
        for row in opener.image(str(path)).guest:
            if row.kind != Kind.HOLE and found and found[-1][1] == row.start:
                found[-1] = found[-1][0], row.end
            elif row.kind != Kind.HOLE:
                found.append((row.start, row.end))
        return found


def read(path: Path, at: int, length: int) -> bytes:
    with Opener(installed()) as opener:
        return opener.image(str(path)).guest.read(at, length)


@pytest.fixture
def dumps(xfs_dir: Path) -> Path:
    """A folder with one machine as a core, as raw memory, and as a migration stream."""
    size = 64 * MIB
    qemu(
        xfs_dir,
        f'dump-guest-memory "{xfs_dir}/web.elf"',
        f'pmemsave 0 {size} "{xfs_dir}/web.ram"',
        f'migrate "exec:cat > {xfs_dir}/web.mig"',
    )
    return xfs_dir


def test_what_qemu_wrote_is_the_same_memory_in_all_ways(dumps: Path) -> None:
    wanted = (dumps / "web.ram").read_bytes()
    assert wanted[PLACE : PLACE + len(LOADED)] == LOADED
    # The core has the firmware below 4 GiB, too, and the stream shows RAM behind it; so each ends differently.
    for name in ("web.elf", "web.mig"):
        for at, length in ((0, 0xA0000), (MIB, 63 * MIB)):
            assert read(dumps / name, at, length) == wanted[at : at + length], name
    assert ram(dumps / "web.mig") == [(0, 64 * MIB)]
    assert vmconv.info(str(dumps / "web.elf"))["format-specific"]["data"]["processors-with-registers"] == 1


@pytest.mark.parametrize("target", ["new.ram", "new.elf", "new.lime", "new.vmss"])
@pytest.mark.parametrize("source", ["web.elf", "web.mig"])
def test_what_qemu_wrote_is_converted(dumps: Path, source: str, target: str) -> None:
    vmconv.convert(str(dumps / source), str(dumps / target))
    assert read(dumps / target, PLACE, len(LOADED)) == LOADED
    assert vmconv.compare(str(dumps / source), str(dumps / target))


def test_pages_behind_headers_make_one_range_of_a_core(dumps: Path) -> None:
    vmconv.convert(str(dumps / "web.mig"), str(dumps / "new.elf"))
    shown = subprocess.run(
        [oracle_program("readelf"), "-lW", str(dumps / "new.elf")], capture_output=True, text=True, check=True
    ).stdout
    # volatility3 finds no kernel in a core with thousands of ranges.
    assert shown.count("LOAD") == 1
    assert (dumps / "new.elf").stat().st_size < 64 * MIB + 2 * 4096


def test_notes_of_qemu_stay_in_a_core(dumps: Path) -> None:
    readelf = oracle_program("readelf")
    result = vmconv.convert(str(dumps / "web.elf"), str(dumps / "new.elf"))
    assert not result.losses
    shown = [
        subprocess.run([readelf, "-nW", str(dumps / name)], capture_output=True, text=True, check=True).stdout
        for name in ("web.elf", "new.elf")
    ]
    # The offset and the length of the notes are in the first line.
    assert shown[0].splitlines()[2:] == shown[1].splitlines()[2:]
    assert "QEMU" in shown[0]


@pytest.mark.parametrize(
    ("machine", "memory", "low"),
    [("pc", "4096M", 3 * GIB), ("pc", "3400M", 3400 * MIB), ("q35", "3400M", 2 * GIB), ("q35", "2500M", 2500 * MIB)],
)
def test_the_addresses_of_ram_are_those_of_the_machine(xfs_dir: Path, machine: str, memory: str, low: int) -> None:
    size = int(memory[:-1]) * MIB
    high = size > low
    at = 4 * GIB + 2 * MIB if high else low - 8 * MIB
    said = qemu(
        xfs_dir, "info mtree -f", f'migrate "exec:cat > {xfs_dir}/web.mig"', memory=memory, machine=machine, at=at
    )
    assert ram(xfs_dir / "web.mig") == [(0, low)] + [(4 * GIB, 4 * GIB + size - low)] * high
    assert read(xfs_dir / "web.mig", at, len(LOADED)) == LOADED
    # QEMU's own map of its memory has the same end.
    end = (4 * GIB + size - low if high else low) - 1
    assert f"-{end:016x} (prio 0, ram): pc.ram" in said


def test_libvirt_s_saved_machine_and_dump_are_read() -> None:
    xml = f"""<domain type='qemu'><name>web</name><memory unit='MiB'>48</memory><vcpu>1</vcpu>
      <os><type arch='x86_64' machine='pc'>hvm</type></os>
      <devices><emulator>{oracle_program("qemu-system-x86_64")}</emulator></devices></domain>"""
    with short_directory() as folder:
        host = LibvirtHost(folder)
        (folder / "web.xml").write_text(xml)
        host.run(
            f"create {folder}/web.xml --paused",
            f"dump web {folder}/web.elf --memory-only --live",
            f"save web {folder}/web.save",
        )
        core, saved = folder / "web.elf", folder / "web.save"
        assert ram(saved) == [(0, 48 * MIB)]
        assert vmconv.info(str(saved))["format"] == "libvirtsave"
        rng = random.Random(1)
        for at in (0, *(rng.randrange(256, 48 * 256) * 4096 for _ in range(200))):
            if not 0xA0 <= at // 4096 < 0x100:
                assert read(saved, at, 4096) == read(core, at, 4096), hex(at)
        vmconv.convert(str(saved), str(folder / "new.lime"))
        assert vmconv.compare(str(saved), str(folder / "new.lime"))


def test_volatility_reads_the_stream_as_vmconv_does(dumps: Path) -> None:
    """Its layer is of the stream; ours is of what the stream was converted to."""
    vmconv.convert(str(dumps / "web.mig"), str(dumps / "new.elf"))
    rng = random.Random(7)
    asked = [PLACE, *(rng.randrange(256, 64 * 256) * 4096 + 16 * rng.randrange(256) for _ in range(1000))]
    _, theirs = volatility(dumps / "web.mig", "qemu", "QemuSuspendLayer", asked)
    _, ours = volatility(dumps / "new.elf", "elf", "Elf64Layer", asked)
    assert ours == theirs
    assert ours[0] == LOADED[:16].hex()
