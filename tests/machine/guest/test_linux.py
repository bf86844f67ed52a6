"""Linux guests are found in their filesystems. Oracles: mkfs, modinfo, lsinitramfs, cpio, a kernel of Debian."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from support.disks import MIB
from support.guest_systems import disk_of, filesystem, installed_kernel, write_tree
from support.requirements import oracle_module, oracle_program
from support.toy_machines import machine
from vmconv.cli.main import main
from vmconv.guest import Facts, Task, Volume, look
from vmconv.guest.contents import content_of
from vmconv.guest.initramfs import InitramfsError, names_in
from vmconv.io.opener import Opener
from vmconv.io.registry import installed
from vmconv.machine.boot import partitions

pytestmark = pytest.mark.usefixtures("toys", "libraries")

DRIVERS = (
    *("virtio_blk", "virtio_scsi", "virtio_pci", "virtio_net", "vmw_pvscsi", "vmxnet3", "hv_storvsc", "hv_netvsc"),
    *("nvme", "ahci", "mptspi", "e1000", "sd_mod", "ata_piix"),
)
RELEASE = 'NAME=x\nPRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\n'


@pytest.fixture(scope="session")
def libraries() -> None:
    for name in ("pyfsext", "pyfsxfs", "lz4"):
        oracle_module(name)


def debian(**changes: str | bytes | Path) -> dict[str, str | bytes | Path]:
    """Returns the files of a guest with the installed kernel, as Debian lays them out."""
    version = installed_kernel()
    modules = Path("/lib/modules", version)
    return {
        "lib": Path("usr/lib"),
        "etc/os-release": Path("../usr/lib/os-release"),
        "usr/lib/os-release": RELEASE,
        "etc/fstab": "UUID=01234567-89ab-cdef-0123-456789abcdef / ext4 defaults 0 1\n",
        **{f"usr/lib/modules/{version}/{name}": (modules / name).read_bytes() for name in LISTS},
        f"boot/initrd.img-{version}": Path(f"/boot/initrd.img-{version}").read_bytes(),
        "boot/grub/grub.cfg": f"  linux /boot/vmlinuz-{version} root=UUID=0123 ro quiet\n",
        **changes,
    }


LISTS = ("modules.dep", "modules.builtin")


class Counted:
    """A disk that counts the bytes that are read of it."""

    def __init__(self, disk: Any) -> None:
        self.disk, self.size, self.bytes = disk, disk.size, 0

    def read(self, offset: int, length: int) -> bytes:
        self.bytes += length
        return bytes(self.disk.read(offset, length))


def facts_of(path: Path) -> tuple[Facts, int]:
    """Returns what is found on a disk, and how many bytes were read for it."""
    with Opener(installed()) as opener:
        disk = opener.image(str(path), "raw").flat
        volumes = []
        for number, one in enumerate(partitions.read(disk).partitions, 1):
            if content := content_of(disk, one.start):
                volumes.append(Volume(0, number, one.start, one.length, content))
        counted = Counted(disk)
        return look([counted], Task(tuple(volumes), DRIVERS, ())), counted.bytes  # type: ignore[list-item]


@pytest.mark.parametrize(("kind", "size"), [("ext4", 64), ("xfs", 320)], ids=["ext4", "xfs"])
def test_the_drivers_of_a_kernel_are_those_that_its_own_tools_find(kind: str, size: int, tmp_path: Path) -> None:
    version = installed_kernel()
    tree = write_tree(tmp_path / "tree", debian())
    found, read = facts_of(disk_of(tmp_path / "disk.raw", [filesystem(tmp_path / "fs", kind, tree, size * MIB)]))
    assert found.problems == ()
    (system,) = found.systems
    assert (system.kind, system.name, system.devices) == ("linux", "Debian GNU/Linux 12 (bookworm)", ())
    (kernel,) = system.kernels
    where = {name: modinfo(version, name) for name in DRIVERS}
    assert set(kernel.builtin) == {name for name, path in where.items() if path == "(builtin)"}
    assert set(kernel.modules) == {name for name, path in where.items() if path.startswith("/")}
    assert kernel.modules
    image = f"/boot/initrd.img-{version}"
    said = subprocess.run([oracle_program("lsinitramfs"), image], capture_output=True, text=True, check=True).stdout
    listed = {Path(line).name.split(".ko")[0].replace("-", "_") for line in said.splitlines() if ".ko" in line}
    assert set(kernel.inside) == set(DRIVERS) & listed
    assert (kernel.initramfs, kernel.problem) == (image, None)
    # The initramfs, two lists of modules, and little of the filesystem.
    assert read < Path(image).stat().st_size + 2 * MIB


def modinfo(version: str, driver: str) -> str:
    command = [oracle_program("modinfo"), "-k", version, "-F", "filename", driver]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def small(**changes: str | bytes | Path) -> dict[str, str | bytes | Path]:
    """Returns the files of a guest with a kernel of two modules, and an initramfs with one of them."""
    return {
        "usr/lib/modules/6.1/modules.dep": "kernel/a/virtio_blk.ko.xz:\nkernel/a/virtio-net.ko: kernel/a/x.ko\n",
        "usr/lib/modules/6.1/modules.builtin": "kernel/b/virtio_pci.ko\n",
        "lib": Path("/usr/lib"),
        "etc/fstab": "",
        "boot/initramfs-6.1.img": archive("usr/lib/modules/6.1/kernel/a/virtio_blk.ko.xz"),
        **changes,
    }


def archive(*names: str) -> bytes:
    """Returns an archive of files, made by cpio."""
    import tempfile

    with tempfile.TemporaryDirectory() as directory:
        write_tree(Path(directory), dict.fromkeys(names, b"module" * 7))
        command = [oracle_program("cpio"), "-o", "-H", "newc", "--quiet"]
        paths = "\n".join(names)
        return subprocess.run(command, input=paths.encode(), cwd=directory, capture_output=True, check=True).stdout


def guest(directory: Path, files: dict[str, str | bytes | Path], *, boot: dict[str, Any] | None = None) -> Path:
    """Makes the disk of a guest, with a filesystem of its own for /boot if there are files for it."""
    made = [filesystem(directory / "root.fs", "ext4", write_tree(directory / "root", files), 8 * MIB)]
    if boot is not None:
        made.append(filesystem(directory / "boot.fs", "ext4", write_tree(directory / "boot", boot), 8 * MIB))
    return disk_of(directory / "system.raw", made)


PACKERS = {
    "plain": [],
    "gzip": ["gzip", "-c"],
    "xz": ["xz", "-c", "--check=crc32"],
    "lzma": ["xz", "-c", "--format=lzma"],
    "zstd": ["zstd", "-c", "-q", "-19"],
    "lz4": ["lz4", "-c", "-l", "-q"],
}


@pytest.mark.parametrize("early", [False, True], ids=["one", "early"])
@pytest.mark.parametrize("packer", PACKERS)
def test_an_initramfs_is_read_however_it_is_packed(packer: str, early: bool) -> None:
    names = [f"usr/lib/modules/{n}/driver{n}.ko" for n in range(50)]
    data = archive(*names)
    if PACKERS[packer]:
        command = [oracle_program(PACKERS[packer][0]), *PACKERS[packer][1:]]
        data = subprocess.run(command, input=data, capture_output=True, check=True).stdout
    if early:
        # Debian puts the microcode of processors before, and the kernel allows zeros between archives.
        data = archive("kernel/x86/microcode/GenuineIntel.bin") + bytes(512) + data + bytes(1024)
        names = ["kernel/x86/microcode/GenuineIntel.bin", *names]
    assert list(names_in(lambda at, length: data[at : at + length], len(data))) == names


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"BZh9" + bytes(100), "compressed in a way that is not known"),
        (b"070701" + b"zz" * 60, "damaged cpio header"),
        (b"070701" + b"0" * 88 + b"FFFFFFFF" + b"0" * 100, "damaged cpio header"),
        (b"070701" + b"0" * 40, "damaged cpio header"),
        (b"\x1f\x8b\x08\x00" + b"\xff" * 100, "cannot be unpacked"),
        (b"\x28\xb5\x2f\xfd" + b"\xff" * 100, "cannot be unpacked"),
        (b"\x02\x21\x4c\x18\x10\0\0\0" + b"\xff" * 100, "cannot be unpacked"),
    ],
    ids=["unknown", "header", "long-name", "cut-header", "gzip", "zstd", "lz4"],
)
def test_a_damaged_initramfs_is_refused(data: bytes, said: str) -> None:
    with pytest.raises(InitramfsError, match=said):
        list(names_in(lambda at, length: data[at : at + length], len(data)))


def test_an_initramfs_that_unpacks_to_too_much_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import zlib

    monkeypatch.setattr("vmconv.guest.initramfs.MAX_UNPACKED", 1 << 20)
    packer = zlib.compressobj(wbits=31)
    data = packer.compress(archive("a") + bytes(16 << 20)) + packer.flush()
    with pytest.raises(InitramfsError, match="too large"):
        list(names_in(lambda at, length: data[at : at + length], len(data)))


def checked(config: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> list[tuple[str, str, str]]:
    """Returns level, part and text of what `machine check` finds inside the guest."""
    capsys.readouterr()
    main(["machine", "check", "--output", "json", *arguments, str(config)])
    found = json.loads(capsys.readouterr().out)
    return [(one["level"], one["path"], one["text"]) for one in found if "partition" in one["path"]]


def virtio(directory: Path, bus: str = "virtio", **changes: Any) -> Path:
    return machine(directory, firmware={"kind": "uefi"}, disks=[{"file": "system.raw", "bus": bus}], **changes)


ROOT = "disks[0] partition 2 (ext)"


def test_a_driver_that_only_the_disk_has_keeps_a_guest_from_starting(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = virtio(tmp_path, nics=[{"model": "vmxnet3"}])
    guest(tmp_path, small(**{"boot/initramfs-6.1.img": archive("usr/lib/modules/6.1/kernel/a/other.ko")}))
    path = f"{ROOT}: kernel 6.1"
    lacking = "has virtio_blk, which disks[0] needs, as a module, and /boot/initramfs-6.1.img lacks it"
    assert checked(config, capsys) == [
        ("note", ROOT, "has Linux"),
        ("error", path, lacking),
        ("warning", path, "has no driver vmxnet3, which nics[0] needs"),
    ]
    assert main(["machine", "check", str(config)]) == 1


def test_a_guest_with_its_drivers_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = virtio(tmp_path, nics=[{"model": "virtio"}])
    guest(tmp_path, small())
    assert checked(config, capsys) == [("note", ROOT, "has Linux")]
    assert main(["machine", "check", str(config)]) == 0
    assert "No reason was found" in capsys.readouterr().out


def test_a_kernel_without_any_driver_is_an_error_and_an_older_one_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = virtio(tmp_path, bus="nvme")
    guest(tmp_path, small(**{"usr/lib/modules/6.1.10/modules.dep": "", "usr/lib/modules/6.1.9/modules.dep": ""}))
    found = [(level, path) for level, path, text in checked(config, capsys) if "no driver nvme" in text]
    assert found == [
        ("error", f"{ROOT}: kernel 6.1.10"),
        ("warning", f"{ROOT}: kernel 6.1.9"),
        ("warning", f"{ROOT}: kernel 6.1"),
    ]


def test_boot_may_be_a_filesystem_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = small()
    initramfs = files.pop("boot/initramfs-6.1.img")
    config = virtio(tmp_path)
    line = "linux /vmlinuz-6.1 root=/dev/sda2 ro\n"
    guest(tmp_path, files, boot={"initramfs-6.1.img": initramfs, "vmlinuz-6.1": b"x", "grub2/grub.cfg": line})
    assert checked(config, capsys) == [
        ("note", ROOT, "has Linux"),
        (
            "error",
            f"{ROOT}: /boot/grub2/grub.cfg:1",
            "names /dev/sda2 for root, and the machine's disks are /dev/vd*",
        ),
    ]


FSTAB = """\
# /dev/sda1 in a comment
UUID=0123 / ext4 defaults 0 1
/dev/sda2 /home ext4 defaults 0 2
/dev/sda3 none swap sw 0 0
/dev/sdb1 /data xfs defaults,nofail 0 0
/dev/vda5 /more ext4 defaults 0 0
/dev/disk/by-path/pci-0000:00:10.0-scsi-0:0:1:0-part1 /old ext4 defaults 0 0
/dev/disk/by-uuid/0123 /a ext4 defaults 0 0
/dev/mapper/vg-var /var ext4 defaults 0 0
/dev/disk/by-id/dm-uuid-LVM-x /b ext4 defaults 0 0
"""


def test_devices_by_name_in_fstab(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = virtio(tmp_path)
    guest(tmp_path, small(**{"etc/fstab": FSTAB}))
    other = "and the machine's disks are /dev/vd*"
    by_path = "/dev/disk/by-path/pci-0000:00:10.0-scsi-0:0:1:0-part1"
    wanted = [
        ("error", 3, f"names /dev/sda2 for /home, {other}"),
        ("warning", 4, f"names /dev/sda3 for none, {other}"),
        ("warning", 5, f"names /dev/sdb1 for /data, {other}"),
        ("note", 6, "names /dev/vda5 for /more, which depends on the order of the disks"),
        ("note", 7, f"names {by_path} for /old, made of the place of its controller or of its serial number"),
    ]
    assert checked(config, capsys)[1:] == [(level, f"{ROOT}: /etc/fstab:{n}", text) for level, n, text in wanted]
    # On another platform, controllers have other places.
    moved = [one for one in checked(config, capsys, "-O", "toy") if by_path in one[2]]
    assert [level for level, _, _ in moved] == ["error"]


@pytest.mark.parametrize(
    ("path", "line", "level"),
    [
        ("boot/grub/grub.cfg", "linux /vmlinuz root=/dev/sda1 ro", "error"),
        ("boot/loader/entries/x.conf", "options root=/dev/sda1 rw", "error"),
        ("boot/extlinux/extlinux.conf", "append ro root=/dev/hda1", "error"),
        ("etc/default/grub", 'GRUB_CMDLINE_LINUX="root=/dev/nvme0n1p2"', "warning"),
        ("boot/grub/grub.cfg", "linux /vmlinuz root=UUID=1 resume=/dev/sda3", "warning"),
        ("etc/crypttab", "swap /dev/sda3 /dev/urandom swap", "warning"),
    ],
    ids=["grub", "entries", "extlinux", "default", "resume", "crypttab"],
)
def test_devices_by_name_in_boot_loaders(
    path: str, line: str, level: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = virtio(tmp_path)
    guest(tmp_path, small(**{path: f"# comment root=/dev/sda9\n{line}\n"}))
    found = checked(config, capsys)[1:]
    assert [(one[0], one[1]) for one in found] == [(level, f"{ROOT}: /{path}:2")]


def test_filesystems_are_not_looked_at_if_that_is_not_wanted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = virtio(tmp_path)
    guest(tmp_path, small(**{"etc/fstab": FSTAB}))
    assert main(["machine", "check", "--no-filesystems", str(config)]) == 0
    assert "The filesystems inside were not looked at.\n" in capsys.readouterr().out
    monkeypatch.setattr("vmconv.machine.readiness.HAVE_LIBRARIES", False)
    assert main(["machine", "check", str(config)]) == 0
    assert "were not looked at: pip install 'vmconv[guest]'" in capsys.readouterr().out


def test_control_characters_of_a_guest_are_escaped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = virtio(tmp_path)
    guest(tmp_path, small(**{"etc/os-release": 'PRETTY_NAME="\x1b[2J"', "etc/fstab": "/dev/sda1 /\x1b[31m ext4 d 0 0"}))
    main(["machine", "check", str(config)])
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\\x1b[31m" in out


@pytest.mark.parametrize(
    ("target", "line"),
    [
        ("libvirt", "virt-v2v-in-place -i libvirtxml DIRECTORY/web.xml"),
        ("proxmox", "virt-v2v-in-place -i disk -if qcow2 DIRECTORY/images/100/vm-100-disk-0.qcow2"),
    ],
    ids=["libvirt", "proxmox"],
)
def test_the_hand_off_names_the_new_machine(
    target: str, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = virtio(tmp_path)
    guest(tmp_path, small())
    main(["machine", "check", "-O", target, str(config)])
    out = capsys.readouterr().out.splitlines()
    assert out[-1] == f"  {line}"
    # virt-v2v itself knows these options.
    help_text = subprocess.run(
        [oracle_program("virt-v2v-in-place"), "--help"], capture_output=True, text=True, check=True
    )
    assert "-i <disk|libvirt|libvirtxml|" in help_text.stdout
    made = tmp_path / "new"
    assert main(["machine", "convert", "-q", "-O", target, str(config), str(made)]) == 0
    assert (made / line.rpartition("DIRECTORY/")[2]).exists()


GROUP = """\
contents = "Text Format Volume Group"
version = 1
guest {{
    id = "{ids[0]}"
    seqno = 2
    format = "lvm2"
    status = ["RESIZEABLE", "READ", "WRITE"]
    extent_size = 8192
    max_lv = 0
    max_pv = 0
    physical_volumes {{
        pv0 {{ id = "{ids[1]}" device = "/dev/sda2" status = ["ALLOCATABLE"] pe_start = 2048 pe_count = 10 }}
    }}
    logical_volumes {{
        root {{
            id = "{ids[2]}"
            status = ["READ", "WRITE", "VISIBLE"]
            segment_count = 1
            segment1 {{
                start_extent = 0
                extent_count = 2
                type = "striped"
                stripe_count = 1
                stripes = ["pv0", 3]
            }}
        }}
    }}
}}
"""


def test_filesystems_in_logical_volumes_are_looked_at(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    oracle_module("pyvslvm")
    if os.geteuid() != 0:
        pytest.skip("making a physical volume needs root")
    config = virtio(tmp_path)
    inner = filesystem(tmp_path / "root.fs", "ext4", write_tree(tmp_path / "root", small()), 8 * MIB)
    ids = ["-".join((letter * 6, *[letter * 4] * 5, letter * 6)) for letter in "abc"]
    group = tmp_path / "group.txt"
    group.write_text(GROUP.format(ids=ids))
    outer = tmp_path / "lvm.part"
    with outer.open("wb") as file:
        file.truncate(64 * MIB)
    loop = run(oracle_program("losetup"), "-f", "--show", str(outer)).strip()
    try:
        # LVM itself writes the metadata. Making a volume its usual way needs the device mapper.
        run(oracle_program("pvcreate"), "-q", "-u", ids[1], "--restorefile", str(group), loop)
        run(oracle_program("vgcfgrestore"), "-q", "-f", str(group), "guest")
    finally:
        run("losetup", "-d", loop)
    with outer.open("r+b") as file:
        file.seek(MIB + 3 * 4 * MIB)
        file.write(inner.read_bytes())
    disk_of(tmp_path / "system.raw", [outer])
    assert checked(config, capsys) == [("note", "disks[0] partition 2: guest/root (ext)", "has Linux")]


def run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
