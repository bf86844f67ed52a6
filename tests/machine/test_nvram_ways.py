"""Firmware variables go with a machine through other platforms and back; virt-fw-vars reads what arrives."""

from __future__ import annotations

import json
import struct
import subprocess
from pathlib import Path
from uuid import UUID
from xml.etree.ElementTree import parse

import pytest

import vmconv
from support.disks import MIB, make_disk
from support.requirements import missing, oracle_program
from vmconv.machine.nvram import Variable, ovmf, read

TEMPLATE = Path("/usr/share/OVMF/OVMF_VARS_4M.ms.fd")
GLOBAL = UUID("8be4df61-93ca-11d2-aa0d-00e098032b8c")

DOMAIN = """<domain type='qemu'>
  <name>web</name>
  <memory unit='MiB'>256</memory>
  <vcpu>1</vcpu>
  <os firmware='efi'>
    <type arch='x86_64' machine='q35'>hvm</type>
    <firmware>
      <feature enabled='yes' name='secure-boot'/>
      <feature enabled='yes' name='enrolled-keys'/>
    </firmware>
    <loader secure='yes'/>
    <nvram>{directory}/web_VARS.fd</nvram>
  </os>
  <devices>
    <disk type='file' device='disk'>
      <driver name='qemu' type='raw'/>
      <source file='{directory}/web.raw'/>
      <target dev='sda' bus='sata'/>
    </disk>
  </devices>
</domain>
"""


def with_start_entry(store: bytes) -> bytes:
    """Returns a store with a boot entry for a file on a partition."""
    partition = bytes.fromhex("04012a00") + bytes(38) + bytes.fromhex("04040600") + b"a\0" + bytes.fromhex("7fff0400")
    entry = struct.pack("<IH", 1, len(partition)) + "debian\0".encode("utf-16-le") + partition
    added = (Variable(GLOBAL, "BootOrder", 7, b"\x03\0"), Variable(GLOBAL, "Boot0003", 7, entry))
    return ovmf.write((*read(store, "template").variables, *added))


def variables(store: Path, directory: Path) -> dict[str, str]:
    """Returns the data of each variable that virt-fw-vars finds, by name."""
    listed = directory / f"{store.name}.json"
    command = [oracle_program("virt-fw-vars"), "-i", str(store), "--output-json", str(listed)]
    subprocess.run(command, capture_output=True, check=True)
    return {one["name"]: one["data"] for one in json.loads(listed.read_text())["variables"]}


@pytest.mark.parametrize("way", ["proxmox", "vbox", "ova"])
def test_keys_and_boot_entries_come_back_from_another_platform(tmp_path: Path, way: str) -> None:
    if not TEMPLATE.exists():
        missing("oracle", f"{TEMPLATE} is not there (ovmf)")
    make_disk(tmp_path / "web.raw", MIB)
    (tmp_path / "web.xml").write_text(DOMAIN.format(directory=tmp_path))
    (tmp_path / "web_VARS.fd").write_bytes(with_start_entry(TEMPLATE.read_bytes()))
    there = vmconv.machine_convert(tmp_path / "web.xml", tmp_path / "there", target_format=way)
    back = vmconv.machine_convert(there.target, tmp_path / "back", target_format="libvirt")
    nvram = parse(back.target).findtext("os/nvram")
    assert nvram
    before, after = variables(tmp_path / "web_VARS.fd", tmp_path), variables(Path(nvram), tmp_path)
    assert {"PK", "KEK", "db", "dbx", "BootOrder", "Boot0003"} <= before.keys()
    kept = {name: data for name, data in before.items() if name in after and name != "SecureBootEnable"}
    assert {"PK", "KEK", "db", "dbx", "BootOrder", "Boot0003"} <= kept.keys()
    assert {name: after[name] for name in kept} == kept
    assert after["SecureBootEnable"] == "01"
    assert vmconv.machine_info(back.target).firmware.secure_boot is True
