"""What the reader knows of a domain: attributes by the path of their element, see `vmconv.machine.unknown`.

Everything else is kept: as a fragment, or by its path. The writer takes over none of the latter, so they are losses.
"""

from __future__ import annotations

_IGNORED = "*"
"""Read elsewhere, or written by libvirt itself: names of the last run, places that it derives."""

# libvirt finds a new place on the PCI bus. Guests know cards by their MAC address, and the place of those is kept.
_DEVICE = {"address": "type domain bus slot function multifunction controller target unit port", "alias": "name"}
# libvirt writes `backingStore` from the images' headers, and takes the rest of a run from the host.
_DRIVE = {
    **_DEVICE,
    "": "type device=disk device=cdrom device=floppy",
    "source": "file dev dir pool volume protocol name type namespace path index",
    "target": "dev bus tray",
    "driver": _IGNORED,
    "serial": "",
    "boot": "order",
    "shareable": "",
    "transient": "",
    "readonly": "",
    "backingStore": _IGNORED,
}

_SYSINFO = ("bios", "system", "baseBoard", "chassis", "oemStrings")


def _below(path: str, parts: dict[str, str]) -> dict[str, str]:
    return {f"{path}/{name}".rstrip("/"): attributes for name, attributes in parts.items()}


KNOWN = {
    "domain": "type id",
    **{f"domain/{name}": "" for name in ("name", "uuid", "genid", "description")},
    **{f"domain/{name}": _IGNORED for name in ("currentMemory", "vcpu", "clock", "metadata", "devices")},
    "domain/memory": "unit",
    "domain/maxMemory": "unit",
    "domain/os": "firmware",
    "domain/os/type": "arch machine",
    "domain/os/firmware": "",
    "domain/os/firmware/feature": "enabled name",
    "domain/os/loader": "readonly type secure",
    # The template made the file of variables, and the guest has changed it since.
    "domain/os/nvram": "template templateFormat type=file",
    "domain/os/nvram/source": "file",
    "domain/os/boot": "dev",
    "domain/sysinfo": "type",
    **{f"domain/sysinfo/{name}": "" for name in _SYSINFO},
    **{f"domain/sysinfo/{name}/entry": "name" for name in _SYSINFO},
    "domain/os/smbios": "mode",
    # How libvirt compares the processor with the host's is no property of the guest's.
    "domain/cpu": "mode match check migratable=on",
    "domain/cpu/model": "fallback",
    "domain/cpu/topology": "sockets dies clusters cores threads",
    "domain/features": "",
    "domain/features/acpi": "",
    "domain/features/apic": "",
    "domain/features/smm": "state",
    **_below("disk", _DRIVE),
    **_below(
        "controller",
        # virt-install asks for 15 ports; masters are those of QEMU's own layout.
        {**_DEVICE, "": "type index model ports=15", "master": "startport"},
    ),
    **_below(
        "interface",
        {
            **_DEVICE,
            "": "type",
            "mac": "address type=static",
            "model": "type",
            "source": "network bridge dev mode portid",
            "link": "state",
            "boot": "order",
            "target": "dev",
        },
    ),
    **_below(
        "video",
        # The usual sizes of a QXL card, which libvirt writes into each domain that has one.
        {**_DEVICE, "": "", "model": "type vram heads primary=yes ram=65536 vgamem=16384"},
    ),
    **_below("sound", {**_DEVICE, "": "model"}),
    **_below(
        "serial",
        {
            **_DEVICE,
            "": "type",
            "source": "path mode host service",
            "protocol": "type",
            "target": "port type=isa-serial",
            "target/model": "name=isa-serial",
        },
    ),
    **_below("watchdog", {**_DEVICE, "": "model action=reset"}),
    # Where the host takes random numbers from is the host's matter.
    **_below("rng", {**_DEVICE, "": "model=virtio", "backend": "model=random"}),
    **_below(
        "tpm",
        {
            **_DEVICE,
            "": "model=tpm-crb model=tpm-tis",
            "backend": "type=emulator version",
            "backend/source": "type=file path",
        },
    ),
    **_below(
        "hostdev",
        {
            **_DEVICE,
            "": "mode type managed",
            "source": "",
            "source/address": _IGNORED,
            "source/vendor": "id",
            "source/product": "id",
        },
    ),
}
