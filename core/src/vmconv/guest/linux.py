"""What a Linux guest needs to start: devices by name in fstab and boot loader, drivers of each kernel."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from vmconv.guest.facts import MAX_ITEMS, Device, Kernel, System, cut
from vmconv.guest.filesystems import Filesystem
from vmconv.guest.initramfs import InitramfsError, names_in

MAX_CONFIG = 1 << 20
"""Bytes of a text file."""

MAX_MODULES_DEP = 8 << 20
MAX_INITRAMFS = 512 << 20
MAX_KERNELS = 8
"""Kernels that are looked at, the newest ones."""

_BY_PLACE = (
    r"/dev/(?:(?:s|h|v|xv)d[a-z]+\d*|nvme\d+n\d+(?:p\d+)?"
    # Names of LVM and RAID are made of what is on the disks.
    r"|disk/by-path/[^\s,\"']+|disk/by-id/(?!dm-|lvm-|md-)[^\s,\"']+)"
)
_DEVICE = re.compile(_BY_PLACE)
_PARAMETER = re.compile(rf"\b(root|resume)=({_BY_PLACE})")
_MODULE = re.compile(r"([^/]+)\.ko(?:\.\w+)?$")

_BOOT_LOADERS = (
    *("grub/grub.cfg", "grub2/grub.cfg", "grub/menu.lst", "grub/grub.conf"),
    *("extlinux/extlinux.conf", "syslinux/syslinux.cfg", "extlinux.conf"),
)


def is_root(filesystem: Filesystem) -> bool:
    """True if a filesystem is the root of a Linux guest."""
    return any(filesystem.file(path) for path in ("etc/fstab", "etc/os-release", "usr/lib/os-release"))


def is_boot(filesystem: Filesystem) -> bool:
    """True if a filesystem is what a guest mounts at /boot."""
    return any(name.startswith(("vmlinuz", "grub", "loader", "extlinux")) for name in filesystem.names(""))


def examine(root: Filesystem, boots: Sequence[Filesystem], drivers: Iterable[str]) -> System:
    """Returns the facts of a guest with this root filesystem; `boots` are those that may hold its boot loader."""
    wanted = frozenset(drivers)
    places = [(root, "boot/"), *((each, "") for each in boots)]
    release = root.content_of("etc/os-release", MAX_CONFIG) or ""
    name = re.search(r'(?m)^PRETTY_NAME="?([^"\n]*)', release)
    devices = [*_fstab(root), *_crypttab(root), *_boot_loaders(root, places)]
    kernels = tuple(_kernel(root, version, places, wanted) for version in _versions(root))
    return System("linux", root.where, cut(name[1]) if name else None, tuple(devices[:MAX_ITEMS]), kernels)


def _lines(filesystem: Filesystem, path: str) -> Iterator[tuple[int, str]]:
    text = filesystem.content_of(path, MAX_CONFIG) or ""
    return ((number, line) for number, line in enumerate(text.split("\n"), 1) if not line.lstrip().startswith("#"))


def _fstab(root: Filesystem) -> Iterator[Device]:
    for number, line in _lines(root, "etc/fstab"):
        fields = line.split()
        if len(fields) >= 2 and _DEVICE.fullmatch(fields[0]):
            kind, options = (*fields[2:4], "", "")[:2]
            needed = kind != "swap" and not {"noauto", "nofail"} & set(options.split(","))
            yield Device("/etc/fstab", number, cut(fields[0]), cut(fields[1]), needed)


def _crypttab(root: Filesystem) -> Iterator[Device]:
    for number, line in _lines(root, "etc/crypttab"):
        fields = line.split()
        if len(fields) >= 2 and _DEVICE.fullmatch(fields[1]):
            yield Device("/etc/crypttab", number, cut(fields[1]), cut(fields[0]), needed=False)


def _boot_loaders(root: Filesystem, places: Sequence[tuple[Filesystem, str]]) -> Iterator[Device]:
    """Yields the devices in the files of boot loaders, each once for a file, and in what such files are made from."""
    for filesystem, prefix in places:
        entries = f"{prefix}loader/entries"
        below = [f"{entries}/{name}" for name in filesystem.names(entries)[:MAX_ITEMS] if name.endswith(".conf")]
        for path in (*(f"{prefix}{each}" for each in _BOOT_LOADERS), *below):
            shown = f"/{path}" if filesystem is root else f"/boot/{path}"
            yield from _parameters(filesystem, path, shown, needed=True)
    for path in ("etc/default/grub", "etc/kernel/cmdline"):
        yield from _parameters(root, path, f"/{path}", needed=False)


def _parameters(filesystem: Filesystem, path: str, shown: str, *, needed: bool) -> Iterator[Device]:
    seen = set()
    for number, line in _lines(filesystem, path):
        for parameter, device in _PARAMETER.findall(line):
            if (parameter, device) not in seen:
                seen.add((parameter, device))
                yield Device(cut(shown), number, cut(device), parameter, needed and parameter == "root")


def _versions(root: Filesystem) -> list[str]:
    """Returns the versions of the installed kernels, the newest first."""
    found = [name for name in root.names("lib/modules") if root.file(f"lib/modules/{name}/modules.dep")]

    def order(version: str) -> list[tuple[int, str]]:
        return [(int(part), "") if part.isdigit() else (-1, part) for part in re.findall(r"\d+|[^\d.]+", version)]

    return sorted(found, key=order, reverse=True)[:MAX_KERNELS]


def _kernel(root: Filesystem, version: str, places: Sequence[tuple[Filesystem, str]], wanted: frozenset[str]) -> Kernel:
    below = f"lib/modules/{version}"
    lists = [root.content_of(f"{below}/{name}", MAX_MODULES_DEP) for name in ("modules.builtin", "modules.dep")]
    builtin, modules = (
        tuple(sorted(_drivers((line.partition(":")[0] for line in (text or "").split("\n")), wanted))) for text in lists
    )
    found = _initramfs(root, version, places)
    if found is None:
        return Kernel(cut(version), builtin, modules)
    filesystem, path, name = found
    inside: tuple[str, ...] = ()
    problem = None
    try:
        inside = _inside(filesystem, path, wanted)
    except InitramfsError as exc:
        problem = cut(str(exc))
    return Kernel(cut(version), builtin, modules, cut(name), inside, problem)


def _inside(filesystem: Filesystem, path: str, wanted: frozenset[str]) -> tuple[str, ...]:
    file = filesystem.file(path)
    if file is None or file.size > MAX_INITRAMFS:
        raise InitramfsError("is too large")
    return tuple(sorted(_drivers(names_in(file.read, file.size), wanted)))


def _drivers(paths: Iterable[str], wanted: frozenset[str]) -> set[str]:
    """Returns the wanted modules among paths of modules."""
    found = (_MODULE.search(path) for path in paths)
    # File names have - or _, and both mean the same module.
    return {name for match in found if match and (name := match[1].replace("-", "_")) in wanted}


def _initramfs(
    root: Filesystem, version: str, places: Sequence[tuple[Filesystem, str]]
) -> tuple[Filesystem, str, str] | None:
    """Returns the initramfs of a kernel: its filesystem, its path there, and its name for people."""
    names = [f"initrd.img-{version}", f"initramfs-{version}.img", f"initrd-{version}", f"initramfs-{version}"]
    # Arch names it by its package, Alpine by the flavour at the version's end.
    package = (root.content_of(f"lib/modules/{version}/pkgbase", 256) or "").strip()
    names += [f"initramfs-{package}.img"] if package else []
    names += [f"initramfs-{version.rpartition('-')[2]}"]
    for filesystem, prefix in places:
        for name in names:
            if "/" not in name and filesystem.file(prefix + name):
                return filesystem, prefix + name, f"/boot/{name}"
    return None
