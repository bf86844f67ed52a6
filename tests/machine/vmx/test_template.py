"""Firmware variables are written into a copy of a store of VMware's own."""

from __future__ import annotations

import lzma
import struct
from pathlib import Path

import pytest

import vmconv
from support.disks import MIB, make_disk
from support.requirements import CORPUS, missing
from vmconv.errors import ImageError, PlanError
from vmconv.machine.nvram import Store, Variable, ovmf, read, vmware
from vmconv.machine.nvram.variables import GLOBAL

CONF = """\
name: web
bios: {bios}
memory: 1024
scsi0: local:100/vm-100-disk-0.raw,size=4M
{efi}
"""
EFI = "efidisk0: local:100/vm-100-disk-1.raw,efitype=4m,size=528K"
PK = Variable(GLOBAL, "PK", 0x27, b"of the source", bytes(range(16)))
LANG = Variable(GLOBAL, "Lang", 7, b"eng\0")


@pytest.fixture
def template(tmp_path: Path) -> Path:
    """A store of VMware's layout, with a variable of its own."""
    space = struct.pack("<8sII", b"VMWNVRAM", 0, 16) + b"\xff" * 60_000
    path = tmp_path / "template.nvram"
    empty = b"MRVN" + struct.pack("<I8sI", 1, b"EFI_NV", len(space)) + space
    path.write_bytes(vmware.write(empty, [LANG, PK._replace(data=b"of VMware")], "a"))
    return path


def machine(directory: Path, *, bios: str = "ovmf", efi: str = EFI) -> Path:
    directory.mkdir()
    make_disk(directory / "vm-100-disk-0.raw", 4 * MIB)
    (directory / "vm-100-disk-1.raw").write_bytes(ovmf.write([PK]))
    (directory / "100.conf").write_text(CONF.format(bios=bios, efi=efi))
    return directory / "100.conf"


def convert(config: Path, directory: Path, template: Path) -> vmconv.MachineResult:
    options = {"nvram_template": str(template)}
    return vmconv.machine_convert(config, directory, target_format="vmx", options=options)


def stores(directory: Path) -> list[Path]:
    return sorted(directory.glob("**/*.nvram"))


def test_a_copy_of_the_template_gets_the_source_s_keys(template: Path, tmp_path: Path) -> None:
    before = template.read_bytes()
    done = convert(machine(tmp_path / "source"), tmp_path / "there", template)
    (made,) = stores(tmp_path / "there")
    assert f'nvram = "{made.name}"\n' in Path(done.target).read_text()
    assert "firmware.nvram" not in {loss.path for loss in done.plan.losses}
    assert read(made.read_bytes(), "a") == Store("vmware", (PK, LANG))
    assert template.read_bytes() == before
    # It is read as part of the new machine.
    vmconv.machine_convert(done.target, tmp_path / "back", target_format="proxmox")
    (store,) = (tmp_path / "back").glob("**/vm-100-disk-1.raw")
    assert PK in read(store.read_bytes(), "b").variables


def test_a_machine_without_a_store_gets_the_template_as_it_is(template: Path, tmp_path: Path) -> None:
    convert(machine(tmp_path / "source", efi=""), tmp_path / "there", template)
    (made,) = stores(tmp_path / "there")
    assert made.read_bytes() == template.read_bytes()


def test_a_real_file_of_esxi_is_a_template(tmp_path: Path) -> None:
    template = tmp_path / "esx7.nvram"
    packed = CORPUS / "nvram" / "esxi7.nvram.xz"
    if not packed.exists():
        missing("corpus", f"{packed} is not there")
    template.write_bytes(lzma.decompress(packed.read_bytes()))
    convert(machine(tmp_path / "source"), tmp_path / "there", template)
    (made,) = stores(tmp_path / "there")
    assert PK in read(made.read_bytes(), "a").variables
    assert len(made.read_bytes()) == template.stat().st_size


def test_without_a_template_the_store_is_a_loss(tmp_path: Path) -> None:
    done = vmconv.machine_convert(machine(tmp_path / "source"), tmp_path / "there", target_format="vmx")
    assert "vmx takes no store that could be made" in {loss.reason for loss in done.plan.losses}
    assert stores(tmp_path / "there") == []


@pytest.mark.parametrize(
    ("bios", "content", "error", "said"),
    [
        ("seabios", None, PlanError, "the firmware of the machine is a BIOS"),
        ("ovmf", b"x" * 1000, PlanError, "is no EFI variable store of VMware"),
        ("ovmf", b"MRVN" + bytes(100), ImageError, "has no section of EFI variables"),
        ("ovmf", b"", PlanError, "is no EFI variable store of VMware"),
    ],
    ids=["bios", "other", "no-section", "empty"],
)
def test_a_template_that_cannot_be_used_is_an_error(
    bios: str, content: bytes | None, error: type[Exception], said: str, template: Path, tmp_path: Path
) -> None:
    if content is not None:
        template.write_bytes(content)
    with pytest.raises(error, match=said):
        convert(machine(tmp_path / "source", bios=bios, efi=""), tmp_path / "there", template)
    assert not (tmp_path / "there").exists()
